"""What 130 billion parameters need: quantised weights, a plan of memory and time, other engines."""
