"""Attention over a static cache in Triton, with a twin in plain torch that says what it computes.

Keys and values are read once for all heads of a group, in several runs of keys at a time
(flash-decoding, Dao et al. 2023); the bias −slope·√distance is made in registers, in fp32."""

from __future__ import annotations  # lets this file be read where there is no triton

import torch

from aqaa.backbone import attention
from aqaa.fast.triton_kernels import jit, tl, triton


@jit
def _attend(query, keys, values, slopes, first, part, stat, n_query, size, scale,
            GROUPS: tl.constexpr, RATIO: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
            KEYS: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    """One tile of queries (rows: query · RATIO + head of the group), one of SPLITS runs of keys."""
    group, batch = tl.program_id(1) % GROUPS, tl.program_id(1) // GROUPS
    split, past = tl.program_id(2), tl.load(first).to(tl.int32)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    which, head = row // RATIO, group * RATIO + row % RATIO
    real = which < n_query
    column = tl.arange(0, WIDTH)
    at_row = (batch * n_query + which) * (GROUPS * RATIO) + head
    x = tl.load(query + at_row[:, None] * WIDTH + column[None, :], mask=real[:, None], other=0.0)
    slope = tl.load(slopes + head, mask=real, other=0.0)
    place = past + which
    last_row = tl.minimum((tl.program_id(0) * ROWS + ROWS - 1) // RATIO, n_query - 1)
    seen = past + last_row + 1  # keys that some row of this tile sees
    share = tl.cdiv(tl.cdiv(seen, SPLITS), KEYS) * KEYS
    end = tl.minimum(split * share + share, seen)
    offset = (batch * GROUPS + group).to(tl.int64) * size * WIDTH
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(split * share, end, KEYS):
        slot = start + tl.arange(0, KEYS)
        cell = offset + slot[:, None] * WIDTH + column[None, :]
        k = tl.load(keys + cell, mask=slot[:, None] < end, other=0.0)
        distance = place[:, None] - slot[None, :]
        score = tl.dot(x, tl.trans(k), input_precision="ieee") * scale
        score -= slope[:, None] * tl.sqrt(tl.maximum(distance, 0).to(tl.float32))
        score = tl.where((distance >= 0) & (slot[None, :] < end), score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # a row that sees nothing in this run
        weight, fade = tl.exp(score - base[:, None]), tl.exp(top - base)
        v = tl.load(values + cell, mask=slot[:, None] < end, other=0.0)
        out = out * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        total = total * fade + tl.sum(weight, 1)
        top = new
    at_part = at_row * SPLITS + split
    tl.store(part + at_part[:, None] * WIDTH + column[None, :], out, mask=real[:, None])
    tl.store(stat + at_part * 2, top, mask=real)
    tl.store(stat + at_part * 2 + 1, total, mask=real)


@jit
def _combine(part, stat, out, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """The runs of keys of one query and head put together."""
    at, split, column = tl.program_id(0), tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    top = tl.load(stat + (at * SPLITS + split) * 2)
    total = tl.load(stat + (at * SPLITS + split) * 2 + 1)
    weight = tl.exp(top - tl.max(top, 0))
    outs = tl.load(part + (at * SPLITS + split)[:, None] * WIDTH + column[None, :])
    y = tl.sum(outs * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + at * WIDTH + column, y.to(out.dtype.element_ty))


def attend(query, keys, values, slopes, first, scaling, out=None, splits=None):
    """Causal attention of new queries over a static cache, which holds their own keys already.
    query (B, Q, H, d); keys, values (B, G, S, d), contiguous; slopes (H,) fp32; first: int tensor
    (1,), the slot of the first query. out (B, Q, H, d): by default new, in the query's dtype."""
    batch, n_query, heads, width = query.shape
    groups, size = keys.shape[1:3]
    rows = 16 if n_query * heads // groups <= 16 else 64
    splits = splits or (32 if n_query == 1 else 1)  # a single query has too few tiles to fill a GPU
    part = query.new_empty(batch * n_query * heads, splits, width, dtype=torch.float32)
    stat = query.new_empty(batch * n_query * heads, splits, 2, dtype=torch.float32)
    grid = (triton.cdiv(n_query * heads // groups, rows), batch * groups, splits)
    _attend[grid](
        query.contiguous(), keys, values, slopes, first, part, stat, n_query, size, scaling,
        GROUPS=groups, RATIO=heads // groups, WIDTH=width, ROWS=rows, KEYS=32, SPLITS=splits,
    )  # fmt: skip
    out = torch.empty_like(query) if out is None else out
    _combine[(len(part),)](part, stat, out, WIDTH=width, SPLITS=splits)
    return out


def attend_eager(query, keys, values, slopes, first, scaling):
    """The twin of `attend`."""
    past, n_query = int(first), query.shape[1]
    bias = attention.sqrt_bias(slopes, n_query, past + n_query, past)
    keys, values = keys[:, :, : past + n_query], values[:, :, : past + n_query]
    return attention.eager(query.transpose(1, 2), keys, values, bias, scaling)[0].transpose(1, 2)
