"""Weights on disk, ours and released ones, checked before use; imports every model part. See `aqaa.loading`."""
