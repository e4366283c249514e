"""Sound and text to ids and back: two speech tokenizers, text, 2:3 interleave, dialogue.

Import its modules. May import audio and the ground floor, never backbone or vocoder.
"""
