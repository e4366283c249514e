"""Decoding at the speed of memory: a cache that never moves, and a step that a GPU repeats as one CUDA graph.

An Engine stands where backbone.generation has its Decoder, so the loop, the layouts, the sampling and the answers are
those of `generate`; only how a hidden state comes about differs. On a CPU, and with fast=False, that is the readable
way: the modules one after the other, attention by hand. With fast=True attention and quantised layers are the kernels
of aqaa/fast/triton_kernels.py, int4 models take a step of ten kernels a layer, and a GPU records the step as a graph. The
output layer, whose rows depend on the layout's position, stays outside of it, and so do sampling and its seed.
"""

from dataclasses import dataclass
from types import MethodType

import torch
from torch.nn import functional as F

from aqaa.backbone import attention
from aqaa.backbone.generation import Prefill, generate
from aqaa.backbone.memory import check_room, free_bytes
from aqaa.backbone.quantized_linear import QuantizedLinear
from aqaa.fast import attention_kernels, triton_kernels

CHUNK = 1024  # most ids of a prompt that are read together: for each part all weights are unpacked once
WARM_UPS = 2  # steps before a graph is captured: kernels are compiled, libraries start


@dataclass
class Cache:
    """Keys and values (layers, B, G, S, d), and how many of the S slots are filled."""

    keys: torch.Tensor
    values: torch.Tensor
    length: int = 0


class Engine:
    """A Step1ForCausalLM with a static cache of `size` ids (by default its longest context), for one answer at a time.

    fast: use the kernels (by default on a GPU that has triton). Attention's bias is fp32, whatever bias_dtype says.
    Raises ModelError before anything is allocated if the cache does not fit the GPU.
    """

    def __init__(self, model, size=None, fast=None):
        self.model, self.size = model, size or model.config.max_seq_len
        weight, attn = model.model.embed_tokens.weight, model.model.layers[0].self_attn
        self.device, self.width = weight.device, attn.head_dim
        self.fast = self.device.type == "cuda" and triton_kernels.usable(self.device) if fast is None else fast
        if self.device.type == "cuda":
            check_room(model.config, self.size, free_bytes(self.device))
        rank, ranks = getattr(model, "ranks", (0, 1))
        heads = model.config.num_attention_heads // ranks
        shape = (len(model.model.layers), 1, model.config.num_attention_groups // ranks, self.size, self.width)
        self.cache = Cache(weight.new_zeros(shape), weight.new_zeros(shape))
        self.slopes = attention.slopes(model.config.num_attention_heads)[rank * heads :][:heads].to(self.device)
        self.first = torch.zeros(1, dtype=torch.long, device=self.device)  # slot of the first new query
        self.attend = attention_kernels.attend if self.fast else attention_kernels.attend_eager
        for part in model.modules():
            if isinstance(part, QuantizedLinear):
                part.product = linear if self.fast else None
        fused = self.fast and ranks == 1 and all(triton_kernels.fits(part) for part in _linears(model))
        self.fused = Fused(model, self.cache, self.slopes, self.first) if fused else None
        self.graph = None

    @property
    def step(self):
        """x (1, D) of the next id → hidden state (1, D)."""
        return self.fused or MethodType(Engine.run, self)  # made anew: kept, it would be a cycle

    def generate(self, prompt, ids, layout, **options):
        """Steps as of backbone.generation.generate."""
        return generate(self.model, prompt, ids, layout, prefill=self.reader(), **options)

    def reader(self):
        """What `generate` takes as `prefill`, with nothing read yet: the engine's cache is given to a new prompt."""
        return Reader(self)

    @torch.inference_mode()
    def feed(self, embeddings, padding=None):
        """embeddings (1, Q, D) of the next ids → hidden state (1, D) of the last; `padding` is there for batches only.

        Raises ValueError if they do not fit.
        """
        length = self.cache.length + embeddings.shape[1]
        if length > self.size:
            raise ValueError(f"{length} ids do not fit the {self.size} slots of the engine: make it larger.")
        for part in embeddings[0].chunk(-(-embeddings.shape[1] // CHUNK)):  # parts of about one size
            self.first.fill_(self.cache.length)
            hidden = self._one(part) if len(part) == 1 else self.run(part)
            self.cache.length += len(part)
        return hidden

    def run(self, x):
        """The layers, one by one: x (Q, D) of the ids from slot `first` on → (1, D) of the last."""
        slots, row = self.first + torch.arange(len(x), device=self.device), (len(x), -1, self.width)
        for layer, keys, values in zip(self.model.model.layers, self.cache.keys, self.cache.values, strict=True):
            attn, y = layer.self_attn, layer.input_layernorm(x)
            keys[0].index_copy_(1, slots, attn.k_proj(y).view(row).transpose(0, 1))
            values[0].index_copy_(1, slots, attn.v_proj(y).view(row).transpose(0, 1))
            query = attn.q_proj(y).view(1, *row)
            heard = self.attend(query, keys, values, self.slopes, self.first, attn.scaling)
            x = x + attn.o_proj(heard.reshape(len(x), -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.model.model.norm(x[-1:])

    def _one(self, x):
        if not self.fast or self.device.type != "cuda":
            return self.step(x)
        if self.graph is None:
            self._capture(x)
        self.x.copy_(x)
        self.graph.replay()
        return self.hidden.clone()  # the next step overwrites it

    def _capture(self, x):
        """Record the step as a graph that reads self.x and self.first and writes the cache and self.hidden."""
        self.x, self.graph, side = x.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self.step(self.x)
        torch.cuda.current_stream(self.device).wait_stream(side)
        with torch.cuda.graph(self.graph):
            self.hidden = self.step(self.x)


class Reader(Prefill):
    """Prefill over an Engine's cache."""

    def __init__(self, engine):
        self.decoder, self.ids = engine, []


class Fused:
    """The step of an int4 model, x (1, D) → hidden (1, D), ten kernels a layer; the residual stream is fp32.

    Activations are packed by the kernel that also normalises them, wherever a product reads them.
    """

    def __init__(self, model, cache, slopes, first):
        self.cache, self.slopes, self.first, self.layers = cache, slopes, first, []
        for layer in model.model.layers:
            attn, mlp = layer.self_attn, layer.mlp
            packed = (attn.q_proj, attn.k_proj, attn.v_proj), (attn.o_proj,), (mlp.gate_proj, mlp.up_proj)
            rows = [triton_kernels.Rows(*linears) for linears in (*packed, (mlp.down_proj,))]
            self.layers.append((*rows, layer.input_layernorm.weight, layer.post_attention_layernorm.weight))
        self.norm, self.eps = model.model.norm, model.config.rms_norm_eps

    def __call__(self, x):
        stream, width = x.to(torch.float32, copy=True), self.cache.keys.shape[-1]
        query, heard, inner = x.new_empty(1, x.shape[1]), torch.empty_like(stream), None
        for i, (heads, out, both, down, before, middle) in enumerate(self.layers):
            cache = self.cache.keys[i], self.cache.values[i]
            packed = triton_kernels.pack(stream, heads.group, before, self.eps)
            triton_kernels.product(heads, packed, query, cache, self.first)
            shaped = query.view(1, 1, -1, width), *cache, self.slopes, self.first, width**-0.5
            attention_kernels.attend(*shaped, out=heard)
            triton_kernels.added(out, triton_kernels.pack(heard, out.group), stream)
            packed = triton_kernels.pack(stream, both.group, middle, self.eps)
            inner = triton_kernels.gated(both, packed, stream.new_empty(1, down.size) if inner is None else inner)
            triton_kernels.added(down, triton_kernels.pack(inner, down.group), stream)
        return self.norm(stream.to(x.dtype))


def linear(layer, x):
    """x Wᵀ for a QuantizedLinear and x (…, K) by kernels: its `product`; its `forward` without one is their twin.

    Up to FEW (or FEW_BYTES) rows weights are multiplied as they are read; for more they are unpacked once.
    """
    flat, int4 = x.reshape(-1, x.shape[-1]), triton_kernels.fits(layer)
    if not int4 and (layer.name == "int4" or layer.scale.shape[1] > 1):
        return F.linear(x, layer.dequantized(x.dtype))  # groups that the kernels do not know
    if len(flat) <= (triton_kernels.FEW if int4 else triton_kernels.FEW_BYTES):
        out = x.new_empty(len(flat), layer.out_features)
        if int4:
            triton_kernels.product(triton_kernels.Rows(layer), triton_kernels.pack(flat.contiguous(), layer.group), out)
        else:
            triton_kernels.product_bytes(layer, flat.contiguous(), out)
        return out.view(*x.shape[:-1], -1)
    if int4:
        return F.linear(x, triton_kernels.unpack(layer, x.dtype))
    codes = layer.qweight.view(torch.float8_e4m3fn) if layer.name == "fp8" else layer.qweight
    return F.linear(x, codes.to(x.dtype)) * layer.scale[:, 0].to(x.dtype)


def _linears(model):
    return (child for layer in model.model.layers for part in (layer.self_attn, layer.mlp) for child in part.children())
