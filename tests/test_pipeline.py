"""From question to answer with random weights: what is said is noise, but everything about it must hold."""

import math

import pytest
import soundfile
import torch

from aqaa.answer import Answer, Ledger, Piece, playout
from aqaa.config import IdsConfig
from aqaa.pipeline import AQAA, MIN_AUDIO, Chat
from aqaa.sound_headers import AudioError
from aqaa.tokenizers import dialogue, interleave
from tests.conftest import RATE, tone

SHORT = {"max_tokens": 120}


@pytest.fixture(scope="module")
def sound():
    return torch.from_numpy(tone()), RATE


@pytest.fixture(scope="module")
def answer(tiny, sound):
    return tiny.ask(sound, seed=3, **SHORT)


@pytest.fixture(scope="module")
def long(tiny, sound):
    """One answer asked, and streamed: (Answer, finished Talk, its Pieces, ids known at the first one)."""
    talk, known = tiny.stream(sound, seed=3, max_tokens=200), []
    pieces = [(known.append(len(talk.steps)), piece)[1] for piece in talk]
    return tiny.ask(sound, seed=3, max_tokens=200), talk, pieces, known[0]


def test_an_answer_is_whole(tiny, answer):
    assert isinstance(answer, Answer) and isinstance(answer.text, str)
    assert answer.audio.dtype == torch.float32 and answer.audio.device.type == "cpu" and answer.audio.ndim == 1
    assert torch.isfinite(answer.audio).all() and answer.audio.abs().max() <= 1
    assert answer.sample_rate == 16_000
    linguistic, semantic = answer.tokens["linguistic"], answer.tokens["semantic"]
    assert 3 * len(linguistic) == 2 * len(semantic)
    assert answer.seconds == pytest.approx(0.12 * len(linguistic) / 2, abs=0.011)
    assert answer.text == tiny.text.decode(answer.tokens["text"]).strip()
    assert 0 < answer.confidence <= 1


def test_the_question_is_in_the_prompt(tiny, sound, answer):
    ids = tiny.listen(sound)
    assert len(ids) % 5 == 0 and interleave.merge(*interleave.split(ids, tiny.ids), tiny.ids) == ids
    assert answer.tokens["prompt"] == tiny.prompt(ids)
    assert tiny.ask(ids, seed=3, **SHORT).tokens == answer.tokens and tiny.listen(ids) is ids


def test_the_ledger_adds_up(answer):
    times = answer.timings
    parts = ("read", "linguistic", "semantic", "generate", "vocode")
    assert all(times[name] >= 0 for name in parts)
    assert sum(times[name] for name in parts) <= times["total"]
    assert times["first_token"] <= times["first_audio"] <= times["total"]
    assert 0 < times["first_audio_share"] <= 1
    assert answer.real_time_factor == pytest.approx(times["total"] / answer.seconds)


def test_the_same_seed_gives_the_same_answer(tiny, sound, answer):
    again, other = tiny.ask(sound, seed=3, **SHORT), tiny.ask(sound, seed=4, **SHORT)
    assert again.tokens == answer.tokens and torch.equal(again.audio, answer.audio)
    assert other.tokens["answer"] != answer.tokens["answer"]


def test_confidence_is_the_mean_probability_of_the_text(tiny, answer, sound):
    steps = list(tiny.generate(answer.tokens["prompt"], seed=3, **SHORT))
    probs = [math.exp(step.logprob) for step in steps if step.kind == "text"]
    assert answer.confidence == pytest.approx(math.prod(probs) ** (1 / len(probs)))


@pytest.mark.parametrize("seed", range(6))
def test_every_answer_is_spoken(tiny, sound, seed):
    """Whatever the weights draw: an answer that would end at once still says something."""
    answer = tiny.ask(sound, seed=seed, temperature=2.0, top_p=1.0, max_tokens=150)
    assert 5 * len(answer.tokens["linguistic"]) / 2 >= MIN_AUDIO
    assert answer.seconds >= 0.3


@pytest.mark.parametrize("limit", [31, 47, 64])
def test_an_answer_cut_in_a_group_is_still_spoken(tiny, sound, limit):
    answer = tiny.ask(sound, seed=3, max_tokens=limit)
    streamed = tiny.stream(sound, seed=3, max_tokens=limit).answer
    for one in (answer, streamed):
        assert len(one.tokens["answer"]) <= limit
        assert one.seconds == pytest.approx(0.06 * len(one.tokens["linguistic"]), abs=0.011)


def test_streaming_says_the_same(long):
    asked, talk, pieces, _ = long
    assert all(isinstance(piece, Piece) for piece in pieces) and len(pieces) > 1
    assert "".join(piece.text for piece in pieces).strip() == asked.text
    assert torch.equal(torch.cat([piece.audio for piece in pieces]), talk.answer.audio)
    assert talk.answer.tokens == asked.tokens and len(talk.answer.audio) == len(asked.audio)
    # The chunks see less of the future than the whole does, so this bounds the difference and does not deny it.
    assert (asked.audio - talk.answer.audio).square().mean() < 0.25 * asked.audio.square().mean()


def test_sound_begins_with_the_first_block(long):
    """After 10 text and 15 audio ids, or sooner where the text is shorter: 0.24 s, and a group to look ahead."""
    _, talk, pieces, known = long
    audio_steps = [step for step in talk.steps[:known] if step.kind in ("linguistic", "semantic")]
    assert len(audio_steps) == 15 and known <= 25 and len(pieces[0].audio) == 0.24 * RATE


def test_an_answer_knows_when_its_pieces_were_ready(answer, long):
    streamed = long[1].answer
    for one in (answer, streamed):
        assert sum(seconds for _, seconds in one.pieces) == pytest.approx(one.seconds)
        assert one.pieces[0][0] == pytest.approx(one.timings["first_audio"], abs=0.01)
        assert one.timings["first_audio"] - 0.01 <= one.playout.delay <= one.timings["total"]
    assert len(answer.pieces) == 1 < len(streamed.pieces)
    assert [ready for ready, _ in streamed.pieces] == sorted(ready for ready, _ in streamed.pieces)


def test_streaming_gives_sound_before_the_answer_is_finished(tiny, sound):
    talk = tiny.stream(sound, seed=3, max_tokens=200, min_audio=100)
    first = next(iter(talk))
    known = len(talk.steps)
    assert len(first.audio) > 0
    assert known < len(talk.answer.tokens["answer"]) / 2  # `answer` finishes what was not listened to
    assert talk.answer.timings["first_audio_share"] < 0.5
    assert talk.answer is talk.answer and list(talk) == []


def test_every_step_can_be_called_alone(tiny, sound):
    wav = sound[0]
    linguistic, semantic = tiny.linguistic.encode(wav), tiny.semantic.encode(wav)
    ids = interleave.merge(linguistic, semantic, tiny.ids)
    assert ids == tiny.listen(sound)
    steps = list(tiny.generate(tiny.prompt(ids), **SHORT))
    audio_ids = [step.id for step in steps if step.kind in ("linguistic", "semantic")]
    whole = audio_ids[: len(audio_ids) // 5 * 5]
    wave = tiny.synthesize(whole)
    assert len(wave) == 1920 * len(whole) // 5
    mel = tiny.flow.inference(torch.tensor([tiny.codes(whole)]))
    assert tiny.hift.inference(mel).shape[-1] == len(wave)


def test_written_questions_are_answered_too(tiny):
    steps = list(tiny.generate(tiny.prompt("what is seven plus five"), **SHORT))
    assert steps and steps[0].kind in ("text", "marker")


def test_a_chat_keeps_its_history_as_text(tiny, sound):
    chat, other = tiny.chat(seed=1, **SHORT), tiny.chat(seed=1, **SHORT)
    first = chat.ask(sound)
    assert chat.history == [("user", tiny.transcribe(sound)), ("assistant", first.text)]
    assert "".join(piece.text for piece in other.stream(sound)).strip() == first.text
    assert chat.history == other.history
    second = chat.ask(sound)
    assert len(second.tokens["prompt"]) > len(first.tokens["prompt"])
    assert second.tokens["prompt"] == tiny.prompt(tiny.listen(sound), chat.history[:2])


def test_a_long_chat_forgets_its_beginning(tiny, sound):
    chat = Chat(tiny, **SHORT)
    chat.history = [("user", "count from one to nine " * 40), ("assistant", "nine " * 40)] * 12
    chat.history += [("user", "seven"), ("assistant", "twelve")]
    answer = chat.ask(sound)
    assert len(answer.tokens["prompt"]) < tiny.config.backbone.max_seq_len
    recent = chat._recent(tiny.listen(sound))
    assert recent and recent == chat.history[-len(recent):]


def test_a_sound_too_short_for_a_group_is_an_error(tiny):
    with pytest.raises(AudioError, match="short"):
        tiny.listen((torch.from_numpy(tone(0.07)), RATE))


def test_other_layouts_are_selectable(tiny, sound):
    model = AQAA(tiny.config, lambda name: getattr(tiny, name), layout="audio_only")
    answer = model.ask(sound, **SHORT)
    assert answer.text == "" and answer.confidence == 0 and answer.seconds > 0
    with pytest.raises(ValueError, match="unknown layout"):
        AQAA(tiny.config, lambda name: getattr(tiny, name), layout="sideways")


def test_a_ledger_keeps_first_marks_and_adds_steps():
    ledger = Ledger()
    for _ in range(2):
        with ledger.step("x"):
            pass
        ledger.mark("first")
    first = ledger.times["first"]
    ledger.mark("first")
    assert ledger.times["first"] == first and ledger.times["x"] > 0


def test_an_answer_is_saved_as_wav(answer, tmp_path):
    answer.save(tmp_path / "a.wav")
    wave, rate = soundfile.read(tmp_path / "a.wav")
    assert rate == answer.sample_rate and len(wave) == len(answer.audio)


# ---- when to begin to play ----


def simulated(tokens_per_s, seconds):
    """(ready, length) of the blocks of 15 audio ids of an answer with 5 text ids a second; markers cost nothing."""
    ids, layout = IdsConfig(), dialogue.layout("ratio_10_15")
    groups = round(seconds / 0.12)
    audio = interleave.merge([0] * 2 * groups, [0] * 3 * groups, ids)
    answer = layout.arrange([ids.first_text] * int(5 * seconds), audio, ids)
    at = [i for i, kind in enumerate(interleave.kinds([t for t in answer if t >= ids.first_text], ids)) if kind]
    blocks = [at[i : i + 15] for i in range(0, len(at), 15)]
    return [((block[-1] + 1) / tokens_per_s, 0.024 * len(block)) for block in blocks]


@pytest.mark.parametrize(("speed", "delays"), [
    (45, (0.84, 1.34, 2.32)), (50, (0.68, 1.06, 1.76)), (55, (0.55, 0.83, 1.31)), (60, (0.47, 0.64, 0.93)),
    (70, (0.36, 0.36, 0.36)),
])  # fmt: skip
def test_the_delay_that_a_decoding_speed_needs(speed, delays):
    """Text and audio at 69.4 ids a second play on from the first block; slower decoding has to run ahead."""
    assert [playout(simulated(speed, s)).delay for s in (5, 10, 20)] == pytest.approx(delays, abs=0.0051)


def test_playout_begins_as_early_as_it_can():
    pieces = [(0.5, 0.3), (0.6, 0.2), (1.4, 0.5), (1.5, 0.1)]
    delay, gaps = playout(pieces)
    assert gaps == pytest.approx((0.5, 0, 0.4, 0)) and delay == pytest.approx(0.9)
    starts = [delay + sum(seconds for _, seconds in pieces[:i]) for i in range(4)]
    late = [start - ready for start, (ready, _) in zip(starts, pieces, strict=True)]
    assert min(late) == pytest.approx(0)  # never late, and no sooner would do
    assert playout([]) == (0, ())
