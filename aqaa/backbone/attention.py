"""Attention with a distance bias: score[h, i, j] = q·k / sqrt(d) − slope[h] · sqrt(i − j).

PAPER 1.1. The bias knows only distances, so it is right for left padding, for caches of any length
and for packed rows. It is computed in fp32 once a forward pass.
"""

import torch
import torch.nn.functional as F
from torch import distributed


def slopes(n_heads):
    """One slope a head, (H,) fp32: 2^(−8k/n), k = 1..n for n = 2^⌊log2 H⌋; the others lie between.

    Those of further heads are the odd steps of twice as fine a row, unsorted, as published.
    """
    n = 1 << (n_heads.bit_length() - 1)
    regular = [2 ** (-8 * k / n) for k in range(1, n + 1)]
    between = [2 ** (-4 * k / n) for k in range(1, 2 * (n_heads - n), 2)]
    return torch.tensor(regular + between, dtype=torch.float32)


def sqrt_bias(slope, n_query, n_key, first=0):
    """The additive mask (1, H, Q, K) fp32: −slope·sqrt(i − j), −inf where key j is after query i.

    slope (H,); first: slot of the first query (an int, or a tensor with a static cache).
    """
    query = torch.arange(n_query, device=slope.device) + first
    distance = query[:, None] - torch.arange(n_key, device=slope.device)  # (Q, K)
    root = distance.clamp(min=0).float().sqrt()
    return (-slope[None, :, None, None] * root).masked_fill_(distance < 0, -torch.inf)


def with_mask(bias, mask):
    """A bias (1, H, Q, K) and what may not be seen besides → (B, H, Q, K).

    mask: (B, K') of ones and zeros (padding; K' ≤ K), or (B, 1, Q, K) bool (True = may see) or
    additive. Hidden keys get the lowest finite number, not −inf: with −inf a query that sees
    nothing, such as padding, would have a softmax of 0/0.
    """
    n_query, n_key = bias.shape[-2:]
    if mask.dim() == 2:
        mask = F.pad(mask, (0, n_key - mask.shape[1])).bool()[:, None, None, :]  # (B, 1, 1, K)
    elif mask.dtype == torch.bool:
        mask = F.pad(mask, (0, max(0, n_key - mask.shape[-1])))[..., :n_key]
    else:
        return (bias.float() + mask[..., :n_key].float()).to(bias.dtype)
    return torch.where(mask, bias, torch.finfo(bias.dtype).min).expand(-1, -1, n_query, -1)


def sdpa(query, key, value, bias, scaling):
    """query (B, H, Q, d), key and value (B, G, K, d), bias (B|1, H, Q, K) → (B, H, Q, d).

    The R = H/G heads of a group are laid one after the other along the query axis, so keys and
    values are never repeated: when decoding, the cache is read once and not R times.
    """
    batch, heads, n_query, width = query.shape
    groups, n_key = key.shape[1:3]
    query = query.reshape(batch, groups, -1, width)  # (B, G, R·Q, d)
    bias = bias.to(query.dtype).reshape(bias.shape[0], groups, -1, n_key)  # (B|1, G, R·Q, K)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling)
    return out.reshape(batch, heads, n_query, width)


def eager(query, key, value, bias, scaling):
    """The same by hand with softmax in fp32; also returns the weights (B, H, Q, K)."""
    batch, heads, n_query, width = query.shape
    groups, n_key = key.shape[1:3]
    grouped = query.reshape(batch, groups, -1, width)  # (B, G, R·Q, d)
    scores = (grouped @ key.transpose(2, 3) * scaling).view(batch, heads, n_query, n_key)
    # In fp32: in bf16 far distances would be rounded to the same penalty.
    weights = (scores.float() + bias).softmax(-1).to(value.dtype)
    out = weights.view(batch, groups, -1, n_key) @ value
    return out.view(batch, heads, n_query, width), weights


def check_implementation(name):
    """Raise ValueError for an `attn_implementation` but ours; None: transformers chooses."""
    if name not in (None, "sdpa", "eager"):
        fault = "such kernels do not add its square-root distance bias"
        remedy = 'use attn_implementation="sdpa", or "eager" to see the weights'
        raise ValueError(f"Step-1 has no attention {name!r}, as {fault}: {remedy}")


def segments(query, key, value, bias, sizes, scaling):
    """Packed rows: query (N, H, d), key, value (N, G, d) are runs of `sizes` tokens → (N, H, d).

    A run of n tokens attends to itself through bias[:, :, :n, :n]; nothing of size (N, N) is made.
    Negative sizes are padding: they cost nothing and come out as zeros. By matrix products, since
    bf16 training on a CPU is 3 times faster so than by sdpa, whose backward pass is slow.
    """
    heads, groups, width = query.shape[1], key.shape[1], query.shape[2]
    lengths = [abs(size) for size in sizes]
    bias = bias[0].to(query.dtype)  # (H, T, T)
    # Runs of one length share a bias, (G, R·n, n).
    masks = {n: bias[:, :n, :n].reshape(groups, -1, n) for n in set(sizes) if n > 0}
    query = (query * scaling).unflatten(1, (groups, heads // groups))  # (N, G, R, d)
    outs = []
    for size, q, k, v in zip(sizes, *(x.split(lengths) for x in (query, key, value)), strict=True):
        if size < 0:
            outs.append(torch.zeros_like(q))
            continue
        q = q.permute(1, 2, 0, 3).reshape(groups, -1, width)  # (G, R·n, d)
        scores = torch.baddbmm(masks[size], q, k.permute(1, 2, 0))  # (G, R·n, n)
        out = scores.softmax(-1, dtype=scores.dtype) @ v.transpose(0, 1)
        outs.append(out.view(groups, -1, size, width).permute(2, 0, 1, 3))  # (n, G, R, d)
    return torch.cat(outs).flatten(1, 2)


def segment_sizes(segment_ids):
    """Lengths of the runs in (B, T) segment ids, row by row; runs of id 0, padding, are negative.

    None if a row has two runs of one id: an example with a gap is not to be cut into runs.
    """
    sizes = []
    for row in segment_ids:
        ids, counts = row.unique_consecutive(return_counts=True)
        examples = ids[ids > 0]
        if len(examples.unique()) < len(examples):
            return None
        sizes += torch.where(ids > 0, counts, -counts).tolist()
    return sizes


def local_heads(bias, n_heads):
    """The heads of a bias that belong to this process where tensor parallelism has split them."""
    if bias is None or bias.shape[1] == n_heads:
        return bias
    first = distributed.get_rank() % (bias.shape[1] // n_heads) * n_heads
    return bias[:, first : first + n_heads]
