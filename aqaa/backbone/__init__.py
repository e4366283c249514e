"""Step-1, the language model that hears and speaks in audio ids, and the decoder that keeps its answers well formed."""
