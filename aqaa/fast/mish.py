"""Mish with one exponential."""


def use(module):
    """Put the twin in place in `module` and its children."""
