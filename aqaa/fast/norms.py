"""RMSNorm in few passes over memory, for training on a CPU."""


def use(module):
    """Put the twin in place in `module` and its children."""
