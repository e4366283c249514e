"""The estimator of the flow: a one-dimensional U-Net of ResNet and transformer blocks (Matcha-TTS, decoder.py).

Everything is (B, C, T) with a mask (B, 1, T) of valid frames, or None where every frame is valid. Padding never changes
valid frames: convolutions see zeros there, attention skips it, and normalisation leaves it out of its statistics.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn


class MaskedGroupNorm(nn.GroupNorm):
    """GroupNorm over channels and *valid* frames (the official one also counts the padding)."""

    def forward(self, x, mask=None):
        """x (B, C, T), mask (B, 1, T) or None."""
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


class Mish(nn.Mish):
    """x tanh(log(1 + e)), e = exp(x), which is x n / (n + 2) with n = e (e + 2): one exponential, and four times as
    fast."""

    def forward(self, x):
        if x.dtype != torch.float32:  # where e would be rounded
            return super().forward(x)
        e = x.clamp(max=20).exp()  # beyond, n / (n + 2) is 1, and n might overflow
        n = e * (e + 2)
        return x * (n / (n + 2))


class Block(nn.Module):
    """Convolution, normalisation, Mish."""

    def __init__(self, n_in, n_out, groups=8):
        super().__init__()
        self.block = nn.Sequential(nn.Conv1d(n_in, n_out, 3, padding=1), MaskedGroupNorm(groups, n_out), Mish())

    def forward(self, x, mask):
        conv, norm, mish = self.block
        return masked(mish(norm(conv(masked(x, mask)), mask)), mask)


class ResnetBlock(nn.Module):
    """Two blocks with the time added between them, and a 1x1 convolution as residual path."""

    def __init__(self, n_in, n_out, n_time):
        super().__init__()
        self.mlp = nn.Sequential(Mish(), nn.Linear(n_time, n_out))
        self.block1 = Block(n_in, n_out)
        self.block2 = Block(n_out, n_out)
        self.res_conv = nn.Conv1d(n_in, n_out, 1)

    def forward(self, x, mask, time):
        h = self.block1(x, mask) + self.mlp(time)[..., None]
        return self.block2(h, mask) + self.res_conv(masked(x, mask))


class Attention(nn.Module):
    """Self-attention over frames, without biases on queries, keys and values (diffusers' naming)."""

    def __init__(self, channels, heads, head_dim):
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_k = nn.Linear(channels, inner, bias=False)
        self.to_v = nn.Linear(channels, inner, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])

    def forward(self, x, mask):
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.to_q, self.to_k, self.to_v))
        keys = None if mask is None else mask[:, None].bool()  # (B, 1, 1, T)
        if torch.is_grad_enabled() and x.device.type == "cpu":  # where the fused kernel's backward is slow
            score = (q * q.shape[-1] ** -0.5) @ k.mT
            out = (score if keys is None else score.masked_fill(~keys, float("-inf"))).softmax(-1).to(v.dtype) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)  # (B, H, T, d)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class Projection(nn.Module):
    """Linear, then GELU (its own module only for the name `proj`)."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.proj = nn.Linear(n_in, n_out)

    def forward(self, x):
        return F.gelu(self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.net = nn.Sequential(Projection(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward; there is no norm2, which belonged to cross-attention."""

    def __init__(self, channels, heads, head_dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads, head_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x, mask):
        x = x + self.attn1(self.norm1(x), mask)
        return x + self.ff(self.norm3(x))


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, 2, 1)

    def forward(self, x):
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.ConvTranspose1d(channels, channels, 4, 2, 1)

    def forward(self, x):
        return self.conv(x)


class TimeEmbedding(nn.Module):
    """t in [0, 1] -> sinusoids of 1000 t -> a two-layer perceptron."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.linear_1 = nn.Linear(n_in, n_out)
        self.linear_2 = nn.Linear(n_out, n_out)

    def forward(self, t):
        half = self.linear_1.in_features // 2
        frequency = torch.exp(torch.arange(half, device=t.device) * -(math.log(10_000) / (half - 1)))
        # in half precision 1000 t is rounded before the float32 product: the published checkpoint was used that way
        angle = (1000 * t)[:, None] * frequency[None]
        wave = torch.cat([angle.sin(), angle.cos()], -1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(wave)))


class UNet(nn.Module):
    """Velocity of the flow: (x, mu, speaker, cond) at time t -> dx/dt.

    channels: width of each stage; between stages time is halved. Sizes as in FlowConfig.
    """

    def __init__(self, in_channels, out_channels, channels, n_blocks, num_mid_blocks, num_heads, attention_head_dim):
        super().__init__()
        n_time = channels[0] * 4
        self.time_mlp = TimeEmbedding(in_channels, n_time)

        def stage(n_in, n_out, *change):
            blocks = [TransformerBlock(n_out, num_heads, attention_head_dim) for _ in range(n_blocks)]
            return nn.ModuleList([ResnetBlock(n_in, n_out, n_time), nn.ModuleList(blocks), *change])

        last = len(channels) - 1
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(channels):
            before = channels[i - 1] if i else in_channels
            change = Downsample(width) if i < last else nn.Conv1d(width, width, 3, padding=1)
            self.down_blocks.append(stage(before, width, change))
        self.mid_blocks = nn.ModuleList(stage(channels[-1], channels[-1]) for _ in range(num_mid_blocks))
        widths = [*channels[::-1], channels[0]]
        for i, (before, width) in enumerate(pairwise(widths)):
            change = Upsample(width) if i < last else nn.Conv1d(width, width, 3, padding=1)
            self.up_blocks.append(stage(2 * before, width, change))
        self.final_block = Block(widths[-1], widths[-1])
        self.final_proj = nn.Conv1d(widths[-1], out_channels, 1)

    def forward(self, x, mask, mu, t, speaker, cond):
        """x, mu, cond (B, n_mels, T), t (B,), speaker (B, n_mels), mask (B, 1, T) or None -> (B, n_mels, T)."""
        time = self.time_mlp(t)
        x = torch.cat([x, mu, speaker[..., None].expand(-1, -1, x.shape[-1]), cond], 1)
        skips, masks = [], []
        for i, (*stage, change) in enumerate(self.down_blocks):
            x = _stage(stage, x, mask, time)
            skips.append(x)
            masks.append(mask)
            x = change(masked(x, mask))
            if i < len(self.down_blocks) - 1 and mask is not None:
                mask = mask[..., ::2]
        for stage in self.mid_blocks:
            x = _stage(stage, x, mask, time)
        for *stage, change in self.up_blocks:
            skip, mask = skips.pop(), masks.pop()
            x = torch.cat([x[..., : skip.shape[-1]], skip], 1)
            x = change(masked(_stage(stage, x, mask, time), mask))
        x = self.final_block(x, mask)
        return masked(self.final_proj(masked(x, mask)), mask)


def _stage(stage, x, mask, time):
    resnet, transformers = stage
    x = resnet(x, mask, time).transpose(1, 2).contiguous()  # (B, T, C); sums of two layouts would be slow
    for block in transformers:
        x = block(x, mask)
    return x.transpose(1, 2).contiguous()
