"""What callers of the model send: a cache of either name, rows of several examples, odd keywords.

`generate()`, Trainer, TRL, PEFT and accelerate pass many keywords, and not the same in every
version. Each is used, is known to say nothing new, or is refused: an ignored mask or cache would
give wrong numbers without a word.
"""

import inspect
import re

import torch
import torch.nn.functional as F
from transformers import GenerationMixin
from transformers.cache_utils import Cache

# What transformers calls the cache, in its calls and outputs; "past_key_values" before 5.24.
_GENERATION = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _GENERATION else "past_key_values"

TELLING = re.compile("cache|past|mask|bias|position|seq|segment|document|length|state|causal")
KNOWN = "cache, attention_mask, position_ids, segment_ids, seq_idx, cu_seq_lens_q"
HARMLESS = {"cache_position", "is_causal", "max_length_q", "max_length_k", "output_hidden_states"}


def refuse_unknown(keywords):
    """Raise TypeError for a keyword that would change what tokens see; others may be ignored."""
    for name, value in keywords.items():
        if name == "is_causal" and value is False:
            fault = "is_causal=False asks for attention to later tokens, which Step-1 never has"
            raise TypeError(f"{fault}: leave it out")
        if value is not None and name not in HARMLESS and TELLING.search(name):
            fault = f"Step-1 does not know {name!r}, which sounds like a cache, a mask or positions"
            raise TypeError(f"{fault}: it takes {KNOWN}")


def one_cache(cache, past_key_values):
    """The cache, under either name. Raises TypeError for two caches, or for what is none."""
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise TypeError("`cache` and `past_key_values` are two names of one thing: give only one")
    cache = past_key_values if cache is None else cache
    if cache is not None and not isinstance(cache, Cache):
        name = type(cache).__name__
        raise TypeError(f"the cache is a {name}: give a Cache of transformers, as DynamicCache()")
    return cache


def check_mask(mask, first, n_query, n_key):
    """Raise ValueError for a mask (B, K') that does not reach from first key to last query."""
    if mask is None or mask.dim() != 2 or torch.compiler.is_compiling():
        return
    if not first + n_query <= mask.shape[1] <= n_key:
        tokens = f"{mask.shape[1]} tokens, but the cache holds {int(first)} and {n_query} are new"
        raise ValueError(f"attention_mask covers {tokens}: it needs one column for each of them")


def segments(hidden_states, mask, segment_ids, marks, cache, past, by_runs):
    """Segment ids (B, T) if rows hold several examples, else None.

    They are those given, or what `marks` say: the last three inputs of `example_ids`, by name.
    by_runs: rows of one example get ids too. ValueError with a cache, or a mask for each query.
    """
    shape, packed = hidden_states.shape[:2], any(value is not None for value in marks.values())
    if mask is not None and mask.dim() != 2:
        others = segment_ids, marks["seq_idx"], marks["cu_seq_lens"]
        if any(value is not None for value in others):
            fault = "the mask already says which token sees which"
            raise ValueError(f"{fault}: leave out segment_ids and their like")
        return None
    if segment_ids is not None:
        segment_ids = segment_ids if mask is None else segment_ids * (mask != 0)
    elif shape[1] == 1:  # a step of decoding
        return None
    elif torch.compiler.is_compiling():  # no number may be looked at
        segment_ids = example_ids(shape, mask, **marks) if packed and cache is None else None
    elif packed or mask is not None:
        mask = None if mask is None else mask[:, past : past + shape[1]]
        ids = example_ids(shape, mask, **marks)
        segment_ids = ids if by_runs or ids.amax() > 1 else None
    elif by_runs:
        segment_ids = hidden_states.new_ones(shape, dtype=torch.long)
    if segment_ids is not None and cache is not None:
        fault = "several examples in a row cannot be continued with a cache"
        raise ValueError(f"{fault}: give each its own row")
    return segment_ids


def example_ids(shape, mask=None, position_ids=None, seq_idx=None, cu_seq_lens=None):
    """Which example each token is of, in rows of several: (B, T), from 1 on a row, 0 for padding.

    An example begins where any of the inputs says so, as trainers send them: position_ids (B|1, T)
    do not go on by one; seq_idx (B|1, T) or the numbers in mask (B, T) change; cu_seq_lens (N+1,)
    has a boundary in the flattened rows. Padding (mask 0) is passed over, so positions that count
    it, or do not, make one example. Raises ValueError for inputs of another length.
    """
    labels = [x for x in (mask, position_ids, seq_idx) if x is not None]
    if odd := [tuple(x.shape) for x in labels if x.dim() > 2 or x.shape[-1] != shape[1]]:
        inputs = "a mask, position_ids or seq_idx"
        raise ValueError(f"{inputs} of shape {odd[0]} do not fit {tuple(shape)} tokens")
    device = cu_seq_lens.device if not labels else labels[0].device
    slots = torch.arange(shape[1], device=device).expand(shape)
    visible = torch.ones_like(slots, dtype=torch.bool) if mask is None else mask != 0
    latest = slots.where(visible, -1).cummax(-1).values
    previous = F.pad(latest[:, :-1], (1, 0), value=-1)  # the visible token before each, or −1

    def changes(label):
        label = label.expand(shape)
        return label != label.gather(1, previous.clamp(min=0))

    begins = torch.zeros_like(visible)
    for label in (mask, seq_idx):
        if label is not None:
            begins |= changes(label)
    if cu_seq_lens is not None:
        flat = torch.arange(shape[0] * shape[1], device=device).view(shape)
        ends = cu_seq_lens.flatten().to(device, torch.long)
        begins |= changes(torch.bucketize(flat, ends, right=True))
    if position_ids is not None:  # they may count slots, or visible tokens
        begins |= changes(position_ids - slots) & changes(position_ids - visible.cumsum(-1))
    begins &= visible & (previous >= 0)
    return (begins.cumsum(-1) + 1) * visible
