"""Faster twins of the plain modules, put in place from outside; tests hold each equal to its form.

No file of the model imports this package; it may import the model's.
"""

from aqaa.fast.prepared import prepare, prepare_training

__all__ = ["prepare", "prepare_training"]
