"""Products of few rows of activations with packed weights in Triton; the twins are plain torch.

Decoding one token reads every weight once, so a kernel must need fewer instructions than a GPU
issues while the bytes arrive (on an H200 about three a weight). int4 weights are multiplied as
integers. `pack` makes activations fixed-point: each run of 32 inputs gets a scale, and each input
DIGITS signed bytes. One mask takes four nibbles out of a word as four bytes, one `dp4a` multiplies
them with four digits and adds the products to an int32: five instructions multiply eight weights by
one digit. Sums of a run are exact; they meet the scales, and one another, in fp32. Two digits keep
an input to 1.5e-5 of the largest in its run (bf16: 2e-3), three to 1.2e-7.

Without a GPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1 before the first import).
"""

from __future__ import annotations  # lets this file be read where there is no triton

import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # not made for this system
    triton = tl = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FEW = 16  # rows of activations up to which weights are multiplied as they are unpacked
FEW_BYTES = 8  # the same for weights of a byte, which every row of activations reads anew
AT_ONCE = 8  # rows of activations that one program multiplies by the weights it reads
SUMS = 32  # outputs times rows of activations of a program: sums that each thread keeps
RUN = 32  # inputs with one scale in packed activations, at most
DIGITS = 2  # bytes of an activation
BLOCK = 32  # runs of packed activations that lie together, a thread each
TILES = {}  # (kernel, outputs, inputs) → (rows, runs, warps, stages) of a program, as `tune` found
TILE = (8, 32, 1, 1)  # a run of 16 bytes a thread in each row: nothing passes through shared memory
CANDIDATES = (TILE, (4, 32, 1, 1), (8, 64, 2, 1), (4, 128, 4, 1), (8, 32, 1, 4), (8, 64, 2, 3))


def jit(function):
    return triton.jit(function) if triton else function


def usable(device):
    """Whether the kernels can run on tensors of `device`: a GPU with triton, or its interpreter."""
    return triton is not None and (torch.device(device).type == "cuda" or INTERPRETED)


_ASM = triton and tl.constexpr(not INTERPRETED)
_BLOCK = triton and tl.constexpr(BLOCK)


@jit
def _pack(x, norm, out, size, eps, NORM: tl.constexpr, WORDS: tl.constexpr, DIGITS: tl.constexpr,
          LIMIT: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """One block of _BLOCK runs of 8 · WORDS inputs of row program_id(1): see `pack`."""
    run = tl.program_id(0) * _BLOCK + tl.arange(0, _BLOCK)
    item, real = tl.program_id(1), run < size // (8 * WORDS)
    x += item * size
    block = item * tl.num_programs(0) + tl.program_id(0)
    out += block * ((2 * WORDS * DIGITS + 2) * _BLOCK) + tl.arange(0, _BLOCK)
    root = 1.0
    if NORM:
        squares = tl.zeros((COLUMNS,), tl.float32)
        for start in range(0, size, COLUMNS):
            at = start + tl.arange(0, COLUMNS)
            value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
            squares += value * value
        root = 1.0 / tl.sqrt(tl.sum(squares, 0) / size + eps)
    half = tl.arange(0, 2 * WORDS)  # the even inputs of word 0, its odd ones, those of word 1, …
    first = run[:, None] * (8 * WORDS) + (half // 2 * 8 + half % 2)[None, :]
    top = tl.zeros((_BLOCK,), tl.float32)
    for i in tl.static_range(4):
        value = tl.load(x + first + 2 * i, mask=real[:, None], other=0.0).to(tl.float32)
        if NORM:
            value *= tl.load(norm + first + 2 * i, mask=real[:, None], other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.max(tl.abs(value), 1))
    factor = LIMIT / tl.maximum(top, 1e-30)
    total = tl.zeros((_BLOCK,), tl.int32)
    for d in tl.static_range(DIGITS):  # the lowest digit first
        plane = tl.zeros((_BLOCK, 2 * WORDS), tl.int32)
        for i in tl.static_range(4):
            value = tl.load(x + first + 2 * i, mask=real[:, None], other=0.0).to(tl.float32)
            if NORM:
                value *= tl.load(norm + first + 2 * i, mask=real[:, None], other=0.0).to(tl.float32)
            code = tl.floor(value * factor[:, None] + 0.5).to(tl.int32)
            if d == 0:
                total += tl.sum(code, 1)
            for _ in tl.static_range(d):
                code = (code + 128) >> 8
            plane |= (code & 255) << (8 * i)
        place = (DIGITS - 1 - d) * 2 * WORDS + half
        tl.store(out[:, None] + place[None, :] * _BLOCK, plane)
    tl.store(out + 2 * WORDS * DIGITS * _BLOCK, -8 * total)
    step = (top / LIMIT * root).to(tl.int32, bitcast=True)
    tl.store(out + (2 * WORDS * DIGITS + 1) * _BLOCK, step)


@jit
def _dot4(nibbles, digits, total):
    """total + four products of a byte of `nibbles`, 0 … 15, and a signed one of `digits`."""
    return tl.inline_asm_elementwise("dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r",
                                     [nibbles, digits, total], tl.int32, is_pure=True, pack=1)


@jit
def _word(word, at, total):
    """total + the products of a word's nibbles with its two planes of digits."""
    total = _dot4(word & 0x0F0F0F0F, tl.load(at)[None, :], total)
    return _dot4((word >> 4) & 0x0F0F0F0F, tl.load(at + _BLOCK)[None, :], total)


@jit
def _matrix(words, scale, x, out, keys, values, first, n_rows, n_out, n_runs, n_items, size,
            KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr,
            BATCH: tl.constexpr, WORDS: tl.constexpr, DIGITS: tl.constexpr, STAGES: tl.constexpr,
            HEADS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """BATCH rows of out from W x. words int32 (N, K/8), scale (N, K/GROUP), x: rows as of `pack`.

    KIND: "heads", out = W x, where with HEADS the rows of W from n_out on are keys, then values, of
    the cache; "added", out += W x, fp32; "gated", silu(gate x) · (up x), where the rows of `up` lie
    behind the n_rows of `gate`, and a program takes them in turns."""
    COUNT: tl.constexpr = ROWS // 2 if KIND == "gated" else ROWS
    SHARE: tl.constexpr = GROUP // (8 * WORDS)
    PLANES: tl.constexpr = 2 * WORDS * DIGITS
    local = tl.arange(0, ROWS)
    row = tl.minimum(tl.program_id(0) * COUNT + local // (ROWS // COUNT), n_rows - 1)
    if KIND == "gated":
        row += local % 2 * n_rows
    size_x = (n_runs + _BLOCK - 1) // _BLOCK * ((PLANES + 2) * _BLOCK)
    words += row[:, None] * (n_runs * WORDS)
    scale += row[:, None] * (n_runs // SHARE)
    sums = (tl.full((ROWS, RUNS), 0, tl.float32),) * BATCH
    for start in tl.range(0, n_runs, RUNS, num_stages=STAGES):
        # Behind the last run weights and scales are zero.
        run = tl.minimum(start + tl.arange(0, RUNS), n_runs - 1)
        spot = start * WORDS + tl.arange(0, RUNS * WORDS)
        whole = (spot < n_runs * WORDS)[None, :]
        spots = words + spot[None, :]
        block = tl.load(spots, mask=whole, other=0, eviction_policy="evict_first")
        lot = start // SHARE + tl.arange(0, RUNS // SHARE)  # a group's scale is loaded once
        step = tl.load(scale + lot[None, :], mask=(lot < n_runs // SHARE)[None, :], other=0.0)
        step = tl.broadcast_to(step[:, :, None], (ROWS, RUNS // SHARE, SHARE))
        step = step.reshape(ROWS, RUNS).to(tl.float32)
        block = tl.reshape(block, (ROWS, RUNS, WORDS // 2, 2))
        more = ()
        for i in tl.static_range(BATCH):
            item = tl.minimum(tl.program_id(1) * BATCH + i, n_items - 1)
            at = x + item * size_x + run // _BLOCK * ((PLANES + 2) * _BLOCK) + run % _BLOCK
            total = tl.full((ROWS, RUNS), 0, tl.int32)
            for d in tl.static_range(DIGITS):
                total <<= 8
                if d == DIGITS - 1:
                    total += tl.load(at + PLANES * _BLOCK)[None, :]
                place = at + (2 * WORDS * d) * _BLOCK
                if not _ASM:  # the interpreter's way, nibble by nibble
                    word, slot = tl.arange(0, WORDS)[:, None], tl.arange(0, 8)[None, :]
                    digit = tl.load(place[:, None, None] + (word * 2 + slot % 2)[None] * _BLOCK)
                    digit = (digit << (24 - slot // 2 * 8)[None]) >> 24
                    nibble = tl.reshape(block, (ROWS, RUNS, WORDS))[:, :, :, None]
                    nibble = (nibble >> (4 * slot)[None, None]) & 15
                    total += tl.sum(tl.reshape(nibble * digit[None], (ROWS, RUNS, 8 * WORDS)), 2)
                elif WORDS == 4:
                    even, odd = tl.split(block)
                    zero, two = tl.split(even)
                    one, three = tl.split(odd)
                    total = _word(zero, place, total)
                    total = _word(one, place + 2 * _BLOCK, total)
                    total = _word(two, place + 4 * _BLOCK, total)
                    total = _word(three, place + 6 * _BLOCK, total)
                else:
                    zero, one = tl.split(tl.reshape(block, (ROWS, RUNS, 2)))
                    total = _word(zero, place, total)
                    total = _word(one, place + 2 * _BLOCK, total)
            factor = tl.load(at + (PLANES + 1) * _BLOCK).to(tl.float32, bitcast=True)
            more += (sums[i] + total.to(tl.float32) * (step * factor[None, :]),)
        sums = more
    place = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    for i in tl.static_range(BATCH):
        item, y = tl.program_id(1) * BATCH + i, tl.sum(sums[i], 1)
        real, target = (place < n_out) & (item < n_items), out + item * n_out + place
        if KIND == "gated":
            gate, up = tl.split(tl.reshape(y, (COUNT, 2)))
            y = gate / (1.0 + tl.exp(-gate)) * up
        if KIND == "added":
            y += tl.load(target, mask=real, other=0.0)
        y = y.to(out.dtype.element_ty)
        tl.store(target, y, mask=real)
        if HEADS > 0:
            other = tl.maximum(place - n_out, 0)
            inner, is_value = other % (HEADS * WIDTH), other >= HEADS * WIDTH
            cell = (item * HEADS + inner // WIDTH) * size + tl.load(first)
            cell = cell * WIDTH + inner % WIDTH
            kept = (place >= n_out) & (place < n_rows) & (item < n_items)
            tl.store(keys + cell, y, mask=kept & ~is_value)
            tl.store(values + cell, y, mask=kept & is_value)


@jit
def _bytes(weight, scale, x, out, n_rows, SIZE: tl.constexpr, FP8: tl.constexpr,
           ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
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
    factor = tl.load(scale + row, mask=row < n_rows, other=0.0).to(tl.float32)
    y = tl.sum(total, 1) * (factor * (256.0 if FP8 else 1.0))
    tl.store(out + item * n_rows + row, y.to(out.dtype.element_ty), mask=row < n_rows)


@jit
def _unpack(words, scale, out, n_rows, SIZE: tl.constexpr, GROUP: tl.constexpr,
            ROWS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """int4 weights written out: (N, SIZE) in out's dtype, WIDE inputs of ROWS rows a program."""
    row = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), n_rows - 1)[:, None].to(tl.int64)
    start = tl.program_id(1) * WIDE
    at, slot = start // 8 + tl.arange(0, WIDE // 8)[None, :], 4 * tl.arange(0, 8)[None, None, :]
    word = tl.load(words + row * (SIZE // 8) + at, mask=at < SIZE // 8, other=0)
    lot = start // GROUP + tl.arange(0, WIDE // GROUP)[None, :]
    step = tl.load(scale + row * (SIZE // GROUP) + lot, mask=lot < SIZE // GROUP, other=0.0)
    code = (((word[:, :, None] >> slot) & 15) - 8).to(tl.float32)
    y = tl.reshape(code, (ROWS, WIDE // GROUP, GROUP)) * step.to(tl.float32)[:, :, None]
    y = tl.reshape(y, (ROWS, WIDE)).to(out.dtype.element_ty)
    k = start + tl.arange(0, WIDE)[None, :]
    tl.store(out + row * SIZE + k, y, mask=k < SIZE)


class Rows:
    """int4 weights of some Int4Linear with the same inputs, one after the other for one launch. The
    layers given keep working: their buffers become views of what is kept here."""

    def __init__(self, *layers):
        if fault := [layer for layer in layers if not fits(layer)]:
            raise ValueError(f"{fault[0]} does not fit the kernels: int4 with groups of 16, 32, "
                             "64, … 1024 is needed")
        self.size, self.group = layers[0].in_features, layers[0].group
        sizes = [layer.out_features for layer in layers]
        self.rows = sum(sizes)
        self.codes, self.scale = layers[0].qweight, layers[0].scale
        if len(layers) > 1:
            self.codes = torch.cat([layer.qweight for layer in layers])
            self.scale = torch.cat([layer.scale for layer in layers])
        self.words = self.codes.view(torch.int32)
        parts = zip(layers, self.codes.split(sizes), self.scale.split(sizes), strict=True)
        for layer, codes, scale in parts:
            layer.qweight, layer.scale = codes, scale

    def multiply(self, kind, x, out, cache=None, first=None):
        """out (B, N) by `_matrix` of a kind, for x = pack(…) of B ≤ FEW rows; returns out. cache
        (keys, values), each (B, G, S, d): takes the rows behind those of out in slot `first`."""
        rows, runs, warps, stages = TILES.get((kind, self.rows, self.size), TILE)
        batch, run = len(x), min(RUN, self.group)
        at_once = min(AT_ONCE, triton.next_power_of_2(batch))
        rows = min(rows, SUMS // at_once)
        keys, values = cache or (out, out)
        groups, size, width = keys.shape[1:] if cache else (0, 0, 1)
        n_rows = self.rows // 2 if kind == "gated" else self.rows
        _matrix[triton.cdiv(self.rows, rows), triton.cdiv(batch, at_once)](
            self.words, self.scale, x, out, keys, values, first, n_rows, out.shape[1],
            self.size // run, batch, size, KIND=kind, GROUP=self.group, ROWS=rows, RUNS=runs,
            BATCH=at_once, WORDS=run // 8, DIGITS=DIGITS, STAGES=stages, HEADS=groups, WIDTH=width,
            num_warps=warps,
        )  # fmt: skip
        return out


def fits(layer):
    """Whether the int4 kernels can multiply by this layer."""
    return getattr(layer, "name", "") == "int4" and layer.group in (16, 32, 64, 128, 256, 512, 1024)


def pack(x, group, norm=None, eps=0.0):
    """Activations (B, K) as the int4 kernels read them: int32 (B, blocks, planes, BLOCK).

    Runs have 32 inputs, or a group's if it is shorter; zeros behind the last. A digit of a word's 8
    inputs fills two planes, of inputs 0, 2, 4, 6 and of 1, 3, 5, 7, lowest byte first, the highest
    digit before the others. The last plane but one holds −8 times a run's sum, which turns nibbles
    into codes, the last its scale, a float. norm (K,): x is divided by its RMS, times `norm`."""
    run, (batch, size) = min(RUN, group), x.shape
    blocks = triton.cdiv(size, run * BLOCK)
    planes = run // 4 * DIGITS + 2
    out = torch.empty(batch, blocks, planes, BLOCK, dtype=torch.int32, device=x.device)
    limit = 127 * 256 + 127 if DIGITS == 2 else 1 << 22
    _pack[blocks, batch](
        x, x if norm is None else norm, out, size, eps, NORM=norm is not None, WORDS=run // 8,
        DIGITS=DIGITS, LIMIT=float(limit), COLUMNS=min(16384, triton.next_power_of_2(size)),
        num_warps=8,
    )  # fmt: skip
    return out


def unpack(layer, dtype=torch.bfloat16):
    """W (N, K) of an Int4Linear in `dtype`, as its `dequantized`."""
    n, k = layer.out_features, layer.in_features
    out = torch.empty(n, k, dtype=dtype, device=layer.qweight.device)
    wide = max(1024, layer.group)
    grid = (triton.cdiv(n, 4), triton.cdiv(k, wide))
    words = layer.qweight.view(torch.int32)
    _unpack[grid](words, layer.scale, out, n, SIZE=k, GROUP=layer.group, ROWS=4, WIDE=wide)
    return out


def product_bytes(layer, x, out):
    """out (B, N) = W x for an Int8Linear or Fp8Linear and x (B, K), contiguous, B ≤ FEW_BYTES."""
    _bytes[triton.cdiv(layer.out_features, 4), len(x)](
        layer.qweight, layer.scale, x, out, layer.out_features, SIZE=layer.in_features,
        FP8=layer.name == "fp8", ROWS=4, COLUMNS=512, num_warps=1,
    )  # fmt: skip
    return out
