"""Attention with a square-root distance bias: score[h, i, j] = q·k / sqrt(d) − slope[h] · sqrt(i − j) (PAPER 1.1).

The bias knows only distances, so it is right for left padding, for caches of any length and for packed rows. It is
computed in fp32 once a forward pass.
"""

import torch
import torch.nn.functional as F
from torch import distributed


def slopes(n_heads):
    """One slope a head, (H,) fp32: 2^(−8k/n), k = 1..n for n = 2^⌊log2 H⌋; further heads take the odd steps between.

    The further ones stay behind the others, unsorted, as in the published model.
    """
    n = 1 << (n_heads.bit_length() - 1)
    regular = [2 ** (-8 * k / n) for k in range(1, n + 1)]
    between = [2 ** (-4 * k / n) for k in range(1, 2 * (n_heads - n), 2)]
    return torch.tensor(regular + between, dtype=torch.float32)


def sqrt_bias(slope, n_query, n_key, first=0):
    """The additive mask (1, H, Q, K) fp32: −slope·sqrt(i − j), and −inf where key j lies after query i.

    slope (H,); first: slot of the first query (an int, or a tensor with a static cache).
    """
    query = torch.arange(n_query, device=slope.device) + first
    distance = query[:, None] - torch.arange(n_key, device=slope.device)  # (Q, K)
    root = distance.clamp(min=0).float().sqrt()
    return (-slope[None, :, None, None] * root).masked_fill_(distance < 0, -torch.inf)


def with_mask(bias, mask):
    """Add what may not be seen to a bias (1, H, Q, K).

    mask: (B, K') of ones and zeros (padding; K' ≤ K), or (B, 1, Q, K) bool (True = may see) or additive. Hidden keys
    get the lowest finite number, not −inf, so that a query that sees nothing stays finite.
    """
    n_query, n_key = bias.shape[-2:]
    if mask.dim() == 2:
        mask = F.pad(mask, (0, n_key - mask.shape[1])).bool()[:, None, None, :]
    elif mask.dtype == torch.bool:
        mask = F.pad(mask, (0, n_key - mask.shape[-1])) if mask.shape[-1] < n_key else mask[..., :n_key]
    else:
        return (bias.float() + mask[..., :n_key].float()).to(bias.dtype)
    return torch.where(mask, bias, torch.finfo(bias.dtype).min).expand(-1, -1, n_query, -1)


def sdpa(query, key, value, bias, scaling):
    """query (B, H, Q, D), key and value (B, G, K, D), bias (B|1, H, Q, K) → (B, H, Q, D).

    The H/G heads of a group are laid one after the other along the query axis, so keys and values are never repeated:
    when decoding, the cache is read once and not H/G times.
    """
    batch, heads, n_query, width = query.shape
    groups, n_key = key.shape[1:3]
    query = query.reshape(batch, groups, -1, width)
    bias = bias.to(query.dtype).reshape(bias.shape[0], groups, -1, n_key)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling)
    return out.reshape(batch, heads, n_query, width)


def eager(query, key, value, bias, scaling):
    """The same by hand with softmax in fp32; also returns the weights (B, H, Q, K)."""
    batch, heads, n_query, width = query.shape
    groups, n_key = key.shape[1:3]
    packed = query.reshape(batch, groups, -1, width)
    scores = (packed @ key.transpose(2, 3) * scaling).view(batch, heads, n_query, n_key)
    weights = (scores.float() + bias).softmax(-1).to(value.dtype)
    out = weights.view(batch, groups, -1, n_key) @ value
    return out.view(batch, heads, n_query, width), weights


def check_implementation(name):
    """Raise ValueError for an `attn_implementation` other than ours; None leaves the choice to transformers."""
    if name not in (None, "sdpa", "eager"):
        raise ValueError(
            f"Step-1 has no attention {name!r}, as such kernels do not add its square-root distance bias: "
            'use attn_implementation="sdpa", or "eager" to see the weights'
        )


def segments(query, key, value, bias, sizes, scaling):
    """Packed rows: query (N, H, D), key and value (N, G, D) hold segments of `sizes` tokens → (N, H, D).

    A segment of size n attends to itself through bias[:, :, :n, :n]; nothing of size (N, N) is made. Negative sizes are
    padding: they cost nothing and come out as zeros. Written with matrix products because training in bf16 on a CPU
    is 3 times faster so than through the fused kernel, whose backward pass is slow.
    """
    heads, groups, width = query.shape[1], key.shape[1], query.shape[2]
    lengths = [abs(size) for size in sizes]
    bias = bias[0].to(query.dtype)  # (H, T, T)
    masks = {size: bias[:, :size, :size].reshape(groups, -1, size) for size in set(sizes) if size > 0}
    query = (query * scaling).unflatten(1, (groups, heads // groups))  # (N, G, R, D)
    outs = []
    for size, q, k, v in zip(sizes, query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        if size < 0:
            outs.append(torch.zeros_like(q))
            continue
        q = q.permute(1, 2, 0, 3).reshape(groups, -1, width)  # (G, R·n, D)
        scores = torch.baddbmm(masks[size], q, k.permute(1, 2, 0))
        out = scores.softmax(-1, dtype=scores.dtype) @ v.transpose(0, 1)
        outs.append(out.view(groups, -1, size, width).permute(2, 0, 1, 3))
    return torch.cat(outs).flatten(1, 2)


def segment_sizes(segment_ids):
    """Lengths of the runs in (B, T) segment ids, row by row; runs of id 0 are padding and come out negative.

    None if a row has two runs of one id: an example with a gap is not to be cut into runs.
    """
    sizes = []
    for row in segment_ids.tolist():
        start, seen = 0, set()
        for at in range(1, len(row) + 1):
            if at == len(row) or row[at] != row[start]:
                if row[start] in seen:
                    return None
                seen |= {row[start]} - {0}
                sizes.append((at - start) if row[start] else (start - at))
                start = at
    return sizes


def local_heads(bias, n_heads):
    """The part of a bias that belongs to this process when tensor parallelism has split the heads."""
    if bias.shape[1] == n_heads:
        return bias
    first = distributed.get_rank() % (bias.shape[1] // n_heads) * n_heads
    return bias[:, first : first + n_heads]
