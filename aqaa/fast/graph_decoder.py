"""Decoding at the speed of memory: a cache that never moves, a step that is one CUDA graph.

An Engine stands where backbone.generation has its Decoder, so loop, layouts and sampling are those
of `generate`. With fast=True attention and quantised layers are Triton kernels, int4 models take a
step of ten kernels a layer, and a GPU records the step as a graph. The output layer, whose rows
depend on the layout's position, stays outside of it, and so does sampling."""

import torch
from torch.nn import functional as F

from aqaa.backbone import attention
from aqaa.backbone.generation import KVCache, Prefill, generate
from aqaa.backbone.memory import check_room, free_bytes
from aqaa.backbone.quantized_linear import QuantizedLinear
from aqaa.fast import attention_kernels, triton_kernels

# Most ids of a prompt that are read together: for each part all weights are unpacked once. Not the
# planner's PREFILL_CHUNK, which bounds the scores (H, Q, K) of an attention that writes them out.
CHUNK = 1024
WARM_UPS = 2  # steps before a graph is captured: kernels are compiled, libraries start


class StaticCache(KVCache):
    """A KVCache for one answer, always seen whole: a tensor says where, so a graph can repeat it.
    kernel: of attention_kernels; slopes (H,); first: int tensor (1,), slot of the first query."""

    def __init__(self, model, size, kernel, slopes, first):
        super().__init__(model, 1, size)
        self.kernel, self.slopes, self.first = kernel, slopes, first
        self.slots = first  # of all new queries

    def update(self, key, value, layer):
        """Write (1, G, Q, d) into `slots`; returns all slots, (1, G, S, d)."""
        keys, values = self.keys[layer], self.values[layer]
        return keys.index_copy_(2, self.slots, key), values.index_copy_(2, self.slots, value)

    def attend(self, query, keys, values, scaling):
        """query (1, H, Q, d) → (1, H, Q, d)."""
        query = query.transpose(1, 2)
        return self.kernel(query, keys, values, self.slopes, self.first, scaling).transpose(1, 2)


class Engine:
    """A Step1ForCausalLM with a static cache of `size` ids, for one answer at a time. size: by
    default the longest context. fast: use the kernels (by default on a GPU with triton). Raises
    ModelError before anything is allocated if the cache does not fit the GPU."""

    def __init__(self, model, size=None, fast=None):
        self.model, self.size = model, size or model.config.max_seq_len
        self.device = model.model.embed_tokens.weight.device
        on_gpu = self.device.type == "cuda"
        self.fast = on_gpu and triton_kernels.usable(self.device) if fast is None else fast
        if on_gpu:
            check_room(model.config, self.size, free_bytes(self.device))
        rank, ranks = getattr(model, "ranks", (0, 1))  # of GPUs that share the heads of a layer
        heads = attention.slopes(model.config.num_attention_heads).chunk(ranks)
        self.slopes = heads[rank].to(self.device)
        self.first = torch.zeros(1, dtype=torch.long, device=self.device)
        kernel = attention_kernels.attend if self.fast else attention_kernels.attend_eager
        self.cache = StaticCache(model, self.size, kernel, self.slopes, self.first)
        for part in model.modules():
            if isinstance(part, QuantizedLinear):
                part.product = linear if self.fast else None
        blocks = (part for layer in model.model.layers for part in (layer.self_attn, layer.mlp))
        packed = all(triton_kernels.fits(child) for part in blocks for child in part.children())
        self.fused = Fused(model, self.cache) if self.fast and packed and ranks == 1 else None
        self.graph = None

    @property
    def step(self):
        """x (1, D) of the next id → hidden state (1, D)."""
        return self.fused or self.run

    def generate(self, prompt, ids, layout, **options):
        """Steps as of backbone.generation.generate."""
        return generate(self.model, prompt, ids, layout, prefill=self.reader(), **options)

    def reader(self):
        """A Prefill with nothing read yet: the engine's cache is given to a new prompt."""
        return Prefill(self.model, self.size, self)

    @torch.inference_mode()
    def feed(self, embeddings, padding=None):
        """embeddings (1, Q, D) of the next ids → hidden (1, D) of the last; padding: of batches.
        Raises ValueError if the ids do not fit."""
        length = self.cache.length + embeddings.shape[1]
        if length > (size := self.size):
            raise ValueError(f"{length} ids do not fit the {size} slots of the engine: make it "
                             "larger.")
        for part in embeddings[0].chunk(-(-embeddings.shape[1] // CHUNK)):  # of about one size
            self.first.fill_(self.cache.length)
            hidden = self._one(part) if len(part) == 1 else self.run(part)
            self.cache.length += len(part)
        return hidden

    def run(self, x):
        """The layers as they are: x (Q, D) of the ids from slot `first` on → (1, D) of the last."""
        self.cache.slots = self.first + torch.arange(len(x), device=self.device)
        return self.model.model.run(x[None], None, self.cache)[0, -1:]

    def _one(self, x):
        if not self.fast or self.device.type != "cuda":
            return self.step(x)
        if self.graph is None:
            self._capture(x)
        self.x.copy_(x)
        self.graph.replay()
        return self.hidden.clone()  # the next step overwrites it

    def _capture(self, x):
        """Record the step as a graph that reads self.x and self.first and writes self.hidden."""
        self.x, self.graph, side = x.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self.step(self.x)
        torch.cuda.current_stream(self.device).wait_stream(side)
        with torch.cuda.graph(self.graph):
            self.hidden = self.step(self.x)


class Fused:
    """The step of an int4 model, x (1, D) → hidden (1, D), in ten kernels a layer."""

    def __init__(self, model, cache):
        self.cache, self.layers = cache, []
        for layer in model.model.layers:
            attn, mlp = layer.self_attn, layer.mlp
            together = ((attn.q_proj, attn.k_proj, attn.v_proj), (attn.o_proj,),
                        (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,))  # fmt: skip
            rows = [triton_kernels.Rows(*linears) for linears in together]
            norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
            self.layers.append((*rows, *norms))
        self.norm, self.eps = model.model.norm, model.config.rms_norm_eps

    def __call__(self, x):
        cache, pack = self.cache, triton_kernels.pack
        stream, width = x.to(torch.float32, copy=True), cache.keys.shape[-1]  # (1, D), residual
        query, out, inner = x.new_empty(1, x.shape[1]), torch.empty_like(stream), None
        layers = zip(self.layers, cache.keys, cache.values, strict=True)
        for (heads, output, both, down, before, middle), keys, values in layers:
            packed = pack(stream, heads.group, before, self.eps)  # normalises as well
            heads.multiply("heads", packed, query, (keys, values), cache.first)
            inputs = query.view(1, 1, -1, width), keys, values, cache.slopes, cache.first
            attention_kernels.attend(*inputs, width**-0.5, out)
            output.multiply("added", pack(out, output.group), stream)
            packed = pack(stream, both.group, middle, self.eps)
            inner = stream.new_empty(1, down.size) if inner is None else inner
            both.multiply("gated", packed, inner)
            down.multiply("added", pack(inner, down.group), stream)
        return self.norm(stream.to(x.dtype))


def linear(layer, x):
    """x Wᵀ for a QuantizedLinear and x (…, K) by kernels: its `product`; `forward` is the twin."""
    int4 = triton_kernels.fits(layer)
    if not int4 and (layer.name == "int4" or layer.scale.shape[1] > 1):
        return F.linear(x, layer.dequantized(x.dtype))  # groups that the kernels do not know
    flat = x.reshape(-1, x.shape[-1]).contiguous()  # (B, K)
    few = triton_kernels.FEW if int4 else triton_kernels.FEW_BYTES
    if len(flat) <= few:  # multiplied as they are read; else unpacked once
        out = x.new_empty(len(flat), layer.out_features)
        if int4:
            packed = triton_kernels.pack(flat, layer.group)
            triton_kernels.Rows(layer).multiply("heads", packed, out)
        else:
            triton_kernels.product_bytes(layer, flat, out)
        return out.view(*x.shape[:-1], -1)
    if int4:
        return F.linear(x, triton_kernels.unpack(layer, x.dtype))
    codes = layer.qweight.view(torch.float8_e4m3fn) if layer.name == "fp8" else layer.qweight
    return F.linear(x, codes.to(x.dtype)) * layer.scale[:, 0].to(x.dtype)
