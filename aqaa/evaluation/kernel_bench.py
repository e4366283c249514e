"""Kernels one at a time, at the model's sizes: each against fp64, and how fast tiles read."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch
from torch.nn import functional as F

from aqaa.backbone import attention
from aqaa.backbone.quantized_linear import Fp8Linear, Int4Linear, Int8Linear
from aqaa.fast import attention_kernels
from aqaa.fast import triton_kernels as kernels
from aqaa.scale.random_model import draw

ROWS = 112  # outputs of a matrix that is checked: rows do not depend on one another
SLOTS = 64  # of a cache that is checked
CHECKS = ("heads", "few", "gated", "added", "tiles", "attend", "prompt", "unpack", "int8", "fp8")
OTHERS = {"prompt": ("attend", 33), "fp8": ("int8", Fp8Linear)}  # the same method for other inputs


class Checks:
    """Each kernel with random inputs of a BackboneConfig's widths: (result, fp64, limit). Limits
    are shares of the largest value: `rough` in the dtype of the model, `fine` in fp32."""

    def __init__(self, backbone, group, device, dtype):
        self.backbone, self.group, self.device, self.dtype = backbone, group, device, dtype
        self.fine, self.rough = 1e-4, 1e-2 if dtype == torch.bfloat16 else 1e-4
        self.generator = torch.Generator(device).manual_seed(0)
        self.size, self.inner = backbone.hidden_size, backbone.intermediate_size
        self.width = self.size // backbone.num_attention_heads

    def noise(self, *shape, dtype=torch.float32):
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype)

    def layer(self, cls=Int4Linear, rows=ROWS, size=None):
        group = self.group if cls is Int4Linear else None
        return draw(cls(size or self.size, rows, group, self.device), self.generator)

    def pack(self, x, *norm):
        return kernels.pack(x, self.group, *norm)

    def heads(self):
        groups = self.backbone.num_attention_groups
        rows = (ROWS, groups * self.width, groups * self.width)
        layers = [self.layer(rows=count) for count in rows]
        x, norm = self.noise(1, self.size), 1 + self.noise(self.size, dtype=self.dtype) / 9
        shape = (1, groups, SLOTS, self.width)
        cache = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2)]
        query, first = x.new_empty(1, ROWS, dtype=self.dtype), torch.tensor([5], device=self.device)
        packed = self.pack(x, norm, 1e-5)
        kernels.Rows(*layers).multiply("heads", packed, query, cache, first)
        result = torch.cat([query, *(part[:, :, 5].flatten(1) for part in cache)], 1)
        x = F.rms_norm(x.double(), (self.size,), norm.double(), 1e-5)
        return result, torch.cat([exact(layer, x) for layer in layers], 1), self.rough

    def few(self, batch=5):
        layer, x = self.layer(), self.noise(batch, self.size)
        out = x.new_empty(batch, ROWS)
        kernels.Rows(layer).multiply("heads", self.pack(x), out)
        return out, exact(layer, x), self.fine

    def gated(self):
        gate, up, x = self.layer(), self.layer(), self.noise(1, self.size)
        result = kernels.Rows(gate, up).multiply("gated", self.pack(x), x.new_empty(1, ROWS))
        return result, F.silu(exact(gate, x)) * exact(up, x), self.fine

    def added(self):
        layer = self.layer(size=self.inner)
        x, stream = self.noise(1, self.inner), self.noise(1, ROWS)
        wanted = stream.double() + exact(layer, x)  # before the kernel adds to the stream in place
        result = kernels.Rows(layer).multiply("added", self.pack(x), stream)
        return result, wanted, self.fine

    def tiles(self):
        """`added` by every tile that `tune` may choose."""
        key, errors = ("added", ROWS, self.inner), []
        for tile in kernels.CANDIDATES:
            kernels.TILES[key] = tile
            result, wanted, limit = self.added()
            errors.append(result.double() - wanted)
        del kernels.TILES[key]
        return torch.cat(errors) + wanted, wanted, limit

    def attend(self, queries=1):
        heads, groups = self.backbone.num_attention_heads, self.backbone.num_attention_groups
        query = self.noise(1, queries, heads, self.width, dtype=self.dtype)
        shape = (1, groups, SLOTS, self.width)
        keys, values = (self.noise(*shape, dtype=self.dtype) for _ in range(2))
        slopes = attention.slopes(heads).to(self.device)
        first = torch.tensor([20], device=self.device)
        out, scale = torch.empty_like(query, dtype=torch.float32), self.width**-0.5
        attention_kernels.attend(query, keys, values, slopes, first, scale, out)
        wide = (x.double() for x in (query, keys, values, slopes))
        return out, attention_kernels.attend_eager(*wide, first, scale), self.rough

    def unpack(self):
        layer = self.layer()
        return kernels.unpack(layer, self.dtype), layer.dequantized(self.dtype), 0.0

    def int8(self, cls=Int8Linear):
        layer, x = self.layer(cls), self.noise(2, self.size, dtype=self.dtype)
        result = kernels.product_bytes(layer, x, x.new_empty(2, ROWS))
        return result, exact(layer, x), self.rough


def exact(layer, x):
    """x Wᵀ of a quantised layer in fp64."""
    return x.double() @ layer.dequantized(torch.float64).T


def errors(backbone, group, device, dtype):
    """({kernel: largest error over the largest value, or its fault}, names of those that fail)."""
    checks, shares, failed = Checks(backbone, group, device, dtype), {}, []
    for name in CHECKS:
        method, *options = OTHERS.get(name, (name,))
        try:
            result, wanted, limit = getattr(checks, method)(*options)
            error = (result.double() - wanted.double()).abs().max() / wanted.abs().max()
            shares[name] = error.item() if error.isfinite() else str(error.item())
            good = error <= limit
        except Exception as fault:  # a kernel that does not compile must not hide the others
            shares[name], good = _fault(fault), False
        failed += [] if good else [name]
    return shares, failed


def _fault(fault):
    return f"{type(fault).__name__}: {fault}"[:300]


def tune(engine, layers, seconds):
    """Sets TILES of the kernels for an Engine's int4 layers -> {kernel and size: a dict of tile,
    gb_per_s and tiles {tile: GB/s}}. layers: whose weights a kernel reads in turn, more than a
    cache holds. seconds(launch, layers) -> seconds a layer."""
    device, stack = engine.device, engine.fused.layers
    heads, out, both, down = stack[0][:4]
    stream, inner = (torch.randn(1, rows.size, device=device) for rows in (heads, down))
    x, y = (kernels.pack(noise, heads.group) for noise in (stream, inner))
    query = stream.to(engine.cache.keys.dtype)
    slots = engine.cache.keys[0], engine.cache.values[0]
    launches = {  # of a layer's (heads, out, both, down, ...)
        ("heads", heads): lambda layer: layer[0].multiply("heads", x, query, slots, engine.first),
        ("added", out): lambda layer: layer[1].multiply("added", x, stream),
        ("gated", both): lambda layer: layer[2].multiply("gated", x, inner),
        ("added", down): lambda layer: layer[3].multiply("added", y, stream),
    }
    # Compiled beforehand, different kernels at once. One compilation serves `out` and `down`.
    different = [launch for (_, rows), launch in launches.items() if rows is not down]
    with ThreadPoolExecutor(len(different)) as pool:
        for tile in kernels.CANDIDATES:
            for kernel, rows in launches:
                kernels.TILES[kernel, rows.rows, rows.size] = tile
            with suppress(Exception):  # raised again, and noted, below
                list(pool.map(lambda launch: launch(stack[0]), different))
    results = {}
    for (kernel, rows), launch in launches.items():
        key, size = (kernel, rows.rows, rows.size), rows.codes.numel() + rows.scale.numel() * 2
        rates = {}
        for tile in kernels.CANDIDATES:
            kernels.TILES[key] = tile
            try:
                rates[tile] = round(size / seconds(launch, stack[:layers]) / 1e9, 1)
            except Exception as fault:  # such as too little shared memory
                results[f"{kernel} {tile}"] = _fault(fault)
        best = kernels.TILES[key] = max(rates, key=rates.get, default=kernels.TILE)
        named = {" ".join(map(str, tile)): rate for tile, rate in rates.items()}
        name, top = f"{kernel} {rows.size} to {rows.rows}", rates.get(best)
        results[name] = {"tile": best, "gb_per_s": top, "tiles": named}
    return results


def others(engine, seconds):
    """Microseconds of kernels that read no weights, with the engine's context, and of `unpack`."""
    keys, values = engine.cache.keys[0], engine.cache.values[0]
    heads, _, _, down, norm, _ = engine.fused.layers[0]
    stream, inner = (torch.randn(1, rows.size, device=engine.device) for rows in (heads, down))
    width, parts = keys.shape[-1], engine.model.modules()
    query, scale = stream.to(keys.dtype).view(1, 1, -1, width), width**-0.5
    gate = next(part for part in parts if getattr(part, "out_features", 0) == down.size)
    context = (query, keys, values, engine.slopes, engine.first, scale, stream)
    launches = {
        "pack_normed": lambda _: kernels.pack(stream, heads.group, norm, 1e-5),
        "pack_inner": lambda _: kernels.pack(inner, down.group),
        "attend": lambda _: attention_kernels.attend(*context),
        "unpack_gate": lambda _: kernels.unpack(gate, keys.dtype),
    }
    times = {name: seconds(launch, [None] * 8) for name, launch in launches.items()}
    return {name: round(1e6 * each, 2) for name, each in times.items()}
