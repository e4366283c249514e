"""Training of the mini: corpora, tasks, the loop that drives them."""
