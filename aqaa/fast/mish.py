"""Mish with one exponential, four times as fast on a CPU."""

import torch
from torch import nn

from aqaa.vocoder.unet import UNet


class OneExponentialMish(nn.Mish):
    """x tanh(log(1 + e)) with e = exp(x), written x n / (n + 2) with n = e (e + 2)."""

    def forward(self, x):
        if x.dtype != torch.float32:  # where e would be rounded
            return super().forward(x)
        e = x.clamp(max=20).exp()  # beyond, n / (n + 2) is 1, and n might overflow
        n = e * (e + 2)
        return x * (n / (n + 2))


def use(module):
    """Put the twin in place of each Mish of a U-Net, which the flow runs many times an answer."""
    for net in module.modules():
        if isinstance(net, UNet):
            for layer in net.modules():
                if type(layer) is nn.Mish:
                    layer.__class__ = OneExponentialMish
