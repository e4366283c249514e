"""Triton's interpreter for tests: import this first. Kernels then run on CPU tensors, one program after the other.

Triton 3.6 turns scalars, which it keeps in arrays of one element, into loop bounds with int(array); numpy 2.4 refuses
that, so the conversion is replaced. Its tl.dot of bfloat16 is wrong (it multiplies the bits): tests use fp32 and fp16.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest

interpreter = pytest.importorskip("triton.runtime.interpreter")
_patch = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor, scope):
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_lang_tensor
