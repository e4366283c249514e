"""Training of the mini: the table of stages, examples, objectives, and the loop that drives them.

Import its modules. May import corpus and what lies below."""
