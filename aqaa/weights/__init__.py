"""Weights on disk, ours and released ones, checked before use. See `aqaa.loading`."""
