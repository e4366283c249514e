"""Sound and text to ids and back: two tokenizers of speech, one of text, and the dialogue."""
