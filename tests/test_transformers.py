"""Step-1 as one of transformers' models: every cache of generate(), packed rows, odd keywords, its tokenizer."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening, DynamicCache, StaticCache

from aqaa.backbone import inputs
from aqaa.tokenizers.text import TextTokenizer
from tests.conftest import SENTENCES
from tests.test_step1 import tiny
from tests.test_step1 import tokens as any_tokens
from tests.test_text import sentencepiece_model

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 8}
PARTS = (5, 11, 8)  # lengths of the examples that are packed into a row
PACKED = torch.cat([torch.full((n,), i) for i, n in enumerate(PARTS)])[None]  # whose token is whose
NAMES = ["cache", "past_key_values"]


def tokens(length, seed=1, batch=1):
    return any_tokens(batch, length, seed)


def left_padded(*rows):
    longest = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])
    return ids, (torch.arange(longest) >= torch.tensor([[longest - row.shape[1]] for row in rows])).long()


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def right(model):
    """Prompts of two lengths, and their greedy answers without any cache, each alone."""
    prompts, answers = [tokens(9), tokens(14, seed=2)], []
    with torch.no_grad():
        for ids in prompts:
            for _ in range(GREEDY["max_new_tokens"]):
                ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
            answers.append(ids[:, -GREEDY["max_new_tokens"] :])
    return prompts, answers


def make_cache(kind, model):
    return DynamicCache(config=model.config) if kind == "growing" else StaticCache(model.config, max_cache_len=40)


# ---- generate ----


@pytest.mark.parametrize("options", [
    {}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4},
    {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True, "output_attentions": True},
], ids=["growing", "none", "static", "in chunks", "all outputs"])  # fmt: skip
def test_generate_is_right_with_every_cache_alone_and_left_padded(model, right, options):
    prompts, answers = right
    ids, mask = left_padded(*prompts)
    alone = model.generate(prompts[0], **GREEDY, **options)
    together = model.generate(ids, attention_mask=mask, **GREEDY, **options)
    alone, together = (getattr(out, "sequences", out) for out in (alone, together))
    assert torch.equal(alone[:, 9:], answers[0]) and torch.equal(together[:, 14:], torch.cat(answers))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["growing", "static"])
def test_a_cache_that_is_handed_in_is_filled_and_can_be_continued(model, right, kind, name):
    prompts, answers = right
    ids, mask = left_padded(*prompts)
    cache = make_cache(kind, model)
    half = model.generate(ids, attention_mask=mask, **{name: cache}, **{**GREEDY, "max_new_tokens": 4})
    assert int(cache.get_seq_length()) == 14 + 3
    mask = torch.nn.functional.pad(mask, (0, 4), value=1)
    whole = model.generate(half, attention_mask=mask, **{name: cache}, **{**GREEDY, "max_new_tokens": 4})
    assert torch.equal(whole[:, 14:], torch.cat(answers))


@pytest.mark.parametrize("helper", ["another model", "the model itself", "lookup in the prompt"])
def test_assisted_generation_is_greedy_generation(model, right, helper):
    prompts, answers = right
    assistant = {"another model": tiny(seed=1), "the model itself": model}.get(helper)
    options = {"assistant_model": assistant} if assistant else {"prompt_lookup_num_tokens": 3}
    for ids, answer in zip(prompts, answers, strict=True):
        assert torch.equal(model.generate(ids, **options, **GREEDY)[:, ids.shape[1] :], answer)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_beams_are_the_same_with_every_cache_and_in_padded_batches(model, right, options):
    prompts, _ = right
    alone = [model.generate(ids, num_beams=3, use_cache=False, **GREEDY)[:, ids.shape[1] :] for ids in prompts]
    ids, mask = left_padded(*prompts)
    together = model.generate(ids, attention_mask=mask, num_beams=3, **options, **GREEDY)[:, 14:]
    assert torch.equal(together, torch.cat(alone))


@torch.no_grad()
@pytest.mark.parametrize("name", [*NAMES, "position 4"])
@pytest.mark.parametrize("kind", ["growing", "static"])
def test_the_model_takes_and_returns_the_cache_under_the_names_of_all_versions(model, kind, name):
    ids, cache = tokens(20, batch=2), make_cache(kind, model)
    rows = []
    for part in ids.split([7, 1, 5, 7], 1):
        given = {} if name == "position 4" else {name: cache}
        out = model(part, None, None, *([cache] if name == "position 4" else []), **given)
        assert out[inputs.CACHE] is cache
        rows.append(out.logits)
    assert (torch.cat(rows, 1) - model(ids).logits).abs().max() < 1e-4
    assert isinstance(model(ids, use_cache=True)[inputs.CACHE], DynamicCache)


# ---- rows that hold several examples ----


def marks(kind, mask=None):
    """What a trainer sends with a row of PARTS, by name."""
    lengths = torch.tensor(PARTS)
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    positions = torch.cat([torch.arange(n) for n in PARTS])[None]
    forms = {
        "positions": {"position_ids": positions},
        "positions from 2 on": {"position_ids": positions + 2},
        "positions of later pieces": {"position_ids": positions + 40 * PACKED},
        "seq_idx": {"seq_idx": PACKED.int()},
        "lengths": {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 11, "max_length_k": 11},
        "numbered mask": {"attention_mask": PACKED + 1},
        "segment_ids": {"segment_ids": PACKED + 1},
    }
    sent = forms[kind] if kind != "as TRL" else forms["positions"] | forms["seq_idx"] | forms["lengths"]
    return sent if mask is None or kind == "numbered mask" else {**sent, "attention_mask": mask}


KINDS = [
    "positions", "positions from 2 on", "positions of later pieces", "seq_idx", "lengths", "as TRL", "numbered mask",
    "segment_ids",
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_examples_do_not_see_each_other(kind, training, masked, attention):
    model = tiny(attn_implementation=attention)
    parts = [tokens(n, seed=n) for n in PARTS]
    want = torch.cat([model(part, use_cache=False).logits for part in parts], 1)
    sent = marks(kind, torch.ones_like(PACKED) if masked else None)
    model.train(training)
    for use_cache in (None, False):
        got = model(torch.cat(parts, 1), use_cache=use_cache, **sent)
        assert (got.logits - want).abs().max() < 1e-4 and got.get(inputs.CACHE) is None


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_packed_rows_of_a_batch_with_padding_anywhere(model, training):
    """Padding before, between, within and after examples; positions as their trainers count them."""
    a, b, c = tokens(6, seed=3), tokens(4, seed=4), tokens(5, seed=5)
    pad = torch.zeros(1, 2, dtype=torch.long)
    rows = torch.cat([torch.cat([pad, a, pad, b, pad[:, :1]], 1), torch.cat([c, pad, a, pad], 1)])
    mask = (rows != 0).long()
    positions = torch.tensor([
        [0, 0, 0, 1, 2, 3, 4, 5, 0, 0, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 0, 0, 0, 1, 2, 3, 4, 5, 0, 0],
    ])  # fmt: skip
    model = tiny().train(training)
    got = model(rows, attention_mask=mask, position_ids=positions, use_cache=False).logits
    model.eval()
    want = [torch.cat([model(x).logits[0] for x in row]) for row in ((a, b), (c, a))]
    for row, seen, logits in zip(got, mask, want, strict=True):
        assert (row[seen > 0] - logits).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("positions", ["by tokens", "by slots", "by tokens, padding at 1", "none"])
@pytest.mark.parametrize("hole", [(0, 4), (5, 8), (12, 16)], ids=["left", "middle", "right"])
def test_positions_of_padded_rows_are_not_mistaken_for_packing(model, hole, positions, training):
    ids, mask = tokens(16, batch=2), torch.ones(2, 16, dtype=torch.long)
    mask[0, slice(*hole)] = 0
    by_tokens = mask.cumsum(-1) - 1
    position_ids = {
        "by tokens": by_tokens.masked_fill(mask == 0, 0), "by slots": torch.arange(16)[None],
        "by tokens, padding at 1": by_tokens.masked_fill(mask == 0, 1), "none": None,
    }[positions]  # fmt: skip
    causal = torch.ones(16, 16, dtype=torch.bool).tril() & mask[:, None, None].bool()
    want = model(ids, attention_mask=causal).logits[mask > 0]
    model = tiny().train(training)
    got = model(ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
    assert got.isfinite().all() and (got[mask > 0] - want).abs().max() < 1e-4


@given(
    data=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5)), min_size=1, max_size=5), start=st.integers(0, 3)
)
@settings(max_examples=60, deadline=None)
def test_every_form_of_packing_tells_the_same_examples(data, start):
    """Runs of padding and of tokens in turn; what begins an example is the same in every form."""
    pieces = [(0, n) if pad else (1, m) for n, m in data for pad in (True, False) if n or not pad]
    mask = torch.cat([torch.full((n,), seen) for seen, n in pieces])[None]
    number = torch.cat([torch.full((n,), i) for i, (_, n) in enumerate(pieces)])[None]
    position = torch.cat([torch.arange(n) + start if seen else torch.zeros(n).long() for seen, n in pieces])[None]
    want = torch.zeros_like(mask)
    for i, piece in enumerate(number[mask > 0].unique().tolist()):
        want[number == piece] = i + 1
    ends = torch.tensor([0, *[n for _, n in pieces]]).cumsum(0)
    for told in ({"position_ids": position}, {"seq_idx": number}, {"cu_seq_lens": ends}):
        assert torch.equal(inputs.example_ids(mask.shape, mask, **told), want)
    assert torch.equal(inputs.example_ids(mask.shape, want), want)


def test_a_packed_batch_of_transformers_trains_as_its_examples_do(model):
    """Loss and gradients of DataCollatorWithFlattening's row are those of the examples, each in its own row."""
    parts = [{"input_ids": tokens(n, seed=n)[0].tolist()} for n in PARTS]
    options = [{}, {"return_seq_idx": True}, {"return_flash_attn_kwargs": True}]
    grads = []
    for option in (*options, None):
        model = tiny().train()
        if option is None:
            rows = [torch.tensor([part["input_ids"]]) for part in parts]
            losses = [model(ids, labels=ids, use_cache=False).loss for ids in rows]
            loss = sum(one * (n - 1) for one, n in zip(losses, PARTS, strict=True)) / (sum(PARTS) - len(PARTS))
        else:
            batch = DataCollatorWithFlattening(return_tensors="pt", **option)(parts)
            loss = model(**batch, use_cache=False, num_items_in_batch=sum(PARTS) - len(PARTS)).loss
        loss.backward()
        grads.append([loss.detach(), *(p.grad for p in model.parameters())])
    for found in grads[:-1]:
        for a, b in zip(found, grads[-1], strict=True):
            assert (a - b).abs().max() < 1e-4 * (1 + b.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_packed_rows_beside_a_cache_are_refused(model, kind, name):
    with pytest.raises(ValueError, match="cannot be continued with a cache"):
        model(tokens(sum(PARTS)), **marks(kind), **{name: DynamicCache()})
    if kind == "positions":
        with pytest.raises(ValueError, match="cannot be continued with a cache"):
            model.generate(tokens(sum(PARTS)), **marks(kind), **GREEDY)


@pytest.mark.parametrize("kind", ["seq_idx", "lengths", "segment_ids"])
def test_a_mask_for_each_query_beside_other_marks_is_refused(model, kind):
    with pytest.raises(ValueError, match="the mask already says"):
        model(tokens(24), **marks(kind, torch.ones(1, 1, 24, 24, dtype=torch.bool)))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["positions", "seq_idx", "lengths"])
def test_packed_rows_can_be_compiled(model, kind):
    torch._dynamo.reset()
    ids, sent = tokens(sum(PARTS)), marks(kind)
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert (compiled(ids, use_cache=False, **sent).logits - model(ids, **sent).logits).abs().max() < 1e-4


# ---- keywords ----


@pytest.mark.parametrize("name", [
    "cache_params", "cache_position2", "past", "layer_past", "past_key_value", "decoder_attention_mask", "attn_mask",
    "head_mask", "attention_bias", "position_embeddings", "positions", "sequence_ids", "seq_lengths", "document_ids",
    "encoder_hidden_states",
])  # fmt: skip
def test_keywords_that_sound_like_a_cache_a_mask_or_positions_are_refused(model, name):
    for part in (model, model.model):
        with pytest.raises(TypeError, match=f"does not know '{name}'"):
            part(tokens(4), **{name: torch.ones(1, 4)})
        part(tokens(4), **{name: None})


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_what_trainers_send_along_changes_nothing(model, training):
    ids = tokens(12, batch=2)
    model = tiny().train(training)
    sent = {
        "num_items_in_batch": 5, "output_attentions": False, "output_hidden_states": False, "return_dict": True,
        "cache_position": torch.arange(12), "is_causal": True, "token_type_ids": torch.zeros_like(ids),
        "output_router_logits": False, "skip_logits": False, "max_length_q": 12, "max_length_k": 12,
        "position_ids": torch.arange(12)[None], "attention_mask": torch.ones_like(ids), "cache": None,
        "past_key_values": None, "inputs_embeds": None,
    }  # fmt: skip
    want = model(ids, use_cache=False).logits
    for name, value in sent.items():
        assert (model(ids, use_cache=False, **{name: value}).logits - want).abs().max() < 1e-5, name
    assert (model(ids, use_cache=False, logits_to_keep=3, **sent).logits - want[:, -3:]).abs().max() < 1e-5


@pytest.mark.parametrize(("sent", "fault", "sentence"), [
    ({"is_causal": False}, TypeError, "later tokens"),
    ({"cache": DynamicCache(), "past_key_values": DynamicCache()}, TypeError, "two names of one thing"),
    ({"past_key_values": [(torch.zeros(1), torch.zeros(1))]}, TypeError, "the cache is a list"),
    ({"cache": {"key": 1}}, TypeError, "the cache is a dict"),
    ({"attention_mask": torch.ones(1, 5)}, ValueError, "covers 5 tokens"),
    ({"attention_mask": torch.ones(1, 3)}, ValueError, "covers 3 tokens"),
    ({"position_ids": torch.arange(3)[None]}, ValueError, "do not fit"),
    ({"position_ids": torch.zeros(3, 1, 4)}, ValueError, "do not fit"),
    ({"seq_idx": torch.zeros(1, 2)}, ValueError, "do not fit"),
])
def test_inputs_that_do_not_fit_are_named(model, sent, fault, sentence):
    with pytest.raises(fault, match=sentence):
        model(tokens(4), **sent)


@torch.no_grad()
def test_a_mask_that_forgets_the_cache_is_named(model):
    for name in NAMES:
        cache = DynamicCache()
        model(tokens(6), **{name: cache})
        with pytest.raises(ValueError, match="covers 1 tokens, but the cache holds 6 and 1 are new"):
            model(tokens(1), attention_mask=torch.ones(1, 1), **{name: cache})


# ---- attention ----


@pytest.mark.parametrize("name", ["flex_attention", "flash_attention_2", "flash_attention_3", "paged|eager", "other"])
def test_other_kinds_of_attention_are_refused_in_one_sentence(model, name):
    with pytest.raises(ValueError, match="Step-1 has no attention") as refusal:
        tiny(attn_implementation=name)
    assert "\n" not in str(refusal.value) and ". " not in str(refusal.value)
    for asked in (name, {"": name}):
        with pytest.raises(ValueError, match="Step-1 has no attention"):
            model.set_attn_implementation(asked)
    model = tiny()
    model.config._attn_implementation = name
    with pytest.raises(ValueError, match="Step-1 has no attention"):
        model(tokens(4))


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", [None, "positions", "segment_ids"])
def test_eager_attention_is_used_once_chosen(kind, training):
    model, sent = tiny().train(training), {} if kind is None else marks(kind)
    ids = tokens(sum(PARTS))
    want = model(ids, use_cache=False, **sent).logits
    model.set_attn_implementation("eager")
    out = model(ids, use_cache=False, output_attentions=True, **sent)
    assert (out.logits - want).abs().max() < 1e-4
    seen = (out.attentions[0][0] > 0).any(0)
    assert torch.equal(seen, (PACKED == PACKED.T if kind else torch.ones(24, 24).bool()).tril())
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(ids, use_cache=False, **sent).logits, want)


# ---- the tokenizer ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """TextTokenizers by name, beside what AutoTokenizer reads of them."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "model").write_bytes(sentencepiece_model()[1])
    found = {
        "mini": TextTokenizer.train(SENTENCES * 20, n_text=160),
        "SentencePiece": TextTokenizer.from_sentencepiece(folder / "model"),
    }
    model = tiny()
    for name, text in found.items():
        model.tokenizer = text
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(folder / name).save_pretrained(folder / f"{name} again")
    names = {"mini": "mini", "mini again": "mini", "SentencePiece": "SentencePiece", "again": "SentencePiece"}
    places = {**{name: name for name in names}, "again": "SentencePiece again"}
    return {name: (found[names[name]], AutoTokenizer.from_pretrained(folder / places[name])) for name in names}, folder


@given(parts=st.lists(
    st.text(max_size=12) | st.sampled_from(["<|EOT|>", "<s>", "<unk>", "human\n", "(slow)", "<audio_1>", "  ", "▁"])
    | st.sampled_from(SENTENCES), max_size=5,
))
@settings(max_examples=150, deadline=None)
def test_auto_tokenizer_gives_the_ids_and_words_of_the_project(saved, parts):
    text = "".join(parts)
    for name, (ours, theirs) in saved[0].items():
        ids = ours.encode(text)
        assert theirs(text).input_ids == ids, name
        assert theirs.decode(ids) == ours.decode(ids, skip_specials=False)
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)


def test_a_saved_model_and_its_tokenizer_are_read_and_generate(saved):
    for name in ("mini", "SentencePiece"):
        ours, theirs = saved[0][name]
        config = json.loads((saved[1] / name / "tokenizer_config.json").read_text(encoding="utf-8"))
        assert config["padding_side"] == "left" and len(theirs) == ours.n_text
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 3, 0)
        assert theirs.decode([ours.n_text, ours.n_text + 5000]) == ""  # ids of sound have no words
        assert set(theirs(["seven", "a man or a woman"], padding=True)) == {"input_ids", "attention_mask"}
    again = AutoModelForCausalLM.from_pretrained(saved[1] / "mini")
    assert again.generate(torch.tensor([[7, 8, 9]]), **GREEDY).shape == (1, 11)


def test_a_whole_system_saves_its_tokenizer_with_its_backbone(tiny_folder, tmp_path):
    import aqaa

    whole = aqaa.load(tiny_folder)
    whole.backbone.save_pretrained(tmp_path)
    for text in SENTENCES:
        assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == whole.text.encode(text)
