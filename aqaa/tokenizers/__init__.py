"""Sound and text to ids and back: two speech tokenizers, the text tokenizer, and the 2:3 interleave."""
