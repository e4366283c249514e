import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aqaa.backbone.generation import Decoder, KVCache, Prefill, Repetition, generate, generate_batch
from aqaa.backbone.quantized_linear import Int4Linear
from aqaa.config import IdsConfig
from aqaa.fast import cpu_step, prepare
from aqaa.tokenizers.dialogue import LAYOUTS, Allowed, Layout
from aqaa.tokenizers.interleave import merge, split
from tests.conftest import sharp_step1

IDS = IdsConfig(n_text=100, n_linguistic=20, n_semantic=30)
GREEDY = {"temperature": 0.0, "max_tokens": 60}


@pytest.fixture(scope="module")
def model():
    return sharp_step1(
        6, double=True, vocab_size=IDS.end, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_attention_groups=2, max_seq_len=256,
    )  # fmt: skip


def prompt(length, seed=0):
    return torch.randint(68, IDS.end, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [prompt(n, n) for n in (12, 1, 30, 7, 12, 25, 3)]


def answer(model, layout="ratio_10_15", question=PROMPTS[0], **options):
    return list(generate(model, question, IDS, LAYOUTS[layout], **{**GREEDY, **options}))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_answer_obeys_its_layout(model, name):
    for seed in range(4):
        steps = answer(model, name, temperature=1.5, top_p=1.0, seed=seed, max_tokens=120)
        machine = LAYOUTS[name].machine(IDS)
        for step in steps:
            machine.advance(step.id)  # raises for an illegal id
            assert step.logprob <= 0
        _, audio = LAYOUTS[name].parse([step.id for step in steps], IDS)
        whole = len(audio) // 5 * 5
        assert merge(*split(audio, IDS), IDS) == audio[:whole]
        assert not machine.finished or (whole == len(audio) and steps[-1].id == IDS.eot)


def test_one_token_on_a_cpu_equals_the_modules(model, monkeypatch):
    embeddings, steps = model.model.embed_tokens(torch.tensor([PROMPTS[2]])).detach(), []
    twin = prepare(copy.deepcopy(model))
    monkeypatch.setattr(twin.model, "one_token", lambda *a: steps.append(cpu_step.step(*a)) or steps[-1])
    fast, plain = Decoder(twin, 1, 30), Decoder(model, 1, 30)
    with torch.inference_mode():
        for part in embeddings.split([20, 1, 1, 5, 1, 1, 1], dim=1):
            assert (fast.feed(part) - plain.feed(part)).abs().max() < 1e-5
    assert [step is not None for step in steps] == [False, True, True, False, True, True, True]


def test_the_twin_of_one_token_stands_back_where_it_does_not_fit(model):
    twin = prepare(copy.deepcopy(model))
    hidden, cache = torch.zeros(1, 1, 32).double(), KVCache(twin, 1, 8)
    assert twin.state_dict().keys() == model.state_dict().keys()
    assert copy.deepcopy(twin).model.one_token is cpu_step.step and model.model.one_token is None
    assert cpu_step.fits(twin.model, hidden, cache) and cpu_step.fits(twin.float().train().model, hidden, cache)
    for other in (hidden.bfloat16(), hidden.to("meta"), hidden.expand(2, 1, 32), hidden.expand(1, 2, 32)):
        assert not cpu_step.fits(twin.model, other, cache)
    assert not cpu_step.fits(twin.model, hidden, None)
    mlp = twin.model.layers[1].mlp
    hook = mlp.down_proj.register_forward_hook(lambda *a: None)
    assert not cpu_step.fits(twin.model, hidden, cache)
    hook.remove()
    assert cpu_step.fits(twin.model, hidden, cache)
    mlp.up_proj = Int4Linear.from_linear(mlp.up_proj, 16)
    assert not cpu_step.fits(twin.model, hidden, cache)
    assert generate_batch(twin, PROMPTS[:1], IDS, LAYOUTS["text_cot"], **GREEDY)[0] == answer(twin, "text_cot")


def test_cache_and_legal_rows_equal_a_full_forward(model):
    history, steps = list(PROMPTS[0]), answer(model)
    machine = LAYOUTS["ratio_10_15"].machine(IDS)
    for step in steps:
        may = machine.allowed()
        legal = [*range(may.start, may.stop), *may.markers]
        scores = model(torch.tensor([history])).logits[0, -1, legal].log_softmax(-1)
        assert step.id == legal[scores.argmax()] and step.logprob == pytest.approx(scores.max().item(), abs=1e-4)
        assert step.kind == ("marker" if step.id in may.markers else may.kind)
        machine.advance(step.id)
        history.append(step.id)


@pytest.mark.parametrize("repetition", [None, Repetition(), Repetition(kinds=("text",))])
def test_a_batch_answers_as_one_by_one(model, repetition):
    layouts = [LAYOUTS[name] for name in (*LAYOUTS, "ratio_10_15", "text_cot")]
    alone = [
        list(generate(model, question, IDS, layout, repetition=repetition, **GREEDY))
        for question, layout in zip(PROMPTS, layouts, strict=True)
    ]
    together = generate_batch(model, PROMPTS, IDS, layouts, repetition=repetition, batch_size=4, **GREEDY)
    for one, other in zip(alone, together, strict=True):
        assert [s[:2] for s in one] == [s[:2] for s in other]
        assert [s.logprob for s in one] == pytest.approx([s.logprob for s in other], abs=1e-4)


def test_rows_end_on_their_own(model):
    """With one-id pieces of vocabulary most rows stop early, each at another step."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight[[IDS.text_end, IDS.eot]] *= 3
    together = generate_batch(model, PROMPTS, IDS, LAYOUTS["ratio_3_5"], **GREEDY)
    alone = [answer(model, "ratio_3_5", question) for question in PROMPTS]
    assert len({len(steps) for steps in together}) > 1
    assert [[s.id for s in steps] for steps in together] == [[s.id for s in steps] for steps in alone]


def test_the_seed_decides_and_sampling_can_be_made_greedy(model):
    sampled = [answer(model, temperature=1.0, top_p=0.95, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert [s.id for s in answer(model, temperature=1.0, top_p=1e-6)] == [s.id for s in answer(model)]
    assert generate_batch(model, PROMPTS, IDS, LAYOUTS["text_cot"], temperature=1.0, seed=3, max_tokens=20) == (
        generate_batch(model, PROMPTS, IDS, LAYOUTS["text_cot"], temperature=1.0, seed=3, max_tokens=20)
    )


def test_answers_stream_and_stop(model):
    stream = generate(model, PROMPTS[0], IDS, LAYOUTS["ratio_10_15"], **GREEDY)
    first = next(stream)
    assert first.kind in ("text", "marker")
    stream.close()
    assert len(answer(model, max_tokens=3)) == 3 and answer(model, max_tokens=0) == []
    assert len(answer(model, question=prompt(250), max_tokens=1000)) <= 6  # the context is full
    layout = LAYOUTS["audio_only"]
    for steps in generate_batch(model, PROMPTS, IDS, layout, min_audio=20, **GREEDY):
        assert len(steps) > 20


def test_settings_out_of_range_are_refused(model):
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"max_tokens": -1}):
        with pytest.raises(ValueError, match="temperature must be"):
            answer(model, **wrong)
    for question in ([], prompt(256)):
        with pytest.raises(ValueError, match="the model takes 1 to 255"):
            answer(model, question=question)
        with pytest.raises(ValueError, match="the model takes 1 to 255"):
            generate_batch(model, [PROMPTS[0], question], IDS, LAYOUTS["text_cot"])


def test_repetition_rule():
    text = Layout("t", 10, 15).machine(IDS).allowed()
    assert Repetition().banned([70, 71, 70], text) == 70
    assert Repetition().banned([70, 71], text) is None
    assert Repetition().banned([70] + [71, 72] * 5 + [73], text) is None
    assert Repetition(kinds=("text",)).banned([70, 110, 70, 110, 125], text) == 70
    assert Repetition(kinds=("semantic",)).banned([70, 70], text) is None
    assert Repetition().banned([], text) is None


def test_embeddings_can_stand_for_the_prompt(model):
    embeds = model.model.embed_tokens(torch.tensor([PROMPTS[0]])).detach()
    assert answer(model, prompt_embeds=embeds) == answer(model)


class Anything:
    """Stands in for a layout: every id is legal at every step, as it is for transformers."""

    finished = False

    def machine(self, ids, min_audio=0):
        return self

    def allowed(self):
        return Allowed("text", 0, IDS.end, ())

    def advance(self, token):
        pass


@pytest.mark.parametrize("question", PROMPTS[:3])
def test_greedy_ids_are_those_of_transformers_with_its_growing_cache(model, question):
    steps = list(generate(model, question, IDS, Anything(), temperature=0, max_tokens=40))
    options = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(torch.tensor([question]), **options)[0, len(question) :]
    assert [step.id for step in steps] == found.tolist()


def test_keys_and_values_are_written_where_they_stay(model):
    model = copy.deepcopy(model)
    decoder = Decoder(model, 1, 30)
    places, embed = (decoder.cache.keys.data_ptr(), decoder.cache.values.data_ptr()), model.model.embed_tokens
    with torch.inference_mode():
        for twin, part in ((True, 20), (True, 1), (False, 1), (False, 7), (True, 1)):
            model.model.one_token, before = cpu_step.step if twin else None, decoder.cache.keys.clone()
            decoder.feed(embed(torch.tensor([prompt(part)])))
            new = (decoder.cache.keys != before).any(-1).any(2)[0, 0]
            assert new.nonzero().flatten().tolist() == [*range(decoder.cache.length - part, decoder.cache.length)]
    assert decoder.cache.length == 30 and decoder.cache.keys.shape == (2, 1, 2, 30, 8)  # layers, B, G, slots, D
    assert (decoder.cache.keys.data_ptr(), decoder.cache.values.data_ptr()) == places


@settings(max_examples=15, deadline=None, derandomize=True)
@given(forms=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30), st.integers(0, 2)), max_size=5))
def test_a_prompt_read_while_it_grew_is_answered_the_same(model, forms):
    """forms: lengths of earlier forms of the prompt, and from where on they differ from it."""
    final, reader = prompt(28), Prefill(model, 60)
    for length, same, seed in forms:
        reader.read([*final[:same], *prompt(30, seed + 1)][:length])
    expected = answer(model, question=final, max_tokens=20)
    for _ in range(2):  # and once more from the same cache, which now also holds an answer
        found = answer(model, question=final, max_tokens=20, prefill=reader)
        assert [s.id for s in found] == [s.id for s in expected]
        assert [s.logprob for s in found] == pytest.approx([s.logprob for s in expected], abs=1e-6)


def test_only_what_is_new_is_read(model, monkeypatch):
    reader, fed = Prefill(model, 60), []
    feed = reader.decoder.feed
    monkeypatch.setattr(reader.decoder, "feed", lambda x: fed.append(x.shape[1]) or feed(x))
    question, other = prompt(20), prompt(20, 1)
    for ids in (question[:12], question[:15], question[:15] + other[:2], question, question, question[:4]):
        reader.read(ids)
    assert fed == [12, 3, 2, 5, 1, 1]
    assert reader.known(question) == 4 and reader.known(other) == 0
    with pytest.raises(ValueError, match="1 to 59"):
        reader.read(prompt(60))
    assert len(answer(model, question=prompt(50), prefill=reader, max_tokens=100)) <= 10  # its room is full
