"""The FSMN memory of SANM attention as one small (Toeplitz) matrix product a channel.

A depthwise conv1d over thousands of nine-row signals is slow, its gradient slower than the rest."""

import torch
import torch.nn.functional as F

from aqaa.tokenizers.linguistic import SANMAttention


class ToeplitzSANM(SANMAttention):
    """SANM attention whose memory, v (B, C, R, D) → (B, C, R, D), is one product a channel."""

    def memory(self, v):
        rows = v.shape[2]
        taps = F.pad(self.fsmn_block.weight[:, 0], (rows, rows))  # (D, kernel + 2 R)
        place = torch.arange(rows, device=v.device)
        toeplitz = taps[:, place[:, None] - place + self.pad[0] + rows]  # (D, R in, R out)
        # Channels first and contiguous: only then are the D products one call.
        channels = v.flatten(0, 1).permute(2, 0, 1).contiguous()  # (D, B C, R)
        filtered = channels @ toeplitz.to(v.dtype)
        return filtered.permute(1, 2, 0).view_as(v) + v


def use(module):
    """Put the twin in place in `module` and its children; returns `module`."""
    for layer in module.modules():
        if type(layer) is SANMAttention:
            layer.__class__ = ToeplitzSANM  # same weights and names, another product
    return module
