"""Questions that are heard again where an answer begins unsurely: random weights are never sure."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from aqaa.backbone.generation import Decoder, Prefill, Step, Vocabulary, embed, generate
from aqaa.batching import answer_batch
from aqaa.config import ASR_MARKER, preset
from aqaa.files import data_folder
from aqaa.hearings import BLOCK, SHIFTS, Heard, Prompt, first_words, together, unsure
from aqaa.pipeline import AQAA, MIN_AUDIO
from aqaa.tokenizers import dialogue
from aqaa.tokenizers.text import normalise
from tests.conftest import RATE, tone

GREEDY = {"temperature": 0, "max_tokens": 60}


@pytest.fixture(scope="module")
def sound():
    return torch.from_numpy(tone(0.9)), RATE


@pytest.fixture
def doubting(tiny):
    """The same weights, which doubt whatever they say."""
    how = replace(tiny.config.confidence, again=0.999)
    return AQAA(replace(tiny.config, confidence=how), tiny._part)


def test_a_question_that_was_heard_keeps_its_sound(tiny, sound):
    ids = tiny.listen(sound)
    assert isinstance(ids, Heard) and len(ids.wav) == len(sound[0]) and tiny.encode([ids.wav]) == [ids]
    assert tiny.listen(ids) is ids
    waves = []
    assert tiny.prompt(ids).hearings(lambda some: waves.extend(some) or []) == [tiny.prompt(ids)]
    assert [len(wave) - len(ids.wav) for wave in waves] == [16 * shift for shift in SHIFTS]
    assert all(torch.equal(wave[-len(ids.wav) :], ids.wav) for wave in waves)
    assert len({tuple(one) for one in tiny.encode(waves)}) > 1  # codes do depend on where they begin


def test_a_prompt_is_made_of_any_hearing(tiny, sound):
    ids, said = tiny.listen(sound), [("user", "hello"), ("assistant", "hello")]
    prompt = tiny.prompt(ids, said, marker=ASR_MARKER)
    assert isinstance(prompt, Prompt) and prompt == tiny.prompt(list(ids), said, marker=ASR_MARKER)
    other = tiny.encode([torch.cat([torch.zeros(16 * SHIFTS[0]), ids.wav])])[0]
    assert prompt.hearings(tiny.encode)[1] == prompt.made(other) == tiny.prompt(other, said, marker=ASR_MARKER)
    assert not isinstance(tiny.prompt("hello"), Prompt) and not isinstance(tiny.prompt(list(ids)), Prompt)


def test_who_is_sure_pays_nothing(tiny, doubting, sound, monkeypatch):
    plain = tiny.ask(sound, **GREEDY)
    heard, encode = [], AQAA.encode
    monkeypatch.setattr(AQAA, "encode", lambda self, wavs: heard.append(wavs) or encode(self, wavs))
    assert tiny.ask(sound, **GREEDY).tokens == plain.tokens and not heard  # `again` is 0 here
    doubting.config = replace(doubting.config, confidence=replace(doubting.config.confidence, again=1e-9))
    assert doubting.ask(sound, **GREEDY).tokens == plain.tokens and not heard
    doubting.config = replace(doubting.config, confidence=replace(doubting.config.confidence, again=0.999))
    assert doubting.ask(sound, **GREEDY).tokens != plain.tokens and len(heard) == 1


@pytest.mark.parametrize("layout", ["ratio_10_15", "text_cot", "ratio_3_5"])
def test_an_answer_begins_as_all_hearings_would_and_goes_on_as_one(doubting, sound, layout):
    model, layout = doubting, dialogue.layout(layout)
    ids = model.listen(sound)
    prompt = model.prompt(ids)
    steps = list(model.generate(prompt, layout=layout, **GREEDY))
    begun, chosen = together(prompt.hearings(model.encode), model.ids, layout, Prefill(model.decoder, 400))
    assert steps[: len(begun)] == begun and chosen in prompt.hearings(model.encode)
    said = tuple(step.id for step in begun)
    rest = generate(model.decoder, [*chosen, *said], model.ids, dialogue.Resumed(layout, said), min_audio=MIN_AUDIO,
                    temperature=0, max_tokens=GREEDY["max_tokens"] - len(begun))  # fmt: skip
    assert steps[len(begun) :] == list(rest)
    assert 0 < len(begun) <= BLOCK and len(steps) == GREEDY["max_tokens"]
    layout.parse([step.id for step in steps], model.ids)
    machine = layout.machine(model.ids)
    for step in steps:  # all of it is legal
        may = machine.allowed()
        assert may.start <= step.id < may.stop or step.id in may.markers
        machine.advance(step.id)


def test_the_words_are_the_likeliest_by_the_mean_of_logprobs(tiny):
    """Prompts of unlike lengths, scored one by one without padding."""
    model, ids, layout = tiny.decoder, tiny.ids, dialogue.layout()
    prompts = [tiny.prompt(text) for text in ("one and two", "the sun is red today", "where is it")]
    steps, chosen = together(prompts, ids, layout, Prefill(model, 400))
    machine, said, totals = layout.machine(ids), [], np.zeros(len(prompts))
    for step in steps:
        may = machine.allowed()
        with torch.inference_mode():
            hidden = [Decoder(model, 1, 200).feed(embed(model, [prompt + said])) for prompt in prompts]
            each = torch.cat([Vocabulary(model).scores(one, may).log_softmax(-1) for one in hidden])
        mean = each.mean(0).log_softmax(-1)
        best = int(mean.argmax())
        legal = [*range(may.start, may.stop), *may.markers]
        assert legal[best] == step.id and step.logprob == pytest.approx(float(mean[best]), abs=1e-5)
        totals += each[:, best].numpy()
        said.append(step.id)
        machine.advance(step.id)
    assert chosen == prompts[int(totals.argmax())]


def test_hearings_that_agree_are_one(tiny):
    """Equal prompts: what one alone would say, as sure of it."""
    prompt, layout = tiny.prompt("where is the sun"), dialogue.layout()
    alone = list(generate(tiny.decoder, prompt, tiny.ids, layout, temperature=0, max_tokens=BLOCK))
    for most in (BLOCK, 3):
        steps, chosen = together([prompt] * 4, tiny.ids, layout, Prefill(tiny.decoder, 400), most)
        assert [step.id for step in steps] == [step.id for step in alone[:most]] and chosen == prompt
        assert [step.logprob for step in steps] == pytest.approx([step.logprob for step in alone[:most]], abs=1e-5)


def test_what_stands_before_the_question_is_read_once(doubting, sound, monkeypatch):
    """A long conversation makes no hearing longer."""
    ids, said = doubting.listen(sound), [("user", "where is the sun"), ("assistant", "hello")] * 20
    prompt, feed, fed = doubting.prompt(ids, said), Decoder.feed, []
    monkeypatch.setattr(Decoder, "feed", lambda self, x, *more: fed.append(x.shape[1]) or feed(self, x, *more))
    prefill = Prefill(doubting.decoder_for(prompt), 2_000)
    prefill.read(prompt)
    list(doubting.generate(prompt, prefill=prefill, **GREEDY))
    assert fed[0] == len(prompt) > 500 and max(fed[1:]) < len(ids) + 20
    assert sum(n > 1 for n in fed[1:]) - len(SHIFTS) in (0, 1)  # the other hearings; one of them may go on


def test_what_any_decoder_has_read_can_be_copied(doubting, sound):
    """One whose steps are recorded for a GPU, too: of it the hearings need nothing but its cache."""
    prompt = doubting.prompt(doubting.listen(sound))
    plain = Decoder(doubting.decoder, 1, 500)
    graph = SimpleNamespace(model=plain.model, size=plain.size, cache=plain.cache, feed=plain.feed)
    prefill = Prefill(doubting.decoder, 500, graph)
    assert list(doubting.generate(prompt, prefill=prefill, **GREEDY)) == list(doubting.generate(prompt, **GREEDY))
    assert len(prefill.ids) > len(prompt)


def test_streamed_is_offline(doubting, sound):
    whole = doubting.ask(sound, seed=3, max_tokens=90)
    talk = doubting.stream(sound, seed=3, max_tokens=90)
    pieces = list(talk)
    assert talk.answer.tokens == whole.tokens and "".join(piece.text for piece in pieces).strip() == whole.text
    listener = doubting.listener()
    for packet in sound[0].split(3_000):
        listener.push(packet)
    spoken = listener.stream(seed=3, max_tokens=90).answer  # its prompt was read while it was spoken
    assert torch.allclose(listener.ids.wav, doubting.listen(sound).wav)
    assert spoken.tokens == whole.tokens and spoken.confidence == pytest.approx(whole.confidence, abs=1e-4)


def test_many_at_once_are_as_one_by_one(doubting):
    waves = [tone(0.7), tone(1.0, pitch=110), tone(0.8, pitch=220)]
    given = answer_batch(doubting, waves, temperature=0, max_tokens=120)
    for wave, (text, _, sure) in zip(waves, given, strict=True):
        alone = doubting.ask((wave, RATE), temperature=0, max_tokens=120)
        assert text == normalise(alone.text) and sure == pytest.approx(alone.confidence, abs=1e-4)


@pytest.mark.parametrize("most", [0, 1, 4, 12])
def test_a_limit_is_a_limit(doubting, sound, most):
    prompt = doubting.prompt(doubting.listen(sound))
    assert len(list(doubting.generate(prompt, temperature=0, max_tokens=most))) == most


def test_no_words_no_doubt(doubting, sound):
    """Sound alone has no words to doubt, and ids alone no sound to hear again."""
    prompt = doubting.prompt(doubting.listen(sound))
    steps = [Step(7, "linguistic", -9.0), Step(8, "text", -9.0)]
    assert first_words(iter(steps)) == steps[:1] and not unsure(doubting, prompt, steps[:1])
    assert unsure(doubting, prompt, steps[1:]) and not unsure(doubting, list(prompt), steps[1:])
    words = [Step(50, "text", -1.0)] * (BLOCK + 5)
    assert len(first_words(iter(words))) == BLOCK
    audio = list(doubting.generate(prompt, layout=dialogue.layout("audio_only"), **GREEDY))
    assert "text" not in {step.kind for step in audio}
    assert list(doubting.generate(list(prompt), **GREEDY)) == list(generate(
        doubting.decoder, prompt, doubting.ids, doubting.layout, min_audio=MIN_AUDIO, top_p=0.9, **GREEDY))  # fmt: skip


def test_the_mini_doubts_and_the_published_model_does_not():
    assert preset("mini").confidence.again == 0.9 and preset("full").confidence.again == 0
    shipped = json.loads((data_folder() / "mini" / "config.json").read_text(encoding="utf-8"))
    assert shipped["confidence"]["again"] == 0.9


def test_an_engine_hears_once(doubting, sound):
    """It gets plain ids: it may stand in another process."""
    given = []
    doubting.engine = SimpleNamespace(generate=lambda prompt, *rest, **more: given.append(prompt) or iter(()))
    list(doubting.generate(doubting.prompt(doubting.listen(sound))))
    assert type(given[0]) is list
