"""One model on several GPUs: each layer shared by all (tensor parallelism), or one layer per GPU.

Tensor parallelism runs under torchrun, one process a GPU: `load` leaves it to transformers; `shard`
cuts a model itself, quantised layers included, which transformers cannot. Either way q, k, v, gate
and up are cut by outputs, o and down by inputs; two sums over all GPUs a layer join the parts."""

import os

import torch
from torch import distributed, nn

from aqaa.backbone import memory
from aqaa.backbone.quantized_linear import QuantizedLinear
from aqaa.files import ModelError
from aqaa.scale import plan

BY_OUTPUT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
BY_INPUT = ("o_proj", "down_proj")


def join(device="cuda"):
    """Meet the processes that torchrun has started: (rank, ranks, this process' torch.device).
    Raises ModelError without torchrun, with fewer GPUs than processes or GPUs of several kinds."""
    if "RANK" not in os.environ:
        raise ModelError("several GPUs need a process each: start with "
                         "`torchrun --nproc-per-node N`.")
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", 0))
    backend, own = "gloo", torch.device(device)
    if device == "cuda":
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if local >= len(names):
            raise ModelError(f"process {local} has no GPU of its own, {len(names)} are here: "
                             "start fewer processes.")
        check_alike(names)
        backend, own = "nccl", torch.device(device, local)
        torch.cuda.set_device(own)
    if not distributed.is_initialized():
        distributed.init_process_group(backend)
    return rank, distributed.get_world_size(), own


def check_alike(names):
    """Raise ModelError for GPUs of several kinds: the slowest and the smallest would rule."""
    if len(kinds := sorted(set(names))) > 1:
        raise ModelError(f"tensor parallelism needs GPUs of one kind, here are "
                         f"{' and '.join(kinds)}: choose with CUDA_VISIBLE_DEVICES.")


def check(config, ranks, group=None):
    """Raise ValueError if `ranks` GPUs cannot share heads, groups, widths or int4 groups."""
    plan.check_ranks(plan.Setup("", config, None, ranks, group=group))


def load(folder, ranks, **options):
    """A Step1ForCausalLM of a folder, shared by `ranks` processes; each reads its part only.

    options go to from_pretrained. For transformers' own generate and for training: lm_head is cut
    as well, and our constrained decoding, which takes rows of it, needs `shard`. Call `join` first.
    Raises ValueError if the sizes do not divide, ModelError where accelerate is not installed."""
    from transformers import AutoConfig
    from transformers.distributed import DistributedConfig
    from transformers.utils import is_accelerate_available

    from aqaa.backbone.step1 import Step1ForCausalLM

    if not is_accelerate_available():
        raise ModelError("to load a model in shares transformers needs accelerate: "
                         "pip install accelerate.")
    check(AutoConfig.from_pretrained(folder), ranks)
    shares = DistributedConfig(tp_size=ranks)
    return Step1ForCausalLM.from_pretrained(folder, distributed_config=shares, **options).eval()


def shard(model, rank, ranks):
    """Cut a Step1ForCausalLM's layers to the share of `rank`, in place; the tables stay whole.
    Layers may be quantised, and on `meta`. Each layer's two sums run over the default process
    group. Raises ValueError if the sizes do not divide."""
    int4 = [m for m in model.modules() if isinstance(m, QuantizedLinear) and m.name == "int4"]
    check(model.config, ranks, max((layer.group for layer in int4), default=None))
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                own = cut(linear, 0 if name in BY_OUTPUT else 1, rank, ranks)
                if name in BY_INPUT:  # each GPU has the products of its inputs only
                    own.register_forward_hook(_all_reduce)
                setattr(part, name, own)
    model.ranks = rank, ranks
    return model


def _all_reduce(layer, inputs, output):
    distributed.all_reduce(output)
    return output


def cut(linear, dim, rank, ranks):
    """The share `rank` of a linear layer, quantised or not: of outputs (dim 0) or inputs (1)."""

    def share(tensor):
        return tensor.chunk(ranks, dim)[rank].clone()

    sizes = [linear.in_features, linear.out_features]
    sizes[1 - dim] //= ranks
    if not isinstance(linear, QuantizedLinear):
        own = nn.Linear(*sizes, bias=False, device="meta")
        own.weight = nn.Parameter(share(linear.weight.detach()), requires_grad=False)
        return own
    own = type(linear)(*sizes, min(linear.group, sizes[0]), "meta")
    own.qweight = share(linear.qweight)
    whole = dim == 1 and linear.scale.shape[1] == 1  # a scale for each output serves all inputs
    own.scale = linear.scale if whole else share(linear.scale)
    return own


def place(config, sizes, weights="bf16", group=None, context=2048):
    """A device_map for from_pretrained: whole layers on GPU 0, then 1, …, each with its cache.
    sizes: GiB to use of each GPU. By hand, as accelerate (which core does without) sees neither
    cache nor prefill buffers. Raises ModelError if they do not suffice."""
    layers = config.num_hidden_layers
    table = memory.table_bytes(config) / memory.GIB
    stack = memory.linear_bytes(config, weights, group or 128) + memory.norm_bytes(config)
    layer = (stack + context * memory.cache_bytes(config)) / layers / memory.GIB
    work = memory.buffer_bytes(config, weights, context, 1) / memory.GIB
    left = [size - work for size in sizes]
    left[0] -= table  # the embedding
    left[-1] -= table  # lm_head
    counts = [max(0, int(size / layer)) for size in left]
    if sum(counts) < layers or min(left[0], left[-1]) < 0:
        need = layers * layer + 2 * table + len(sizes) * work
        raise ModelError(
            f"{weights} weights and a context of {context} ids need {need:.0f} GiB on {len(sizes)} "
            f"GPUs, {sum(sizes):.0f} GiB are there: add GPUs, or take fewer bits (see `aqaa plan`)."
        )
    gpus = [gpu for gpu, count in enumerate(counts) for _ in range(count)][:layers]
    last = len(sizes) - 1
    return {"model.embed_tokens": 0, **{f"model.layers.{i}": gpu for i, gpu in enumerate(gpus)},
            "model.norm": last, "lm_head": last}  # fmt: skip
