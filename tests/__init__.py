"""One test file per module; `tests.parity` compares modules with tensors of the official classes."""
