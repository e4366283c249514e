"""One token through the decoder on a CPU, without modules in between."""


def use(module):
    """Put the twin in place in `module` and its children."""
