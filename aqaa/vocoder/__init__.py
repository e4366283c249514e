"""Audio ids to sound: flow matching makes the mel spectrogram, HiFT the wave, both in one piece or chunk by chunk."""
