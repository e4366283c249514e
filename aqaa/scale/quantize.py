"""Weights of 4 or 8 bits for a whole model (the layers: aqaa/backbone/quantized_linear.py)."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from aqaa.backbone import attention
from aqaa.backbone.quantized_linear import QuantizedLinear, format_of, linears
from aqaa.config import check_group, largest_group


class Calibration:
    """The hidden states of some dialogues, carried on so that one layer at a time is in memory.
    rows: lists of ids; embedding (V, D), whose dtype the states have; heads: of attention."""

    def __init__(self, rows, embedding, heads):
        self.slopes = attention.slopes(heads).to(embedding.device)
        ids = (torch.tensor([row], device=embedding.device) for row in rows)
        self.states = [F.embedding(row, embedding) for row in ids]  # (1, T, D) each

    @torch.inference_mode()
    def run(self, layer):
        biases = (attention.sqrt_bias(self.slopes, x.shape[1], x.shape[1]) for x in self.states)
        return [layer(x, bias) for x, bias in zip(self.states, biases, strict=True)]

    def hessians(self, layer):
        """{name of a linear: mean of x xᵀ over its inputs, (K, K) fp32} of a decoder layer."""
        hessians, count = {}, sum(x.shape[1] for x in self.states)

        def watch(name, _, inputs):
            x = inputs[0].flatten(0, -2).float()  # (ids, K)
            hessians[name] = hessians.get(name, 0) + x.T @ x / count

        hooks = [part.register_forward_pre_hook(partial(watch, name))
                 for name, part in linears(layer)]  # fmt: skip
        self.run(layer)
        for hook in hooks:
            hook.remove()
        return hessians

    def advance(self, layer):
        """Go on behind `layer`, which is quantised by now: later ones make up for its errors."""
        self.states = self.run(layer)


def quantize_(model, weights="int4", group=None, skip=("lm_head",), rows=None):
    """Replace the linear layers of a Step1ForCausalLM, in place; returns it.

    weights: int4, int8, fp8. group: see `group_for`. skip: ends of names of those left as they are.
    rows: dialogues (lists of ids) for GPTQ; none: rounded to the nearest. Raises ValueError before
    anything is changed if a group does not divide."""
    cls = format_of(weights)
    widths = {name: linear.in_features for name, linear in linears(model, skip)}
    group = group_for(cls, group, widths)
    if rows:
        embedding = model.model.embed_tokens.weight.detach()  # (V, D)
        calibration = Calibration(rows, embedding, model.config.num_attention_heads)
        for layer in model.model.layers:
            replace_linears(layer, cls, group, skip, calibration.hessians(layer))
            calibration.advance(layer)
    return replace_linears(model, cls, group, skip)


def group_for(cls, group, widths, ranks=1):
    """The group, by default the largest usual one, of {name: width}; or None. ranks: GPUs that each
    hold a share of every width, in whole groups. Raises ValueError."""
    usual = cls.group_by_default
    group = group or usual and (largest_group(widths.values(), ranks) or usual)
    for name, width in widths.items() if group else ():
        check_group(width, group, ranks, name, widths.values())
    return group


def replace_linears(module, cls, group=None, skip=(), hessians=None):
    """Quantise the linear layers within `module`, in place; hessians: {name: (K, K)} for GPTQ."""
    for name, linear in list(linears(module, skip)):
        hessian = (hessians or {}).get(name)
        module.set_submodule(name, cls.from_linear(linear, group, hessian=hessian))
    return module


def dequantized(module):
    """The same module, changed in place, with fp32 linear layers instead of quantised ones."""
    for name, part in list(module.named_modules()):
        if isinstance(part, QuantizedLinear):
            linear = nn.Linear(part.in_features, part.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(part.dequantized(), requires_grad=False)
            module.set_submodule(name, linear)
    return module


def n_bytes(model):
    """{"linear", "scale", "other"}: bytes of the decoder's weights or codes, scales, the rest."""
    counts = {"linear": 0, "scale": 0, "other": 0}
    for name, value in model.state_dict().items():
        kind = "linear" if "_proj." in name else "other"
        counts["scale" if name.endswith(".scale") else kind] += value.nbytes
    return counts
