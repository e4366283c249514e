"""The decode step's kernels in Triton, each with a twin in plain torch that says what it computes.

Decoding one token reads every weight once, so a kernel is as good as the share of the memory's bandwidth it reaches.
int4 weights are multiplied as they are unpacked: a nibble n at bit 4s of a word, or'ed into the mantissa of 2²³, is the
float 2²³ + n·16ˢ, from which one subtraction leaves (n − 8)·16ˢ exactly. The factor 16ˢ is taken out of the activations
beforehand, which `spread` also sorts by nibble, so that neighbouring threads read neighbouring numbers. All sums are
fp32. Attention reads keys and values once for all heads of a group, in several runs of keys at a time (flash-decoding,
Dao et al. 2023), and makes its bias −slope·√distance in registers, in fp32.

Without a GPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1 before the first import), which the tests do.
"""

from __future__ import annotations  # lets this file be read where there is no triton

import os

import torch

from aqaa.backbone import attention

try:
    import triton
    import triton.language as tl
except ImportError:  # not made for this system
    triton = None

LOW = 5  # nibbles of a word that fit the mantissa of a float where they lie; the upper three are shifted down first
FEW = 8  # rows of activations up to which weights are multiplied as they are unpacked; beyond, unpacking pays once
TILES = {}  # (kernel, outputs, inputs) -> (rows, words, warps) of a program, where `tune` has found what is best
TILE = (8, 128, 1)  # four words a thread in each row: 16-byte loads, and nothing passes through shared memory
CANDIDATES = (TILE, (4, 128, 1), (16, 128, 4), (4, 256, 2), (8, 512, 4))


def _jit(function):
    return triton.jit(function) if triton else function


def usable(device):
    """Whether the kernels can run on tensors of `device`: a GPU with triton, or its interpreter on the CPU."""
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    return triton is not None and (torch.device(device).type == "cuda" or interpreting)


# ---- attention ------------------------------------------------------------------------------------------------------


@_jit
def _attend(
    query, keys, values, slopes, first, part, stat, n_query, size, scale, GROUPS: tl.constexpr, RATIO: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One tile of queries (rows: query · RATIO + head of the group) against one of SPLITS runs of keys."""
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


@_jit
def _combine(part, stat, out, HEADS: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, SPREAD: tl.constexpr):
    """The runs of keys of one query and head put together."""
    at, split, column = tl.program_id(0), tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    top = tl.load(stat + (at * SPLITS + split) * 2)
    total = tl.load(stat + (at * SPLITS + split) * 2 + 1)
    weight = tl.exp(top - tl.max(top, 0))
    heard = tl.load(part + (at * SPLITS + split)[:, None] * WIDTH + column[None, :])
    y = tl.sum(heard * weight[:, None], 0) / tl.sum(total * weight, 0)
    if SPREAD:
        _spread(out + at // HEADS * (HEADS * WIDTH), at % HEADS * WIDTH + column, y, HEADS * WIDTH, column < WIDTH)
    else:
        tl.store(out + at * WIDTH + column, y.to(out.dtype.element_ty))


def attend(query, keys, values, slopes, first, scaling, out=None, splits=None):
    """Causal attention of new queries over a static cache, which holds their own keys already.

    query (B, Q, H, d); keys, values (B, G, S, d), contiguous; slopes (H,) fp32; first: int tensor (1,), the slot of the
    first query. out: None for (B, Q, H, d) in the dtype of the query, or fp32 (B·Q, H·d) to be filled `spread`.
    """
    batch, n_query, heads, width = query.shape
    groups, size = keys.shape[1:3]
    rows = 16 if n_query * heads // groups <= 16 else 64
    splits = splits or (32 if n_query == 1 else 1)  # a single query has too few tiles to fill a GPU
    part = query.new_empty(batch * n_query * heads, splits, width, dtype=torch.float32)
    stat = query.new_empty(batch * n_query * heads, splits, 2, dtype=torch.float32)
    grid = (triton.cdiv(n_query * heads // groups, rows), batch * groups, splits)
    _attend[grid](
        query.contiguous(), keys, values, slopes, first, part, stat, n_query, size, scaling, GROUPS=groups,
        RATIO=heads // groups, WIDTH=width, ROWS=rows, KEYS=32, SPLITS=splits,
    )  # fmt: skip
    spread_out = out is not None
    out = torch.empty_like(query) if out is None else out
    _combine[(len(part),)](part, stat, out, HEADS=heads, WIDTH=width, SPLITS=splits, SPREAD=spread_out)
    return out


def attend_eager(query, keys, values, slopes, first, scaling):
    """The twin of `attend`."""
    past, n_query = int(first), query.shape[1]
    bias = attention.sqrt_bias(slopes, n_query, past + n_query, past)
    keys, values = keys[:, :, : past + n_query], values[:, :, : past + n_query]
    return attention.eager(query.transpose(1, 2), keys, values, bias, scaling)[0].transpose(1, 2)


# ---- products with few rows -----------------------------------------------------------------------------------------


def spread(x):
    """Activations (…, K) as the int4 kernels read them: fp32 (…, K), nibble by nibble, x[8j + i]·16⁻ˢ at i·K/8 + j.

    s is i for the lower LOW nibbles of a word, and i − LOW above them. A multiplication by 16⁻ˢ rounds nothing.
    """
    planes = x.float().unflatten(-1, (-1, 8)).mT  # (…, 8, K/8)
    slot = torch.arange(8, device=x.device)
    return (planes * 16.0 ** -torch.where(slot < LOW, slot, slot - LOW)[:, None]).flatten(-2)


@_jit
def _spread(out, k, y, size, mask):
    """Store y of input k where `spread` puts it."""
    nibble = k % 8
    slot = tl.where(nibble < 5, nibble, nibble - 5)
    factor = ((127 - 4 * slot) << 23).to(tl.float32, bitcast=True)
    tl.store(out + nibble * (size // 8) + k // 8, y * factor, mask=mask)


@_jit
def _code(word, SLOT: tl.constexpr):
    """(nibble SLOT of a word − 8) · 16^SLOT as a float, exactly."""
    bits = (word & (15 << (4 * SLOT))) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) - (8388608.0 + (8 << (4 * SLOT)))


@_jit
def _product(
    words, scale, planes, row, n_rows, SIZE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr
):
    """Rows of W x: (ROWS,) fp32. words int32 (N, SIZE/8), scale (N, SIZE/GROUP), planes (SIZE,) spread."""
    total = tl.zeros((ROWS, UNITS), tl.float32)
    n_words: tl.constexpr = SIZE // 8
    for start in range(0, n_words, UNITS):
        at = start + tl.arange(0, UNITS)
        mask = (row < n_rows)[:, None] & (at < n_words)[None, :]
        where = row[:, None] * n_words + at[None, :]
        word = tl.load(words + where, mask=mask, other=0, eviction_policy="evict_first")
        high = word >> 20
        part = tl.zeros((ROWS, UNITS), tl.float32)
        for i in tl.static_range(5):
            x = tl.load(planes + i * n_words + at, mask=at < n_words, other=0.0)
            part += _code(word, i) * x[None, :]
        for i in tl.static_range(3):
            x = tl.load(planes + (i + 5) * n_words + at, mask=at < n_words, other=0.0)
            part += _code(high, i) * x[None, :]
        step_at = row[:, None] * (SIZE // GROUP) + (at // (GROUP // 8))[None, :]
        total += part * tl.load(scale + step_at, mask=mask, other=0.0).to(tl.float32)
    return tl.sum(total, 1)


@_jit
def _root(squares, parts, eps, SIZE: tl.constexpr, PARTS: tl.constexpr):
    """1 / RMS of x from partial sums of squares (parts,)."""
    column = tl.arange(0, PARTS)
    found = tl.load(squares + column, mask=column < parts, other=0.0)
    return 1.0 / tl.sqrt(tl.sum(found, 0) / SIZE + eps)


@_jit
def _heads(
    words, scale, planes, squares, out, keys, values, first, n_rows, n_out, parts, size, eps,
    SIZE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, PARTS: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """W x. With PARTS x is normalised first; with HEADS rows from n_out on are keys, then values, of the cache."""
    item, row = tl.program_id(1), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    y = _product(words, scale, planes + item * SIZE, row, n_rows, SIZE, GROUP, ROWS, UNITS)
    if PARTS > 0:
        y = y * _root(squares + item * parts, parts, eps, SIZE, PARTS)
    y = y.to(out.dtype.element_ty)
    tl.store(out + item * n_out + row, y, mask=row < n_out)
    if HEADS > 0:
        other = tl.maximum(row - n_out, 0)
        inner, is_value = other % (HEADS * WIDTH), other >= HEADS * WIDTH
        cell = ((item * HEADS + inner // WIDTH) * size + tl.load(first)) * WIDTH + inner % WIDTH
        kept = (row >= n_out) & (row < n_rows)
        tl.store(keys + cell, y, mask=kept & ~is_value)
        tl.store(values + cell, y, mask=kept & is_value)


@_jit
def _gated(
    words, scale, planes, squares, out, n_rows, parts, eps, SIZE: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """silu(gate x) · (up x) of a normalised x, spread; rows of `up` lie behind the n_rows rows of `gate`."""
    item, row = tl.program_id(1), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    planes += item * SIZE
    root = _root(squares + item * parts, parts, eps, SIZE, PARTS)
    gate = _product(words, scale, planes, row, n_rows, SIZE, GROUP, ROWS, UNITS) * root
    words += n_rows * (SIZE // 8)
    scale += n_rows * (SIZE // GROUP)
    up = _product(words, scale, planes, row, n_rows, SIZE, GROUP, ROWS, UNITS) * root
    _spread(out + item * n_rows, row, gate / (1.0 + tl.exp(-gate)) * up, n_rows, row < n_rows)


@_jit
def _added(
    words, scale, planes, hidden, norm, out, squares, n_rows, SIZE: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """hidden += W x; out = hidden · norm, spread; and this program's share of the sum of squares of hidden."""
    item, row = tl.program_id(1), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    y = _product(words, scale, planes + item * SIZE, row, n_rows, SIZE, GROUP, ROWS, UNITS)
    real, at = row < n_rows, hidden + item * n_rows + row
    y += tl.load(at, mask=real, other=0.0)
    tl.store(at, y, mask=real)
    weight = tl.load(norm + row, mask=real, other=0.0).to(tl.float32)
    _spread(out + item * n_rows, row, y * weight, n_rows, real)
    share = tl.sum(tl.where(real, y * y, 0.0), 0)
    tl.store(squares + item * tl.num_programs(0) + tl.program_id(0), share)


@_jit
def _bytes(
    weight, scale, x, out, n_rows, SIZE: tl.constexpr, FP8: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """W x for weights of a byte (int8, or e4m3 as uint8) and a scale for each row."""
    item, row = tl.program_id(1), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, SIZE, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = (row < n_rows)[:, None] & (column < SIZE)[None, :]
        code = tl.load(weight + row[:, None] * SIZE + column[None, :], mask=mask, other=0)
        if FP8:  # moved into the bits of a half, whose exponent counts 8 more: the value · 2⁻⁸
            wide = code.to(tl.int16)
            code = (((wide & 128) << 8) | ((wide & 127) << 7)).to(tl.float16, bitcast=True)
        y = tl.load(x + item * SIZE + column, mask=column < SIZE, other=0.0)
        total += code.to(tl.float32) * y[None, :].to(tl.float32)
    factor = tl.load(scale + row, mask=row < n_rows, other=0.0).to(tl.float32) * (256.0 if FP8 else 1.0)
    y = tl.sum(total, 1) * factor
    tl.store(out + item * n_rows + row, y.to(out.dtype.element_ty), mask=row < n_rows)


@_jit
def _unpack(
    codes, scale, out, n_rows, SIZE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """int4 weights written out: (N, SIZE) in the dtype of `out`."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    byte = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (row < n_rows) & (byte < SIZE // 2)
    code = tl.load(codes + row * (SIZE // 2) + byte, mask=mask, other=0).to(tl.int32)
    step = tl.load(scale + row * (SIZE // GROUP) + byte * 2 // GROUP, mask=mask, other=0.0).to(tl.float32)
    both = tl.join(((code & 15) - 8).to(tl.float32) * step, ((code >> 4) - 8).to(tl.float32) * step)
    k = (tl.program_id(1) * 2 * COLUMNS + tl.arange(0, 2 * COLUMNS))[None, :]
    whole = tl.reshape(both, (ROWS, 2 * COLUMNS)).to(out.dtype.element_ty)
    tl.store(out + row * SIZE + k, whole, mask=(row < n_rows) & (k < SIZE))


# ---- launching ------------------------------------------------------------------------------------------------------


class Rows:
    """int4 weights of one or several Int4Linear with the same inputs, laid one after the other for a single launch.

    The layers given keep working: their buffers become views of what is kept here.
    """

    def __init__(self, *layers):
        if any(fault := [layer for layer in layers if not fits(layer)]):
            raise ValueError(f"{fault[0]} does not fit the kernels: int4 with groups of 16, 32, 64, 128 … is needed")
        self.size, self.group = layers[0].in_features, layers[0].group
        self.rows = sum(layer.out_features for layer in layers)
        self.codes, self.scale = (
            getattr(layers[0], name) if len(layers) == 1 else torch.cat([getattr(layer, name) for layer in layers])
            for name in ("qweight", "scale")
        )
        self.words, sizes = self.codes.view(torch.int32), [layer.out_features for layer in layers]
        for layer, codes, scale in zip(layers, self.codes.split(sizes), self.scale.split(sizes), strict=True):
            layer.qweight, layer.scale = codes, scale

    def options(self, kernel, batch):
        """Keyword arguments of a launch for `batch` rows of activations, and its grid."""
        tile = TILES.get((kernel, self.rows, self.size), TILE)
        count = self.rows // 2 if kernel == "gated" else self.rows
        options = {"SIZE": self.size, "GROUP": self.group, "ROWS": tile[0], "UNITS": tile[1], "num_warps": tile[2]}
        return options, (triton.cdiv(count, tile[0]), batch)


def fits(layer):
    """Whether the int4 kernels can multiply by this layer."""
    return getattr(layer, "name", "") == "int4" and layer.group >= 16 and layer.group & (layer.group - 1) == 0


def product(rows, planes, out, squares=None, eps=0.0, cache=None, first=None):
    """out (B, N) = W x for `planes` (B, K) = spread(x), B ≤ FEW.

    squares (B, P): partial sums of squares that normalise x. cache (keys, values), each (B, G, S, d): out takes the
    first rows, the rest go into slot `first` of keys and values.
    """
    options, grid = rows.options("heads", len(planes))
    keys, values = cache or (out, out)
    groups, size, width = keys.shape[1:] if cache else (0, 0, 1)
    parts = 0 if squares is None else squares.shape[1]
    _heads[grid](
        rows.words, rows.scale, planes, planes if squares is None else squares, out, keys, values, first, rows.rows,
        out.shape[1], parts, size, eps, HEADS=groups, WIDTH=width,
        PARTS=triton.next_power_of_2(parts) if parts else 0, **options,
    )  # fmt: skip
    return out


def gated(rows, planes, squares, eps, out):
    """out (B, N), spread = silu(gate x) · (up x) for `rows` of gate, then up; see `product`."""
    options, grid = rows.options("gated", len(planes))
    parts = squares.shape[1]
    _gated[grid](
        rows.words, rows.scale, planes, squares, out, rows.rows // 2, parts, eps,
        PARTS=triton.next_power_of_2(parts), **options,
    )  # fmt: skip
    return out


def added(rows, planes, hidden, norm, out):
    """hidden (B, N) fp32 += W x; out = spread(hidden · norm); returns the partial sums of squares (B, P) of hidden."""
    options, grid = rows.options("added", len(planes))
    squares = hidden.new_empty(len(planes), grid[0])
    _added[grid](rows.words, rows.scale, planes, hidden, norm, out, squares, rows.rows, **options)
    return squares


def unpack(layer, dtype=torch.bfloat16):
    """W (N, K) of an Int4Linear in `dtype`, as its `dequantized`."""
    n, k = layer.out_features, layer.in_features
    out = torch.empty(n, k, dtype=dtype, device=layer.qweight.device)
    grid = (triton.cdiv(n, 4), triton.cdiv(k // 2, 256))
    _unpack[grid](layer.qweight, layer.scale, out, n, SIZE=k, GROUP=layer.group, ROWS=4, COLUMNS=256)
    return out


def product_bytes(layer, x, out):
    """out (B, N) = W x for an Int8Linear or Fp8Linear and x (B, K), contiguous, B ≤ FEW."""
    _bytes[triton.cdiv(layer.out_features, 4), len(x)](
        layer.qweight, layer.scale, x, out, layer.out_features, SIZE=layer.in_features, FP8=layer.name == "fp8",
        ROWS=4, COLUMNS=512, num_warps=1,
    )  # fmt: skip
    return out
