"""Step-1, the language model that hears and speaks in audio ids, and how an answer is drawn.

Import its modules. May import the ground floor, never tokenizers or vocoder: a layout is handed in.
"""
