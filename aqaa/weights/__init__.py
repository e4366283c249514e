"""Weights on disk, ours and released ones, checked before use. `aqaa.loading` is the way in; imports every model part."""
