"""Audio ids to sound, whole or in chunks: flow matching makes the mel, HiFT the wave."""
