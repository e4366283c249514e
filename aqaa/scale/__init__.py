"""What 130 billion parameters need: quantised weights, a plan, many GPUs, several listeners, vLLM.

Import its modules. May import corpus and what lies below, never evaluation or training."""
