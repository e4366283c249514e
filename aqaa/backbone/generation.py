"""Streaming decoding under the rules of an answer layout: only legal ids are scored and drawn.

Before each step the layout's machine says which rows of the vocabulary are legal, and only those
rows of the output layer are computed. One loop serves all: a Decoder turns new ids into hidden
states, `draw` makes the next id of every Row of them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from aqaa.backbone import attention

HEAD = 64  # ids among which the top_p head is looked for first: sorting them all is slower
SHRINK = 0.75  # a batch is made smaller at this share of unfinished rows: that copies the cache


class Step(NamedTuple):
    """One id of an answer."""

    id: int
    kind: str  # "text", "linguistic", "semantic", "marker"
    logprob: float  # natural, among the legal ids, before temperature and top_p


@dataclass(frozen=True)
class Repetition:
    """Repetition-aware sampling (Step-Audio's TTS script): the last id is banned if it is frequent.

    That is more than share · window times among the last `window` ids, prompt included. With
    `kinds`, only ids of the kind about to come count, if it is one of them: runs of one audio id
    can be silence.
    """

    window: int = 10
    share: float = 0.1
    kinds: tuple = ()  # () : the official rule, over all ids alike

    def banned(self, history, may):
        """The id that may not come next, or None. history: ids so far; may: the machine's word."""
        if self.kinds:
            if may.kind not in self.kinds:
                return None
            late = history[-4 * self.window :]
            history = [token for token in late if may.start <= token < may.stop]
        recent = history[-self.window :]
        often = recent and recent.count(recent[-1]) > self.share * self.window
        return recent[-1] if often else None


# ---- from ids to hidden states -------------------------------------------------------------------


class KVCache:
    """Keys and values (layers, B, G, S, d) in tensors made once, filled from the left.

    It has the one method that the attention layers call on a transformers cache.
    """

    def __init__(self, model, batch, size):
        weight, attn = model.model.embed_tokens.weight, model.model.layers[0].self_attn
        groups = attn.k_proj.out_features // attn.head_dim  # fewer where several GPUs share a layer
        shape = (len(model.model.layers), batch, groups, size, attn.head_dim)
        self.keys, self.values = weight.new_zeros(shape), weight.new_zeros(shape)
        self.length = 0

    def update(self, key, value, layer):
        """Write (B, G, Q, d) at the end; return all so far. The owner moves `length` on."""
        end = self.length + key.shape[2]
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]


class Decoder:
    """A model and its cache of `size` ids, the longest prompt and its answer together."""

    def __init__(self, model, batch, size):
        self.model, self.size = model, size
        self.cache = KVCache(model, batch, size)
        self.bias = model.model.bias(1, size, size - 1)  # (1, H, 1, S): of distances S−1 … 0
        self.padding = None

    def feed(self, embeddings, padding=None):
        """embeddings (B, Q, D) of the next ids → the last hidden state (B, D).

        padding: (B, Q) bool of the first call, True where a row of left padding holds no token.
        """
        n_query, past = embeddings.shape[1], self.cache.length
        n_key = past + n_query
        if n_query == 1:  # the newest distances stand at the right
            bias = self.bias[..., self.size - n_key :]
        else:
            bias = self.model.model.bias(n_query, n_key, past)
        if padding is not None and padding.any():
            self.padding = F.pad(~padding, (0, self.size - n_key), value=True)  # (B, S): visible
        if self.padding is not None:
            bias = attention.with_mask(bias, self.padding[:, :n_key])
        hidden = self.model.model.run(embeddings, bias, self.cache)
        self.cache.length = n_key
        return hidden[:, -1]

    def keep(self, rows):
        """Go on with some rows of the batch only."""
        self.cache.keys = self.cache.keys[:, rows]
        self.cache.values = self.cache.values[:, rows]
        if self.padding is not None:
            self.padding = self.padding[rows]


def fork(decoder, length, size):
    """A Decoder of `size` ids that has read the first `length` of what another decoder read."""
    other = Decoder(decoder.model, 1, size)
    other.cache.keys[..., :length, :] = decoder.cache.keys[..., :length, :]
    other.cache.values[..., :length, :] = decoder.cache.values[..., :length, :]
    other.cache.length = length
    return other


class Prefill:
    """A prompt that is read while it grows, so that an answer can begin as soon as it ends.

    room: ids of the longest prompt and its answer together; the cache is made for them at once.
    `ids` are those whose keys and values stand in the cache, recorded only after they were fed: an
    interrupt (Ctrl-C, no memory) changes no answer. decoder: used in place of a new Decoder.
    """

    def __init__(self, model, room, decoder=None):
        self.decoder = decoder or Decoder(model, 1, min(room, model.config.max_seq_len))
        self.ids = []

    def suit(self, model):
        """Read for this model; what was read for another one is forgotten."""
        if model is not self.decoder.model:
            self.ids = []  # first, should this be interrupted
            self.decoder = Decoder(model, 1, self.decoder.size)

    @torch.inference_mode()
    def read(self, ids):
        """Run what is new in `ids`, a later form of the prompt. Raises ValueError for no room."""
        room_for(self.decoder.size, len(ids), 0)
        new = ids[self.rewind(ids) :]
        self.decoder.feed(embed(self.decoder.model, [new]))
        self.ids = list(ids)

    def known(self, ids):
        """How many of the ids, from the first on, need not be run; the last one always must."""
        limit = min(len(self.ids), len(ids) - 1)
        return next((i for i in range(limit) if self.ids[i] != ids[i]), limit)

    def rewind(self, ids):
        """Forget what differs from `ids`; returns how many are known. Feed the others next."""
        known = self.known(ids)
        self.ids = self.ids[:known]  # first: from here on the rest of the cache may be overwritten
        self.decoder.cache.length = known
        return known


def embed(model, ids):
    """Embeddings (B, T, D) of B lists of T ids."""
    table = model.model.embed_tokens
    return table(torch.tensor(ids, device=table.weight.device))


# ---- from hidden states to ids -------------------------------------------------------------------


class Vocabulary:
    """The legal rows of the output layer for each thing that a machine allows, looked up once."""

    def __init__(self, model):
        self.model, self.known = model, {}

    def legal(self, may):
        """Ids (R,) that may come next."""
        key = may.start, may.stop, may.markers
        if key not in self.known:
            ids = [*range(may.start, may.stop), *may.markers]
            self.known[key] = torch.tensor(ids, device=self.model.lm_head.weight.device)
        return self.known[key]

    def scores(self, hidden, may):
        """Logits (…, R) fp32 of the legal ids, in their order. hidden (…, D)."""
        parts = []
        if may.stop > may.start:  # a slice: its weights need not be copied together
            parts.append(self.model.logits(hidden, rows=slice(may.start, may.stop)))
        if may.markers:
            markers = self.legal(may)[-len(may.markers) :]
            parts.append(self.model.logits(hidden, rows=markers))
        return torch.cat(parts, -1).float()


def choose(scores, temperature, top_p, generator):
    """Index drawn from scores (R,): the largest at temperature 0, else by softmax(scores / T).

    top_p < 1 leaves only the likeliest ids, up to the first with which their probs reach top_p.
    """
    if temperature == 0:
        return int(scores.argmax())
    probs, order = (scores / temperature).softmax(-1), None
    if top_p < 1:
        ranked, order = probs.topk(min(HEAD, len(probs)))
        if ranked.sum() < top_p:  # rare: a flat distribution
            ranked, order = probs.sort(descending=True)
        probs = ranked[ranked.cumsum(-1) - ranked < top_p]
    # A uniform point falls into the step of an id with the probability of that id.
    cumulative = probs.cumsum(-1)
    point = cumulative.new_empty(1).uniform_(generator=generator) * cumulative[-1]
    index = torch.searchsorted(cumulative, point, right=True).clamp(max=len(cumulative) - 1)
    return int(index if order is None else order[index])


class Row:
    """One answer in the making: its ids so far, the machine of its layout, how its ids are drawn.

    history: the prompt's ids, then the answer's; left: ids that may still come.
    """

    def __init__(self, prompt, machine, left, temperature, top_p, repetition, generator):
        self.history = [int(token) for token in prompt]
        self.machine, self.left, self.steps = machine, left, []
        self.temperature, self.top_p, self.repetition = temperature, top_p, repetition
        self.generator = generator

    @property
    def finished(self):
        return self.left <= 0 or self.machine.finished

    def choose(self, scores, legal, may):
        """Index of the next id among the legal ones (R,), by their scores (R,)."""
        if self.repetition and len(legal) > 1:  # the only legal id is never banned
            banned = self.repetition.banned(self.history, may)
            if banned is not None:
                scores = scores.masked_fill(legal == banned, -torch.inf)
        return choose(scores, self.temperature, self.top_p, self.generator)

    def take(self, token, may, logprob):
        """Add the id that was chosen."""
        self.machine.advance(token)
        self.history.append(token)
        self.left -= 1
        self.steps.append(Step(token, "marker" if token in may.markers else may.kind, logprob))


def draw(rows, hidden, vocabulary):
    """Draw the next id of every row that is not finished. hidden (B, D)."""
    groups = {}  # rows that allow the same ids are scored in one product
    for i, row in enumerate(rows):
        if not row.finished:
            groups.setdefault(row.machine.allowed(), []).append(i)
    for may, members in groups.items():
        legal = vocabulary.legal(may)  # (R,)
        scores = vocabulary.scores(hidden[members], may)  # (M, R)
        chosen = [rows[i].choose(one, legal, may) for i, one in zip(members, scores, strict=True)]
        chosen = torch.tensor(chosen, device=legal.device)
        # The logprob is the model's own: temperature, top_p and bans do not enter it.
        logprobs = scores.gather(1, chosen[:, None])[:, 0] - scores.logsumexp(-1)
        drawn = zip(members, legal[chosen].tolist(), logprobs.tolist(), strict=True)
        for i, token, logprob in drawn:
            rows[i].take(token, may, logprob)


def advance(decoder, rows, vocabulary, *new):
    """One turn of the loop: feed `new`, or else the newest id of each row, and draw the next.

    new: what `feed` takes, the embeddings of prompts.
    """
    if not new:
        new = (embed(decoder.model, [[row.history[-1]] for row in rows]),)  # (B, 1, D)
    draw(rows, decoder.feed(*new), vocabulary)


def check_sampling(temperature, top_p, max_tokens):
    """Raise ValueError for settings out of range."""
    if temperature < 0 or not 0 < top_p <= 1 or max_tokens < 0:
        raise ValueError("temperature must be ≥ 0, top_p in (0, 1] and max_tokens ≥ 0")


def room_for(limit, n_prompt, max_tokens):
    """How many ids may follow a prompt. Raises ValueError if it is empty or fills the context."""
    if not 0 < n_prompt < limit:
        fault = f"the prompt has {n_prompt} ids; the model takes 1 to {limit - 1}"
        raise ValueError(f"{fault}: shorten the question")
    return min(max_tokens, limit - n_prompt)


@torch.inference_mode()
def generate(
    model, prompt_ids, ids, layout, *, temperature=0.7, top_p=0.9, seed=0, max_tokens=1024,
    repetition=None, min_audio=0, prompt_embeds=None, prefill=None,
):  # fmt: skip
    """Answer a prompt, one Step at a time; the last one is eot, unless max_tokens ends first.

    prompt_ids: list of ids; ids: IdsConfig; layout: has machine(ids, min_audio). temperature 0 is
    greedy; the same seed gives the same answer. repetition: a Repetition, or None. prompt_embeds
    (1, T, D): used in place of the prompt's embeddings (images). prefill: a Prefill that has read
    earlier forms of the prompt; what they share is not run again. Raises ValueError for settings
    out of range or a prompt too long.
    """
    check_sampling(temperature, top_p, max_tokens)
    limit = prefill.decoder.size if prefill else model.config.max_seq_len
    left = room_for(limit, len(prompt_ids), max_tokens)
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    machine, vocabulary = layout.machine(ids, min_audio), Vocabulary(model)
    row = Row(prompt_ids, machine, left, temperature, top_p, repetition, generator)
    decoder = prefill.decoder if prefill else Decoder(model, 1, len(row.history) + left)
    embeddings = embed(model, [row.history]) if prompt_embeds is None else prompt_embeds
    known = prefill.rewind(row.history) if prefill else 0
    new = (embeddings[:, known:],)
    while not row.finished:
        advance(decoder, [row], vocabulary, *new)
        new = ()  # the prompt is read once
        if prefill:
            prefill.ids = row.history[:-1]  # all but the newest were fed
        yield row.steps[-1]


@torch.inference_mode()
def generate_batch(
    model, prompts, ids, layout, *, temperature=0.0, top_p=1.0, seed=0, max_tokens=1024,
    repetition=None, min_audio=0, batch_size=64,
):  # fmt: skip
    """Answers of many prompts at once: a list of lists of Steps, greedily the same as `generate`.

    prompts: lists of ids of any lengths; layout: one layout, or one a prompt. Prompts of like
    length run together, left padded; rows that are done leave the batch. Sampling depends on the
    seed and on how prompts are batched. Raises ValueError as `generate`.
    """
    check_sampling(temperature, top_p, max_tokens)
    layouts = layout if isinstance(layout, (list, tuple)) else [layout] * len(prompts)
    vocabulary, answers = Vocabulary(model), [None] * len(prompts)
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        lengths = [len(prompts[i]) for i in chosen]
        # The shortest prompt may be empty, the longest leaves the least room.
        left = min(room_for(model.config.max_seq_len, n, max_tokens) for n in lengths)
        rows = []
        for i in chosen:
            machine = layouts[i].machine(ids, min_audio)
            rows.append(Row(prompts[i], machine, left, temperature, top_p, repetition, generator))
            answers[i] = rows[-1].steps
        _run_batch(model, rows, vocabulary, max(lengths) + left)
    return answers


def _run_batch(model, rows, vocabulary, size):
    """Fill in the steps of rows, in one left-padded batch of `size` slots."""
    device = model.lm_head.weight.device
    longest = max(len(row.history) for row in rows)
    missing = [longest - len(row.history) for row in rows]
    padded = [[0] * n + row.history for n, row in zip(missing, rows, strict=True)]
    padding = torch.arange(longest) < torch.tensor(missing)[:, None]  # (B, T)
    decoder, first = Decoder(model, len(rows), size), (embed(model, padded), padding.to(device))
    while alive := [i for i, row in enumerate(rows) if not row.finished]:
        if not first and len(alive) <= SHRINK * len(rows):
            rows = [rows[i] for i in alive]
            decoder.keep(torch.tensor(alive, device=device))
        advance(decoder, rows, vocabulary, *first)
        first = ()
