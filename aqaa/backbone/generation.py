"""Streaming decoding under the rules of an answer layout: only legal ids are ever scored, drawn, or produced.

The layout's machine (aqaa.tokenizers.interleave) is handed in; before each step it says which rows of the vocabulary
are legal, and only those rows of the output layer are computed.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from aqaa.backbone import attention

HEAD = 64  # ids among which the top_p head is looked for first: sorting them all is slower


class Step(NamedTuple):
    """One id of an answer; logprob is its natural log probability among the legal ids, before temperature and top_p."""

    id: int
    kind: str  # "text", "linguistic", "semantic", "marker"
    logprob: float


@dataclass(frozen=True)
class Repetition:
    """Repetition-aware sampling (Step-Audio's TTS script): the last id is banned once it crowds the last few.

    It is banned if it occurs more than share · window times among the last `window` ids, prompt included. With `kinds`
    only ids of the kind about to come are counted, and only for those kinds: runs of one audio id can be silence.
    """

    window: int = 10
    share: float = 0.1
    kinds: tuple = ()  # () : the official rule, over all ids alike

    def banned(self, history, may):
        """The id that may not come next, or None. history: ids so far; may: what the machine allows."""
        if self.kinds:
            if may.kind not in self.kinds:
                return None
            history = [token for token in history[-4 * self.window :] if may.start <= token < may.stop]
        recent = history[-self.window :]
        return recent[-1] if recent and recent.count(recent[-1]) > self.share * self.window else None


class KVCache:
    """Keys and values of all layers in tensors made once: (layers, B, G, S, D), filled from the left.

    Has the one method that the attention layers call on a transformers cache.
    """

    def __init__(self, model, batch, size):
        config, weight = model.config, model.model.embed_tokens.weight
        width = config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, batch, config.num_attention_groups, size, width)
        self.keys, self.values = weight.new_zeros(shape), weight.new_zeros(shape)
        self.length = 0

    def update(self, key, value, layer):
        """Write (B, G, Q, D) at the end; return all keys and values so far. The owner moves `length` on."""
        end = self.length + key.shape[2]
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.length : end], values[:, :, self.length : end] = key, value
        return keys[:, :, :end], values[:, :, :end]

    def keep(self, rows):
        """Go on with some rows of the batch only."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


class Decoder:
    """A model, its cache, and the distance bias of a single query, of which each step takes a slice.

    hidden = decoder.feed(embeddings (B, Q, D)) returns the last hidden state (B, D). padding: (B, Q) bool of the first
    call, True where a row of left padding holds no token.
    """

    def __init__(self, model, batch, size):
        self.model, self.size = model, size
        self.cache = KVCache(model, batch, size)
        self.row = model.model.bias(1, size, size - 1)  # (1, H, 1, S)
        self.padding = None
        self.by_hand = batch == 1 and _is_plain(model.model)

    def feed(self, embeddings, padding=None):
        n_query, past = embeddings.shape[1], self.cache.length
        n_key = past + n_query
        if n_query == 1 and self.by_hand:
            return _single(self.model.model, embeddings[0, 0], self.row[..., self.size - n_key :], self.cache)
        if n_query == 1:
            bias = self.row[..., self.size - n_key :]
        else:
            bias = self.model.model.bias(n_query, n_key, past)
        if padding is not None and padding.any():
            self.padding = F.pad(~padding, (0, self.size - n_key), value=True)  # (B, S): True = may be seen
        if self.padding is not None:
            bias = attention.with_mask(bias, self.padding[:, :n_key])
        hidden = self.model.model.run(embeddings, bias, self.cache)
        self.cache.length = n_key
        return hidden[:, -1]

    def keep(self, rows):
        """Go on with some rows of the batch only."""
        self.cache.keep(rows)
        if self.padding is not None:
            self.padding = self.padding[rows]


class Prefill:
    """A prompt that is read while it grows, so that an answer can begin as soon as it ends: see `generate`.

    room: ids of the longest prompt and its answer together; the cache is made for them at once. `ids` are those whose
    keys and values stand in the cache: they are recorded only after they were fed, so whatever interrupts a reading
    (Ctrl-C, no memory) costs time and changes no answer.
    """

    def __init__(self, model, room):
        self.decoder, self.ids = Decoder(model, 1, min(room, model.config.max_seq_len)), []

    @torch.inference_mode()
    def read(self, ids):
        """Run what is new in `ids`, a later form of the prompt. Raises ValueError if they leave no room."""
        room_for(self.decoder.size, len(ids), 0)
        new, embed = ids[self.rewind(ids) :], self.decoder.model.model.embed_tokens
        self.decoder.feed(embed(torch.tensor([new], device=embed.weight.device)))
        self.ids = list(ids)

    def known(self, ids):
        """How many of the ids, from the first on, need not be run; the last one always must."""
        limit = min(len(self.ids), len(ids) - 1)
        return next((i for i in range(limit) if self.ids[i] != ids[i]), limit)

    def rewind(self, ids):
        """Forget what differs from `ids`; returns the number of those known. Feed the others next, then record them."""
        known = self.known(ids)
        self.ids = self.ids[:known]  # first: from here on the rest of the cache may be overwritten
        self.decoder.cache.length = known
        return known


def _is_plain(model):
    """Whether `_single` may stand in for the modules: a CPU, fp32 or fp64, and nothing but ordinary linear layers."""
    weight = model.embed_tokens.weight
    parts = (part for layer in model.layers for part in (layer.self_attn, layer.mlp))
    linear = all(type(child) is nn.Linear for part in parts for child in part.children())
    return linear and weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)


def _single(model, x, bias, cache):
    """Step1Model.run for one token x (D,) on a CPU, without modules in between: 1.5 times as fast. Returns (1, D)."""
    config, at, size = model.config, cache.length, x.shape[0]
    heads, groups, eps = config.num_attention_heads, config.num_attention_groups, config.rms_norm_eps
    width = size // heads
    grouped, one = (1, groups, heads // groups, width), (groups, width)
    bias = bias.to(x.dtype).reshape(1, groups, heads // groups, -1)
    for layer, keys, values in zip(model.layers, cache.keys, cache.values, strict=True):
        attn, mlp = layer.self_attn, layer.mlp
        y = x * torch.rsqrt(torch.dot(x, x) / size + eps) * layer.input_layernorm.weight
        keys[0, :, at] = F.linear(y, attn.k_proj.weight).view(one)
        values[0, :, at] = F.linear(y, attn.v_proj.weight).view(one)
        query, seen = F.linear(y, attn.q_proj.weight).view(grouped), slice(0, at + 1)
        heard = F.scaled_dot_product_attention(query, keys[:, :, seen], values[:, :, seen], bias, scale=attn.scaling)
        x = x + F.linear(heard.view(size), attn.o_proj.weight)
        y = x * torch.rsqrt(torch.dot(x, x) / size + eps) * layer.post_attention_layernorm.weight
        gated = F.silu(F.linear(y, mlp.gate_proj.weight)) * F.linear(y, mlp.up_proj.weight)
        x = x + F.linear(gated, mlp.down_proj.weight)
    cache.length = at + 1
    return model.norm(x)[None]


class Vocabulary:
    """The legal rows of the output layer for each thing that a machine allows; rows and ids are looked up once."""

    def __init__(self, model):
        self.model, self.known = model, {}

    def legal(self, may):
        """Ids (R,) that may come next."""
        key = may[1:4]
        if key not in self.known:
            device = self.model.lm_head.weight.device
            markers = torch.tensor(may.markers, dtype=torch.long, device=device)
            self.known[key] = torch.cat([torch.arange(may.start, may.stop, device=device), markers]), markers
        return self.known[key][0]

    def scores(self, hidden, may):
        """Logits (…, R) fp32 of the legal ids, in their order. hidden (…, D)."""
        self.legal(may)
        markers = self.known[may[1:4]][1]
        parts = [self.model.logits(hidden, rows=slice(may.start, may.stop))] if may.stop > may.start else []
        if len(markers):
            parts.append(self.model.logits(hidden, rows=markers))
        return (torch.cat(parts, -1) if len(parts) > 1 else parts[0]).float()


def _choose(scores, temperature, top_p, generator):
    """Index drawn from scores (R,): the largest if temperature is 0; otherwise from the top_p head of softmax(s/T)."""
    if temperature == 0:
        return int(scores.argmax())
    chances, order = (scores / temperature).softmax(-1), None
    if top_p < 1:
        ranked, order = chances.topk(min(HEAD, len(chances)))
        if ranked.sum() < top_p:  # rare: a flat distribution
            ranked, order = chances.sort(descending=True)
        chances = ranked[ranked.cumsum(-1) - ranked < top_p]
    ladder = chances.cumsum(-1)
    point = torch.rand(1, generator=generator, dtype=ladder.dtype, device=ladder.device) * ladder[-1]
    choice = torch.searchsorted(ladder, point, right=True).clamp(max=len(ladder) - 1)
    return int(choice if order is None else order[choice])


def check_sampling(temperature, top_p, max_tokens):
    """Raise ValueError for settings out of range."""
    if temperature < 0 or not 0 < top_p <= 1 or max_tokens < 0:
        raise ValueError("temperature must be ≥ 0, top_p in (0, 1] and max_tokens ≥ 0")


def room_for(limit, n_prompt, max_tokens):
    """How many ids may follow a prompt. Raises ValueError for an empty prompt or one that fills the context."""
    if not 0 < n_prompt < limit:
        raise ValueError(f"the prompt has {n_prompt} ids; the model takes 1 to {limit - 1}: shorten the question")
    return min(max_tokens, limit - n_prompt)


@torch.inference_mode()
def generate(
    model, prompt_ids, ids, layout, *, temperature=0.7, top_p=0.9, seed=0, max_tokens=1024, repetition=None,
    min_audio=0, prompt_embeds=None, prefill=None,
):  # fmt: skip
    """Answer a prompt, one Step at a time, as soon as each is known. The last one is eot, unless max_tokens ends first.

    prompt_ids: list of ids; ids: IdsConfig; layout: has machine(ids, min_audio). temperature 0 is greedy; the same
    seed gives the same answer. repetition: a Repetition, or None. prompt_embeds (1, T, D): used in place of the
    prompt's embeddings (images). prefill: a Prefill that has read earlier forms of the prompt; what they share is not
    run again. Raises ValueError for settings out of range or a prompt too long.
    """
    check_sampling(temperature, top_p, max_tokens)
    prompt_ids = [int(i) for i in prompt_ids]
    max_tokens = room_for(prefill.decoder.size if prefill else model.config.max_seq_len, len(prompt_ids), max_tokens)
    embed = model.model.embed_tokens
    device = embed.weight.device
    generator = torch.Generator(device).manual_seed(seed) if temperature else None
    machine, vocabulary = layout.machine(ids, min_audio), Vocabulary(model)
    decoder = prefill.decoder if prefill else Decoder(model, 1, len(prompt_ids) + max_tokens)
    embeddings = embed(torch.tensor([prompt_ids], device=device)) if prompt_embeds is None else prompt_embeds
    embeddings = embeddings[:, prefill.rewind(prompt_ids) :] if prefill else embeddings
    history = prompt_ids
    for _ in range(max_tokens):
        hidden, may = decoder.feed(embeddings)[0], machine.allowed()
        if prefill:
            prefill.ids = list(history)
        legal, scores = vocabulary.legal(may), vocabulary.scores(hidden, may)
        banned = repetition.banned(history, may) if repetition and len(legal) > 1 else None
        free = scores if banned is None else scores.masked_fill(legal == banned, -torch.inf)
        choice = _choose(free, temperature, top_p, generator)
        token = int(legal[choice])
        machine.advance(token)
        history.append(token)
        kind = "marker" if token in may.markers else may.kind
        yield Step(token, kind, float(scores[choice] - scores.logsumexp(-1)))
        if machine.finished:
            return
        embeddings = embed(legal[choice].view(1, 1))


@torch.inference_mode()
def generate_batch(
    model, prompts, ids, layout, *, temperature=0.0, top_p=1.0, seed=0, max_tokens=1024, repetition=None, min_audio=0,
    batch_size=64,
):  # fmt: skip
    """Answers of many prompts at once, for evaluation: a list of lists of Steps, greedily the same as `generate`.

    prompts: lists of ids of any lengths; layout: one layout, or one a prompt. Prompts of like length run together, left
    padded; rows that are done leave the batch. Sampling depends on the seed and on how prompts are batched.
    """
    check_sampling(temperature, top_p, max_tokens)
    layouts = list(layout) if isinstance(layout, (list, tuple)) else [layout] * len(prompts)
    settings = (temperature, top_p, repetition)
    answers, vocabulary = [None] * len(prompts), Vocabulary(model)
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = [Row(i, list(map(int, prompts[i])), layouts[i].machine(ids, min_audio)) for i in chosen]
        _run_batch(model, rows, vocabulary, max_tokens, settings, generator)
        for row in rows:
            answers[row.index] = row.steps
    return answers


class Row:
    """One answer of a batch."""

    def __init__(self, index, history, machine):
        self.index, self.history, self.machine, self.steps = index, history, machine, []

    def take(self, token, may, logprob):
        self.machine.advance(token)
        self.history.append(token)
        self.steps.append(Step(token, "marker" if token in may.markers else may.kind, logprob))


def _run_batch(model, rows, vocabulary, max_tokens, settings, generator):
    """Fill in the steps of rows, in one left-padded batch."""
    embed, n_prompt = model.model.embed_tokens, max(len(row.history) for row in rows)
    limit = model.config.max_seq_len
    max_tokens = room_for(limit, n_prompt, max_tokens)
    for row in rows:
        room_for(limit, len(row.history), max_tokens)
    padded = [[0] * (n_prompt - len(row.history)) + row.history for row in rows]
    padding = torch.arange(n_prompt) < torch.tensor([[n_prompt - len(row.history)] for row in rows])
    device = embed.weight.device
    decoder = Decoder(model, len(rows), n_prompt + max_tokens)
    hidden = decoder.feed(embed(torch.tensor(padded, device=device)), padding.to(device))
    for left in range(max_tokens, 0, -1):
        step_batch(rows, hidden, vocabulary, settings, generator)
        alive = [i for i, row in enumerate(rows) if not row.machine.finished]
        if not alive or left == 1:
            return
        if len(alive) <= 0.75 * len(rows):  # not at once: it copies the cache
            rows = [rows[i] for i in alive]
            decoder.keep(torch.tensor(alive, device=device))
        hidden = decoder.feed(embed(torch.tensor([[row.history[-1]] for row in rows], device=device)))


def step_batch(rows, hidden, vocabulary, settings, generator):
    """Choose the next id of every row; rows that allow the same ids are scored together."""
    temperature, top_p, repetition = settings
    groups = {}
    for i, row in enumerate(rows):
        if not row.machine.finished:
            groups.setdefault(row.machine.allowed(), []).append(i)
    for may, members in groups.items():
        legal, scores = vocabulary.legal(may), vocabulary.scores(hidden[members], may)  # (R,), (M, R)
        free = scores
        if repetition and len(legal) > 1:
            banned = [repetition.banned(rows[i].history, may) for i in members]
            table = torch.tensor([-1 if b is None else b for b in banned], device=legal.device)
            free = scores.masked_fill(legal == table[:, None], -torch.inf)
        if temperature == 0:
            choices = free.argmax(-1)
        else:
            choices = torch.tensor([_choose(one, temperature, top_p, generator) for one in free], device=legal.device)
        logprobs = scores.log_softmax(-1).gather(1, choices[:, None])[:, 0].tolist()
        for i, token, logprob in zip(members, legal[choices].tolist(), logprobs, strict=True):
            rows[i].take(token, may, logprob)
