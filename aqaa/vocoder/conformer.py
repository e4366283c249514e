"""The encoder of the flow: a transformer over audio ids with relative positions (ESPnet's
conformer without its convolutions, as CosyVoice configures it)."""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn


def relative_positions(n, width, like):
    """Sinusoids of i - j = n-1, ..., -(n-1): (2n - 1, width), dtype and device of `like`."""
    distance = torch.arange(n - 1, -n, -1, dtype=torch.float32, device=like.device)[:, None]
    exponent = torch.arange(0, width, 2, device=like.device) * (-math.log(10_000) / width)
    angle = distance * torch.exp(exponent)  # (2n - 1, width / 2)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1).to(like.dtype)


class RelativeAttention(nn.Module):
    """score = ((q + u) k + (q + v) p_{i-j}) / sqrt(d): content and distance (Transformer-XL)."""

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

    def forward(self, x, positions, mask):
        """x (B, T, D), positions (2T - 1, D), mask (B, T) bool or None -> (B, T, D)."""
        layers = self.linear_q, self.linear_k, self.linear_v
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in layers)  # (B, T, H, d)
        p = self.linear_pos(positions).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        # u and v are queries that all positions share: some keys and distances always attract
        content = (q + self.pos_bias_u).transpose(1, 2) @ k.permute(0, 2, 3, 1)  # (B, H, T, T)
        distance = shift((q + self.pos_bias_v).transpose(1, 2) @ p.mT)  # (B, H, T, T)
        score = (content + distance) / math.sqrt(q.shape[-1])
        if mask is not None:
            score = score.masked_fill(~mask[:, None, None], float("-inf"))
        out = score.softmax(-1).to(v.dtype) @ v.transpose(1, 2)  # (B, H, T, d)
        return self.linear_out(out.transpose(1, 2).flatten(2))


def shift(score):
    """Columns by distance (B, H, T, 2T - 1) -> columns by key (B, H, T, T).

    Row i needs the columns from T - 1 - i on. One more column in front, read as rows of another
    length, moves each row by one place against the row above it: no index table is needed.
    """
    b, h, n, m = score.shape
    return F.pad(score, (1, 0)).view(b, h, m + 1, n)[:, :, 1:].reshape(b, h, n, m)[..., :n]


class EncoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, both residual."""

    def __init__(self, width, heads, units):
        super().__init__()
        self.self_attn = RelativeAttention(width, heads)
        self.feed_forward = nn.Sequential(OrderedDict(
            w_1=nn.Linear(width, units), activation=nn.SiLU(), w_2=nn.Linear(units, width),
        ))  # fmt: skip
        self.norm_ff = nn.LayerNorm(width)
        self.norm_mha = nn.LayerNorm(width)

    def forward(self, x, positions, mask):
        x = x + self.self_attn(self.norm_mha(x), positions, mask)
        return x + self.feed_forward(self.norm_ff(x))


class ConformerEncoder(nn.Module):
    """x (B, T, n_in), mask (B, T) bool or None -> (B, T, width)."""

    def __init__(self, n_in, width, heads, units, blocks):
        super().__init__()
        linear = nn.Sequential(nn.Linear(n_in, width), nn.LayerNorm(width))
        self.embed = nn.Sequential(OrderedDict(out=linear))
        self.encoders = nn.ModuleList(EncoderLayer(width, heads, units) for _ in range(blocks))
        self.after_norm = nn.LayerNorm(width)

    def forward(self, x, mask=None):
        x = self.embed(x) * math.sqrt(self.after_norm.normalized_shape[0])  # (B, T, width)
        positions = relative_positions(x.shape[1], x.shape[2], x)
        for layer in self.encoders:
            x = layer(x, positions, mask)
        return self.after_norm(x)
