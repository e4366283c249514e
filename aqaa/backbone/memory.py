"""Bytes that a backbone of a given size takes: weights, cache, buffers."""

from aqaa.files import ModelError

GIB = 2**30
SCALE_BITS = 16  # a bfloat16 scale for each group, or for each output
BITS = {"bf16": 16, "fp8": 8, "int8": 8, "int4": 4}  # of a weight in a linear layer
PREFILL_CHUNK = 512  # ids: a longer question is read in parts, which bounds its buffers


def n_linear(backbone):
    """(weights, outputs) of all linear layers of the decoder, lm_head not among them."""
    width, inner = backbone.hidden_size, backbone.intermediate_size
    shared = width // backbone.num_attention_heads * backbone.num_attention_groups
    weights = 2 * width * width + 2 * width * shared + 3 * width * inner
    outputs = 3 * width + 2 * shared + 2 * inner
    return weights * backbone.num_hidden_layers, outputs * backbone.num_hidden_layers


def linear_bytes(backbone, weights, group=None):
    """Bytes of the decoder's linear layers in a format, scales included."""
    count, outputs = n_linear(backbone)
    scales = 0 if weights == "bf16" else count / group if weights == "int4" else outputs
    return count * BITS[weights] / 8 + scales * SCALE_BITS / 8


def table_bytes(backbone):
    """Bytes of the embedding, and as many of lm_head: both stay bf16."""
    return backbone.vocab_size * backbone.hidden_size * 2


def norm_bytes(backbone):
    return (2 * backbone.num_hidden_layers + 1) * backbone.hidden_size * 2


def resident_bytes(backbone, weights, group=None):
    """Bytes of all weights."""
    return linear_bytes(backbone, weights, group) + 2 * table_bytes(backbone) + norm_bytes(backbone)


def cache_bytes(backbone):
    """Bytes of keys and values of one id, bf16."""
    width = backbone.hidden_size // backbone.num_attention_heads
    return 2 * backbone.num_hidden_layers * backbone.num_attention_groups * width * 2


def buffer_bytes(backbone, weights, context, ranks):
    """Bytes that reading a prompt needs at a time on each GPU: bias and scores of a chunk in fp32, the inner values of
    the feed-forward layer, and one matrix unpacked to bf16 if the weights are packed."""
    chunk = min(PREFILL_CHUNK, context)
    scores = 2 * backbone.num_attention_heads * chunk * context * 4
    inner = 3 * chunk * backbone.intermediate_size * 2
    unpacked = 0 if weights == "bf16" else backbone.intermediate_size * backbone.hidden_size * 2
    return (scores + inner + unpacked) / ranks


def free_bytes(device):
    """Bytes of a GPU that tensors can still take: what is free, and what torch keeps for them."""
    import torch  # `aqaa plan` does without

    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def check_room(config, size, free, weights=None, group=None):
    """Raise ModelError if a cache of `size` ids does not fit `free` bytes; with `weights`, a format, neither do they.

    config: sizes as of BackboneConfig. The message says what would fit.
    """
    def need(weights, size):
        loaded = resident_bytes(config, weights, group or 128) if weights else 0
        return loaded + size * cache_bytes(config) + buffer_bytes(config, weights or "int4", 0, 1)

    if need(weights, size) <= free:
        return
    fitting = [name for name in BITS if weights and need(name, size) <= free]
    ids = int((free - need(weights, 0)) // cache_bytes(config))
    if ids > 1:
        remedy = f"a context of {ids} ids would fit"
    else:
        remedy = f"{fitting[0]} would fit" if fitting else "see `aqaa plan` for what would"
    what = f"{weights} weights and a cache of {size} ids need" if weights else f"a cache of {size} ids needs"
    raise ModelError(f"{what} {need(weights, size) / GIB:.1f} GiB, {free / GIB:.1f} GiB are free: {remedy}.")
