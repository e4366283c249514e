"""Audio ids to sound: flow matching makes the mel spectrogram, HiFT the wave, whole or in chunks.

Import its modules. May import the ground floor, never tokenizers or backbone.
"""
