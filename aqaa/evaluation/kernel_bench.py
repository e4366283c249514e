"""Kernels one at a time, at the model's sizes: each against fp64, and how fast each tile reads its
weights."""

import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch

from aqaa.backbone import attention
from aqaa.backbone.quantized_linear import Fp8Linear, Int4Linear, Int8Linear
from aqaa.fast import attention_kernels, triton_kernels
from aqaa.scale.random_model import draw

ROWS = 112  # outputs of a matrix that is checked: rows do not depend on one another
SLOTS = 64  # of a cache that is checked


class Checks:
    """Each kernel with random inputs of a BackboneConfig's widths; a method returns (what it gave,
    fp64, limit).

    Limits are shares of the largest value: ROUGH for results in the dtype of the model, FINE for
    those in fp32.
    """

    def __init__(self, backbone, group, device, dtype):
        self.backbone, self.group, self.device, self.dtype = backbone, group, device, dtype
        self.fine, self.rough = 1e-4, 1e-2 if dtype == torch.bfloat16 else 1e-4
        self.generator = torch.Generator(device).manual_seed(0)
        self.width = backbone.hidden_size // backbone.num_attention_heads

    def noise(self, *shape, dtype=torch.float32):
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype)

    def layer(self, cls=Int4Linear, rows=ROWS, size=None):
        group = self.group if cls is Int4Linear else None
        return draw(cls(size or self.backbone.hidden_size, rows, group, self.device), self.generator)

    def heads(self):
        groups, size = self.backbone.num_attention_groups, self.backbone.hidden_size
        layers = [self.layer(rows=rows) for rows in (ROWS, groups * self.width, groups * self.width)]
        x, norm = self.noise(1, size), 1 + self.noise(size, dtype=self.dtype) / 9
        cache = [torch.zeros(1, groups, SLOTS, self.width, dtype=self.dtype, device=self.device) for _ in range(2)]
        query, first = x.new_empty(1, ROWS, dtype=self.dtype), torch.tensor([5], device=self.device)
        triton_kernels.product(triton_kernels.Rows(*layers), triton_kernels.pack(x, self.group, norm, 1e-5), query, cache, first)
        found = torch.cat([query, *(part[:, :, 5].flatten(1) for part in cache)], 1)
        x = torch.nn.functional.rms_norm(x.double(), (size,), norm.double(), 1e-5)
        return found, torch.cat([x @ layer.dequantized(torch.float64).T for layer in layers], 1), self.rough

    def few(self, batch=5):
        layer, x = self.layer(), self.noise(batch, self.backbone.hidden_size)
        packed, out = triton_kernels.pack(x, self.group), x.new_empty(batch, ROWS)
        triton_kernels.product(triton_kernels.Rows(layer), packed, out)
        return out, x.double() @ layer.dequantized(torch.float64).T, self.fine

    def gated(self):
        gate, up, x = self.layer(), self.layer(), self.noise(1, self.backbone.hidden_size)
        found = triton_kernels.gated(triton_kernels.Rows(gate, up), triton_kernels.pack(x, self.group), x.new_empty(1, ROWS))
        one, two = (x.double() @ layer.dequantized(torch.float64).T for layer in (gate, up))
        return found, torch.nn.functional.silu(one) * two, self.fine

    def added(self):
        size = self.backbone.intermediate_size
        layer, x, stream = self.layer(size=size), self.noise(1, size), self.noise(1, ROWS)
        wanted = stream.double() + x.double() @ layer.dequantized(torch.float64).T
        return triton_kernels.added(triton_kernels.Rows(layer), triton_kernels.pack(x, self.group), stream), wanted, self.fine

    def tiles(self):
        """`added` by every tile that `tune` may choose."""
        key, found = ("added", ROWS, self.backbone.intermediate_size), []
        for tile in triton_kernels.CANDIDATES:
            triton_kernels.TILES[key] = tile
            got, wanted, limit = self.added()
            found.append(got.double() - wanted)
        del triton_kernels.TILES[key]
        return torch.cat(found) + wanted, wanted, limit

    def attend(self, queries=1):
        heads, groups = self.backbone.num_attention_heads, self.backbone.num_attention_groups
        query = self.noise(1, queries, heads, self.width, dtype=self.dtype)
        keys, values = (self.noise(1, groups, SLOTS, self.width, dtype=self.dtype) for _ in range(2))
        slopes, first = attention.slopes(heads).to(self.device), torch.tensor([20], device=self.device)
        out = torch.empty_like(query, dtype=torch.float32)
        attention_kernels.attend(query, keys, values, slopes, first, self.width**-0.5, out)
        wide = (x.double() for x in (query, keys, values, slopes))
        return out, attention_kernels.attend_eager(*wide, first, self.width**-0.5), self.rough

    def prompt(self):
        return self.attend(33)

    def unpack(self):
        layer = self.layer()
        return triton_kernels.unpack(layer, self.dtype), layer.dequantized(self.dtype), 0.0

    def int8(self, cls=Int8Linear):
        layer, x = self.layer(cls), self.noise(2, self.backbone.hidden_size, dtype=self.dtype)
        wanted = x.double() @ layer.dequantized(torch.float64).T
        return triton_kernels.product_bytes(layer, x, x.new_empty(2, ROWS)), wanted, self.rough

    def fp8(self):
        return self.int8(Fp8Linear)


CHECKS = ("heads", "few", "gated", "added", "tiles", "attend", "prompt", "unpack", "int8", "fp8")


def errors(backbone, group, device, dtype):
    """({kernel: largest error as a share of the largest value, or why there is none}, names of
    those that fail)."""
    checks, found, failed = Checks(backbone, group, device, dtype), {}, []
    for name in CHECKS:
        try:
            got, wanted, limit = getattr(checks, name)()
            error = ((got.double() - wanted.double()).abs().max() / wanted.abs().max()).item()
            found[name], good = error if math.isfinite(error) else str(error), error <= limit
        except Exception as fault:  # a kernel that does not compile must not hide the others
            found[name], good = f"{type(fault).__name__}: {fault}"[:300], False
        failed += [] if good else [name]
    return found, failed


def tune(engine, layers, seconds):
    """Sets triton_kernels.TILES for an Engine's int4 kernels → {kernel and size: {"tile",
    "gb_per_s", "tiles": {tile: GB/s}}}.

    layers: how many layers' weights a kernel reads in turn, more than a cache holds.
    seconds(launch, layers) → seconds a layer. Candidates are compiled beforehand, different kernels
    at the same time.
    """
    device, found = engine.device, {}
    heads, out, both, down = engine.fused.layers[0][:4]
    group, stream = heads.group, torch.randn(1, heads.size, device=device)
    x, y = triton_kernels.pack(stream, group), triton_kernels.pack(torch.randn(1, down.size, device=device), group)
    query, inner = stream.to(engine.cache.keys.dtype), torch.empty(1, down.size, device=device)
    kept = engine.cache.keys[0], engine.cache.values[0]
    launches = {  # of a layer's (heads, out, both, down, …)
        ("heads", heads): lambda layer: triton_kernels.product(layer[0], x, query, kept, engine.first),
        ("added", out): lambda layer: triton_kernels.added(layer[1], x, stream),
        ("gated", both): lambda layer: triton_kernels.gated(layer[2], x, inner),
        ("added", down): lambda layer: triton_kernels.added(layer[3], y, stream),
    }
    different = [launch for (_, rows), launch in launches.items() if rows is not down]  # one compilation serves both
    with ThreadPoolExecutor(len(different)) as pool:
        for tile in triton_kernels.CANDIDATES:
            for kernel, rows in launches:
                triton_kernels.TILES[kernel, rows.rows, rows.size] = tile
            with suppress(Exception):  # raised again, and noted, below
                list(pool.map(lambda launch: launch(engine.fused.layers[0]), different))
    for (kernel, rows), launch in launches.items():
        key, size, tiles = (kernel, rows.rows, rows.size), rows.codes.numel() + rows.scale.numel() * 2, {}
        for tile in triton_kernels.CANDIDATES:
            triton_kernels.TILES[key] = tile
            try:
                tiles[tile] = round(size / seconds(launch, engine.fused.layers[:layers]) / 1e9, 1)
            except Exception as fault:  # such as too little shared memory
                found[f"{kernel} {tile}"] = f"{type(fault).__name__}: {fault}"[:300]
        best = triton_kernels.TILES[key] = max(tiles, key=tiles.get, default=triton_kernels.TILE)
        rates = {" ".join(map(str, tile)): rate for tile, rate in tiles.items()}
        found[f"{kernel} {rows.size} to {rows.rows}"] = {"tile": best, "gb_per_s": tiles.get(best), "tiles": rates}
    return found


def others(engine, seconds):
    """Microseconds of the kernels that read no weights, with the context of the engine's cache, and
    of `unpack`."""
    fused, (keys, values) = engine.fused, (engine.cache.keys[0], engine.cache.values[0])
    heads, _, both, down, norm, _ = fused.layers[0]
    stream, inner = (torch.randn(1, rows.size, device=engine.device) for rows in (heads, down))
    query = stream.to(keys.dtype).view(1, 1, -1, engine.width)
    gate = next(part for part in engine.model.modules() if getattr(part, "out_features", 0) == down.size)
    launches = {
        "pack_normed": lambda _: triton_kernels.pack(stream, heads.group, norm, 1e-5),
        "pack_inner": lambda _: triton_kernels.pack(inner, down.group),
        "attend": lambda _: attention_kernels.attend(
            query, keys, values, engine.slopes, engine.first, engine.width**-0.5, stream),
        "unpack_gate": lambda _: triton_kernels.unpack(gate, keys.dtype),
    }  # fmt: skip
    return {name: round(1e6 * seconds(launch, [None] * 8), 2) for name, launch in launches.items()}
