"""Faster twins of the plain modules, put in place from outside: `prepare` for answers, `prepare_training` for training.

No file of the model imports this package; it may import the model's. Tests hold each twin equal to its plain form.
"""

from aqaa.fast.prepared import prepare, prepare_training

__all__ = ["prepare", "prepare_training"]
