"""Faster twins of the plain modules, put in place from outside: no file of the model imports it."""

from aqaa.fast.prepared import prepare, prepare_training

__all__ = ["prepare", "prepare_training"]
