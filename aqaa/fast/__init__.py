"""Faster twins of the plain modules, put in place from outside.

Import `prepare` (for answers) and `prepare_training`. May import the three rooms of the model,
which never import this one; tests hold each twin equal to its plain form.
"""

from aqaa.fast.prepared import prepare, prepare_training

__all__ = ["prepare", "prepare_training"]
