"""The estimator of the flow: a one-dimensional U-Net of ResNet and transformer blocks (Matcha-TTS).

Tensors are (B, C, T), with a mask (B, 1, T) of valid frames, or None where all are valid. Padding
never changes valid frames: convolutions see zeros, attention and statistics leave it out.
"""

import math
from collections import OrderedDict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn


class MaskedGroupNorm(nn.GroupNorm):
    """GroupNorm over channels and *valid* frames (the official one also counts the padding)."""

    def forward(self, x, mask=None):
        """x (B, C, T), mask (B, 1, T) or None -> (B, C, T)."""
        if mask is None:
            return super().forward(x)
        grouped = x.float().unflatten(1, (self.num_groups, -1))  # (B, G, C/G, T)
        valid = mask.float()[:, None]  # (B, 1, 1, T)
        count = valid.sum((2, 3), keepdim=True) * grouped.shape[2]
        mean = (grouped * valid).sum((2, 3), keepdim=True) / count
        centred = (grouped - mean) * valid
        variance = centred.square().sum((2, 3), keepdim=True) / count
        normed = (centred * torch.rsqrt(variance + self.eps)).flatten(1, 2).to(x.dtype)
        return normed * self.weight[:, None].to(x.dtype) + self.bias[:, None].to(x.dtype)


def masked(x, mask):
    """x with its invalid frames set to zero."""
    return x if mask is None else x * mask


class Block(nn.Module):
    """Convolution, normalisation, Mish."""

    def __init__(self, n_in, n_out, groups=8):
        super().__init__()
        conv = nn.Conv1d(n_in, n_out, 3, padding=1)
        self.block = nn.Sequential(conv, MaskedGroupNorm(groups, n_out), nn.Mish())

    def forward(self, x, mask):
        conv, norm, mish = self.block
        return masked(mish(norm(conv(masked(x, mask)), mask)), mask)


class ResnetBlock(nn.Module):
    """Two blocks with the time added between them, and a 1x1 convolution as residual path."""

    def __init__(self, n_in, n_out, n_time):
        super().__init__()
        self.mlp = nn.Sequential(nn.Mish(), nn.Linear(n_time, n_out))
        self.block1 = Block(n_in, n_out)
        self.block2 = Block(n_out, n_out)
        self.res_conv = nn.Conv1d(n_in, n_out, 1)

    def forward(self, x, mask, time):
        """x (B, n_in, T), time (B, n_time) -> (B, n_out, T)."""
        hidden = self.block1(x, mask) + self.mlp(time)[..., None]  # the same shift in every frame
        return self.block2(hidden, mask) + self.res_conv(masked(x, mask))


class Attention(nn.Module):
    """Self-attention over frames; queries, keys and values have no bias (diffusers' naming)."""

    def __init__(self, channels, heads, head_dim):
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_k = nn.Linear(channels, inner, bias=False)
        self.to_v = nn.Linear(channels, inner, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])

    def forward(self, x, mask):
        """x (B, T, C), mask (B, 1, T) or None -> (B, T, C)."""
        split = (y(x).unflatten(-1, (self.heads, -1)) for y in (self.to_q, self.to_k, self.to_v))
        q, k, v = (y.transpose(1, 2) for y in split)  # (B, H, T, d)
        valid = None if mask is None else mask[:, None].bool()  # (B, 1, 1, T): of the keys
        if torch.is_grad_enabled() and x.device.type == "cpu":
            # the same by hand: on a CPU the backward of the fused function is slow
            score = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, T, T)
            score = score if valid is None else score.masked_fill(~valid, float("-inf"))
            out = score.softmax(-1).to(v.dtype) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=valid)  # (B, H, T, d)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward; norm2, of cross-attention, is not in use."""

    def __init__(self, channels, heads, head_dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads, head_dim)
        self.norm3 = nn.LayerNorm(channels)
        widen = nn.Sequential(OrderedDict(proj=nn.Linear(channels, 4 * channels), gelu=nn.GELU()))
        # the empty place is the published dropout: names count it
        net = nn.Sequential(widen, nn.Identity(), nn.Linear(4 * channels, channels))
        self.ff = nn.Sequential(OrderedDict(net=net))

    def forward(self, x, mask):
        x = x + self.attn1(self.norm1(x), mask)
        return x + self.ff(self.norm3(x))


class TimeEmbedding(nn.Module):
    """t in [0, 1] -> sinusoids of 1000 t -> a two-layer perceptron."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.linear_1 = nn.Linear(n_in, n_out)
        self.linear_2 = nn.Linear(n_out, n_out)

    def forward(self, t):
        """t (B,) -> (B, n_out)."""
        half = self.linear_1.in_features // 2
        exponent = torch.arange(half, device=t.device) * -(math.log(10_000) / (half - 1))
        # in half precision 1000 t is rounded before the float32 product, as in the published code
        angle = (1000 * t)[:, None] * torch.exp(exponent)[None]  # (B, n_in / 2)
        wave = torch.cat([angle.sin(), angle.cos()], -1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(wave)))


class UNet(nn.Module):
    """Velocity of the flow: (x, mu, speaker, cond) at time t -> dx/dt.

    config: FlowConfig; its `channels` are the widths of the stages, between which time is halved.
    """

    def __init__(self, in_channels, out_channels, config):
        super().__init__()
        channels = config.channels
        n_time = channels[0] * 4
        self.time_mlp = TimeEmbedding(in_channels, n_time)

        def stage(n_in, n_out, *change):
            sizes = (n_out, config.num_heads, config.attention_head_dim)
            blocks = nn.ModuleList(TransformerBlock(*sizes) for _ in range(config.n_blocks))
            return nn.ModuleList([ResnetBlock(n_in, n_out, n_time), blocks, *change])

        def change(layer, width, kernel, is_last):
            """Halve or double the frames; the last stage keeps them."""
            if is_last:
                return nn.Conv1d(width, width, 3, padding=1)
            return nn.Sequential(OrderedDict(conv=layer(width, width, kernel, 2, 1)))

        last = len(channels) - 1
        self.down_blocks = nn.ModuleList()
        self.up_blocks = nn.ModuleList()
        # initial weights are drawn in the order of these lines, as the recorded trainings drew them
        for i, (before, width) in enumerate(pairwise([in_channels, *channels])):
            halve = change(nn.Conv1d, width, 3, i == last)
            self.down_blocks.append(stage(before, width, halve))
        middle = (stage(channels[-1], channels[-1]) for _ in range(config.num_mid_blocks))
        self.mid_blocks = nn.ModuleList(middle)
        widths = [*channels[::-1], channels[0]]
        for i, (before, width) in enumerate(pairwise(widths)):
            double = change(nn.ConvTranspose1d, width, 4, i == last)
            self.up_blocks.append(stage(2 * before, width, double))  # twice: a skip beside it
        self.final_block = Block(widths[-1], widths[-1])
        self.final_proj = nn.Conv1d(widths[-1], out_channels, 1)

    def forward(self, x, mask, mu, t, speaker, cond):
        """x, mu, cond (B, n_mels, T), t (B,), speaker (B, n_mels) -> (B, n_mels, T)."""
        time = self.time_mlp(t)  # (B, n_time)
        speaker = speaker[..., None].expand(-1, -1, x.shape[-1])  # the same beside every frame
        x = torch.cat([x, mu, speaker, cond], 1)  # (B, 4 n_mels, T)
        skips = []
        for i, (*stage, change) in enumerate(self.down_blocks):
            x = _run(stage, x, mask, time)
            skips.append((x, mask))
            x = change(masked(x, mask))
            if i < len(self.down_blocks) - 1 and mask is not None:
                mask = mask[..., ::2]  # the frames that a convolution of stride 2 is centred on
        for stage in self.mid_blocks:
            x = _run(stage, x, mask, time)
        for *stage, change in self.up_blocks:
            skip, mask = skips.pop()
            x = x[..., : skip.shape[-1]]  # doubling an odd length that was halved gives one more
            x = torch.cat([x, skip], 1)  # (B, 2 C, T): coarse and fine
            x = change(masked(_run(stage, x, mask, time), mask))
        x = self.final_block(x, mask)
        return masked(self.final_proj(masked(x, mask)), mask)


def _run(stage, x, mask, time):
    """The ResNet block, then the transformer blocks of a stage: (B, C, T) -> (B, C', T)."""
    resnet, transformers = stage
    # copied into (B, T, C), and back: sums of two layouts in memory would be slow
    x = resnet(x, mask, time).transpose(1, 2).contiguous()
    for block in transformers:
        x = block(x, mask)
    return x.transpose(1, 2).contiguous()
