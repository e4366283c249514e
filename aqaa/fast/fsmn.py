"""The memory block of SANM attention as one matrix product."""


def use(module):
    """Put the twin in place in `module` and its children."""
