"""Weights laid out in memory for fast inference on a CPU; names, shapes and values stay."""

from torch import nn

from aqaa.fast import amx as matrix_units
from aqaa.fast import cpu_step, fsmn, mish, norms, spectral

MARGIN = 16  # floats between two columns: columns of 2^n floats evict each other from the cache


def prepare(module, amx=False):
    """Make a part ready for inference, in place; returns it in eval mode. It can still be trained.

    Weight norms are folded (`unprepared` gives the factors back). The matrix of every linear layer
    is stored by columns, as the product reads it: with few rows of input the usual order costs a
    sixth more, for every call first copies it so. A backbone, which decodes one row at a time,
    keeps its matrices; its twin is cpu_step. amx: compute those layers on a Xeon's matrix units
    instead; ValueError where there are none.
    """
    if not cpu_step.use(module):
        if amx:
            matrix_units.use(module)
        for layer in module.modules():
            if type(layer) is nn.Linear:
                layer.weight.data = by_columns(layer.weight.data)
    if hasattr(module, "fold_weight_norm"):
        module.fold_weight_norm()
    for twin in (spectral, mish, fsmn):
        twin.use(module)
    return module.eval()


def prepare_training(module):
    """Put the twins that know gradients in place, for training on a CPU; returns the module."""
    for twin in (norms, mish, fsmn):
        twin.use(module)
    return module


def unprepared(module):
    """The state dict of a module as it was before `prepare`: weight norms in their two factors."""
    state = module.state_dict()
    for name, layer in module.named_modules():
        if factors := getattr(layer, "factors", dict)():
            del state[f"{name}.weight"]
            state |= {f"{name}.{factor}": value for factor, value in factors.items()}
    return state


def by_columns(weight):
    """The same (N, K) matrix with the values of a column side by side in memory."""
    n, k = weight.shape
    return weight.new_empty(k, n + MARGIN)[:, :n].copy_(weight.T).T
