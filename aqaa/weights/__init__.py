"""Weights on disk, ours and released ones, checked before use. The way in is `aqaa.loading`.

Import its modules. May import every part of the model, `fast` and the pipeline."""
