"""Step-1, the language model that hears and speaks in audio ids, and its decoder."""
