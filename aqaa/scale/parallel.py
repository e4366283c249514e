"""One model on several GPUs: each layer shared by all (tensor parallelism), or layers one GPU after another.

Tensor parallelism runs under torchrun, one process a GPU: `load` leaves it to transformers and the plan in Step1Config;
`shard` cuts a model itself, quantised layers included, which transformers cannot. Either way q, k, v, gate and up are
cut by outputs, o and down by inputs, and two sums over all GPUs a layer put the parts together.
"""

import os

import torch
from torch import distributed, nn

from aqaa.backbone.quantized_linear import QuantizedLinear
from aqaa.files import ModelError
from aqaa.scale import plan

BY_OUTPUT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
BY_INPUT = ("o_proj", "down_proj")


def join(device="cuda"):
    """Meet the other processes that torchrun has started: (rank, ranks, this process' torch.device).

    Raises ModelError without torchrun, with fewer GPUs than processes, or with GPUs of several kinds.
    """
    if "RANK" not in os.environ:
        raise ModelError("several GPUs need a process each: start with `torchrun --nproc-per-node N`.")
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda":
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if local >= len(names):
            raise ModelError(f"process {local} has no GPU of its own, {len(names)} are here: start fewer processes.")
        check_alike(names)
        torch.cuda.set_device(local)
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    return rank, distributed.get_world_size(), torch.device(device, local) if device == "cuda" else torch.device(device)


def check_alike(names):
    """Raise ModelError for GPUs of several kinds: those that share layers wait for the slowest and fit the smallest."""
    if len(kinds := sorted(set(names))) > 1:
        raise ModelError(f"{' and '.join(kinds)} cannot share layers well: choose one kind with CUDA_VISIBLE_DEVICES.")


def check(config, ranks, group=None):
    """Raise ValueError if heads, key-value groups, widths or int4 groups cannot be shared by so many GPUs."""
    plan.check_ranks(plan.Setup("", config, None, ranks, group=group))


def load(folder, ranks, **options):
    """A Step1ForCausalLM of a released or saved folder, shared by `ranks` processes; each reads its part only.

    options go to from_pretrained. This is for transformers' own generate and for training: lm_head is cut here as well,
    and our constrained decoding, which takes rows of it, needs `shard`. Call `join` first. Raises ValueError if the
    sizes do not divide, ModelError where accelerate is not installed.
    """
    from transformers import AutoConfig
    from transformers.distributed import DistributedConfig
    from transformers.utils import is_accelerate_available

    if not is_accelerate_available():
        raise ModelError("to load a model in shares transformers needs accelerate: pip install accelerate.")

    from aqaa.backbone.step1 import Step1ForCausalLM

    check(AutoConfig.from_pretrained(folder), ranks)
    shares = DistributedConfig(tp_size=ranks)
    return Step1ForCausalLM.from_pretrained(folder, distributed_config=shares, **options).eval()


def shard(model, rank, ranks):
    """Cut the decoder layers of a Step1ForCausalLM to the share of `rank`, in place; embedding and lm_head stay whole.

    Layers may be quantised, and may be on `meta`, to be filled later. Each layer's two sums run over the default
    process group. Raises ValueError if the sizes do not divide.
    """
    groups = {part.group for part in model.modules() if isinstance(part, QuantizedLinear) and part.name == "int4"}
    check(model.config, ranks, max(groups, default=None))
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                own = cut(linear, 0 if name in BY_OUTPUT else 1, rank, ranks)
                if name in BY_INPUT:
                    own.register_forward_hook(_sum)
                setattr(part, name, own)
    model.ranks = rank, ranks
    return model


def cut(linear, dim, rank, ranks):
    """The share of a linear layer, quantised or not: its outputs (dim 0) or inputs (dim 1) number rank / ranks."""
    sizes = [linear.in_features, linear.out_features]
    sizes[1 - dim] //= ranks
    if not isinstance(linear, QuantizedLinear):
        own = nn.Linear(*sizes, bias=False, device="meta")
        own.weight = nn.Parameter(_share(linear.weight.detach(), dim, rank, ranks), requires_grad=False)
        return own
    own = type(linear)(*sizes, min(linear.group, sizes[0]), "meta")
    own.qweight = _share(linear.qweight, dim, rank, ranks)
    whole = dim == 1 and linear.scale.shape[1] == 1  # a scale for each output serves all inputs
    own.scale = linear.scale if whole else _share(linear.scale, dim, rank, ranks)
    return own


def _share(tensor, dim, rank, ranks):
    return tensor.chunk(ranks, dim)[rank].clone()


def _sum(layer, inputs, output):
    distributed.all_reduce(output)
    return output


def place(config, memory, weights="bf16", group=None, context=2048):
    """A device_map for from_pretrained: whole layers on GPU 0, then 1, …, each with its part of the cache.

    memory: GiB that may be used on each GPU; these may differ. Raises ModelError if they do not suffice.
    """
    table = memory.table_bytes(config) / memory.GIB
    layer = (memory.linear_bytes(config, weights, group or 128) + memory.norm_bytes(config)) / config.num_hidden_layers
    layer = (layer + context * memory.cache_bytes(config) / config.num_hidden_layers) / memory.GIB
    work = memory.buffer_bytes(config, weights, context, 1) / memory.GIB
    left = [size - work for size in memory]
    left[0], left[-1] = left[0] - table, left[-1] - table
    counts = [max(0, int(size / layer)) for size in left]
    if sum(counts) < config.num_hidden_layers or min(left[0], left[-1]) < 0:
        need = config.num_hidden_layers * layer + 2 * table + len(memory) * work
        raise ModelError(
            f"{weights} weights and a context of {context} ids need {need:.0f} GiB on {len(memory)} GPUs, "
            f"{sum(memory):.0f} GiB are there: add GPUs, or take fewer bits (see `aqaa plan`)."
        )
    where = [gpu for gpu, count in enumerate(counts) for _ in range(count)][: config.num_hidden_layers]
    layers = {f"model.layers.{i}": gpu for i, gpu in enumerate(where)}
    return {"model.embed_tokens": 0, **layers, "model.norm": len(memory) - 1, "lm_head": len(memory) - 1}
