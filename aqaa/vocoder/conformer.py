"""The encoder of the flow: a transformer over audio ids with relative positions (ESPnet's conformer without its
convolutions, as CosyVoice configures it)."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def relative_positions(n, width, like):
    """Sinusoids of i - j = n-1, ..., -(n-1): (2n - 1, width), in the dtype and on the device of `like`."""
    distance = torch.arange(n - 1, -n, -1, dtype=torch.float32, device=like.device)[:, None]
    angle = distance * torch.exp(torch.arange(0, width, 2, device=like.device) * (-math.log(10_000) / width))
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1).to(like.dtype)


class RelativeAttention(nn.Module):
    """Content and position both attract: score = ((q + u) k + (q + v) p_{i-j}) / sqrt(d) (Transformer-XL)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.linear_q = nn.Linear(width, width)
        self.linear_k = nn.Linear(width, width)
        self.linear_v = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        self.linear_pos = nn.Linear(width, width, bias=False)
        self.pos_bias_u = nn.Parameter(torch.empty(heads, width // heads))
        self.pos_bias_v = nn.Parameter(torch.empty(heads, width // heads))
        nn.init.xavier_uniform_(self.pos_bias_u)
        nn.init.xavier_uniform_(self.pos_bias_v)

    def forward(self, x, positions, valid):
        """x (B, T, D), positions (2T - 1, D), valid (B, T) bool or None."""
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)) for p in (self.linear_q, self.linear_k, self.linear_v))
        p = self.linear_pos(positions).unflatten(-1, (self.heads, -1)).transpose(0, 1)  # (H, 2T - 1, d)
        content = (q + self.pos_bias_u).transpose(1, 2) @ k.permute(0, 2, 3, 1)  # (B, H, T, T)
        place = _shift((q + self.pos_bias_v).transpose(1, 2) @ p.mT)
        score = (content + place) / math.sqrt(q.shape[-1])
        if valid is not None:
            score = score.masked_fill(~valid[:, None, None], float("-inf"))
        out = score.softmax(-1).to(v.dtype) @ v.transpose(1, 2)  # (B, H, T, d)
        return self.linear_out(out.transpose(1, 2).flatten(2))


def _shift(score):
    """Columns by relative position (B, H, T, 2T - 1) -> columns by key (B, H, T, T)."""
    b, h, n, m = score.shape
    return F.pad(score, (1, 0)).view(b, h, m + 1, n)[:, :, 1:].reshape(b, h, n, m)[..., :n]


class PositionwiseFeedForward(nn.Module):
    def __init__(self, width, units):
        super().__init__()
        self.w_1 = nn.Linear(width, units)
        self.w_2 = nn.Linear(units, width)

    def forward(self, x):
        return self.w_2(F.silu(self.w_1(x)))


class EncoderLayer(nn.Module):
    def __init__(self, width, heads, units):
        super().__init__()
        self.self_attn = RelativeAttention(width, heads)
        self.feed_forward = PositionwiseFeedForward(width, units)
        self.norm_ff = nn.LayerNorm(width)
        self.norm_mha = nn.LayerNorm(width)

    def forward(self, x, positions, valid):
        x = x + self.self_attn(self.norm_mha(x), positions, valid)
        return x + self.feed_forward(self.norm_ff(x))


class Embed(nn.Module):
    """Linear, LayerNorm, and the usual sqrt(width)."""

    def __init__(self, n_in, width):
        super().__init__()
        self.out = nn.Sequential(nn.Linear(n_in, width), nn.LayerNorm(width))

    def forward(self, x):
        return self.out(x) * math.sqrt(self.out[0].out_features)


class ConformerEncoder(nn.Module):
    """x (B, T, n_in), valid (B, T) bool or None -> (B, T, width)."""

    def __init__(self, n_in, width, heads, units, blocks):
        super().__init__()
        self.embed = Embed(n_in, width)
        self.encoders = nn.ModuleList(EncoderLayer(width, heads, units) for _ in range(blocks))
        self.after_norm = nn.LayerNorm(width)

    def forward(self, x, valid=None):
        x = self.embed(x)
        positions = relative_positions(x.shape[1], x.shape[2], x)
        for layer in self.encoders:
            x = layer(x, positions, valid)
        return self.after_norm(x)
