"""A question heard while it is spoken: the ids of offline listening, whatever the packets, and an early answer."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aqaa import audio, files, loading
from aqaa.backbone.generation import Prefill
from aqaa.evaluation import bench, streaming
from aqaa.tokenizers.linguistic import STRIDE, row_count
from aqaa.tokenizers.semantic import PIECE
from tests.conftest import RATE, tone
from tests.test_linguistic import MODEL as PUBLISHED_STYLE

LENGTHS = st.sampled_from([0, 500, 879, 880, STRIDE, 3 * STRIDE, 20_000, 27_111])
SIZES = st.one_of(st.just(0), st.just(1), st.integers(2, 900), st.integers(3000, 9000), st.sampled_from([STRIDE, 7680]))
QUESTION = files.data_folder() / "questions" / "product_q001959.wav"


@pytest.fixture(scope="module")
def mini():
    return loading.load("mini")


@pytest.fixture(scope="module")
def spoken():
    return audio.load_question(QUESTION)


def swell(seconds=1.5):
    """A tone that gets louder: the peak of the whole comes late."""
    wav = torch.from_numpy(tone(seconds))
    return wav * torch.linspace(0.1, 1, len(wav)) ** 2


def cut(wav, sizes):
    """Packets of these sizes, then the rest."""
    return wav.split([*sizes, len(wav) - sum(sizes)]) if sum(sizes) <= len(wav) else wav[: sum(sizes)].split(640)


def pushed(listener, wav, size):
    """The listener, after a sound in packets of `size` samples."""
    for packet in wav.split(size):
        listener.push(packet)
    return listener


# ---- linguistic packets ----


@pytest.mark.parametrize("weights", ["shipped", "published_style"])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(sizes=st.lists(SIZES, max_size=6), length=LENGTHS)
def test_linguistic_codes_do_not_depend_on_packets(mini, spoken, weights, sizes, length):
    model = mini.linguistic if weights == "shipped" else PUBLISHED_STYLE
    wav = spoken[6000 : 6000 + length]
    state, codes, packets = model.start(), [], cut(wav, sizes)
    for i, packet in enumerate(packets):
        found, state = model.push(state, packet, final=i == len(packets) - 1)
        codes += found.tolist()
    if not packets:  # nothing was said at all
        codes = model.push(state, wav, final=True)[0].tolist()
    assert codes == model.encode(wav, energy_norm=False).tolist() and len(codes) == row_count(len(wav))


def test_single_samples_and_a_final_packet_without_any(mini, spoken):
    wav = spoken[6000 : 6000 + STRIDE + 1]
    state, codes = mini.linguistic.start(), []
    for packet in [wav[:2], *wav[2:40].split(1), wav[40:], wav[:0]]:
        found, state = mini.linguistic.push(state, packet)
        codes += found.tolist()
    codes += mini.linguistic.push(state, wav[:0], final=True)[0].tolist()
    assert codes == mini.linguistic.encode(wav, energy_norm=False).tolist()


# ---- the listener ----


@settings(max_examples=8, deadline=None, derandomize=True)
@given(sizes=st.lists(SIZES, max_size=8), every=st.sampled_from([0.05, 0.24, 0.5]))
def test_whatever_the_packets_the_ids_are_those_of_listening_afterwards(tiny, sizes, every):
    wav, listener, heard = swell(), tiny.listener(every=every, prefill=False), 0
    for packet in cut(wav, sizes):
        ids, heard = listener.push(packet), heard + len(packet)
        if listener.heard == heard and ids:  # a look has just been taken
            assert ids == tiny.listen((wav[:heard], RATE))[: len(ids)]
    heard = wav[:heard]
    assert listener.finish() == tiny.listen((heard, RATE)) == listener.finish()


def test_a_shipped_question_with_shipped_weights(mini, spoken):
    listener = pushed(mini.listener(prefill=False), spoken, 320)
    assert listener.finish() == mini.listen((spoken, RATE))
    assert listener.restarts > 0


def test_finished_pieces_stay_until_a_louder_sample(tiny, monkeypatch):
    wav, encoded, encode = torch.from_numpy(tone(34)), [], tiny.semantic.encode
    monkeypatch.setattr(tiny.semantic, "encode", lambda wav, **how: (encoded.append(len(wav)), encode(wav, **how))[1])
    wav[0] = 0.9
    listener = pushed(tiny.listener(every=2, prefill=False), wav, RATE)
    assert max(encoded) == PIECE and encoded[-1] == len(wav) - PIECE and listener.restarts == 0
    assert tiny.listen((wav, RATE)) == listener.finish()
    louder = torch.cat([wav, wav.new_tensor([0.99]), wav[:RATE]])
    again = pushed(tiny.listener(every=2, prefill=False), louder, len(wav))
    assert again.finish() == tiny.listen((louder, RATE)) and again.restarts == 1


def test_faults_are_those_of_a_question_in_a_file(tiny):
    for wav, fault in ((torch.zeros(RATE), "silent"), (torch.zeros(0), "no samples"), (swell(0.03), "at least 60 ms"),
                       (swell(0.07), "too short")):
        listener = tiny.listener(prefill=False)
        listener.push(wav)
        with pytest.raises(audio.AudioError, match=fault):
            listener.finish()
    ended = tiny.listener()
    ended.push(swell())
    with pytest.raises(audio.AudioError, match="more than 60 s"):
        ended.push(torch.ones(60 * RATE))
    assert ended.finish() == tiny.listen((swell(), RATE))
    with pytest.raises(ValueError, match="has ended"):
        ended.push([0.1])


# ---- a microphone left running ----


def around(wav, lead, tail, level=0.0):
    """A question with so many seconds of silence or faint noise before and after it."""
    noise = torch.randn(int((lead + tail) * RATE) + len(wav), generator=torch.Generator().manual_seed(0)) * level
    start = int(lead * RATE)
    noise[start : start + len(wav)] += wav
    return noise


@pytest.mark.parametrize(("lead", "tail", "level"), [(2, 3, 0), (0, 4, 1e-3), (1.37, 0, 1e-3), (3, 2.2, 2e-3)])
def test_silence_is_left_out_alike_live_and_afterwards(tiny, lead, tail, level):
    wav, listener, heard = around(swell(), lead, tail, level), tiny.listener(every=0.3), 0
    for packet in wav.split(1000):
        ids, heard = listener.push(packet), heard + len(packet)
        if listener.heard == heard and ids and wav[:heard].abs().max() > audio.SILENCE:
            assert ids == tiny.listen((wav[:heard], RATE))[: len(ids)]
    assert listener.finish() == tiny.listen((wav, RATE))
    assert len(listener.ids) < 5 * (1.5 + 2 * 0.75 + 0.2) / 0.12


def test_a_pause_in_a_question_is_heard_and_restarts_nothing(tiny):
    wav = torch.cat([torch.from_numpy(tone(1)), torch.zeros(2 * RATE), torch.from_numpy(tone(1)), torch.zeros(RATE)])
    listener = pushed(tiny.listener(every=0.3, prefill=False), wav, 500)
    before = listener.restarts
    pushed(listener, torch.zeros(20_000), 1000)
    assert listener.finish() == tiny.listen((wav, RATE)) and listener.restarts == before


@pytest.mark.parametrize(("lead", "tail", "level"), [(0, 10, 0), (5, 5, 0), (7.3, 20, 1e-3)])
def test_silence_around_a_shipped_question_changes_no_answer(mini, spoken, lead, tail, level):
    def said(wav):
        steps = mini.generate(mini.prompt(mini.listen((wav, RATE))), temperature=0, max_tokens=18)
        return mini.text.decode([step.id for step in steps if step.kind == "text"])

    assert said(around(spoken, lead, tail, level)) == said(spoken) != ""


# ---- faults in a live session ----


@pytest.mark.parametrize("bad", [
    torch.full((4000,), float("nan")), torch.full((10,), -float("inf")), "sound", [[0.1, 0.2], [0.3, 0.4]], [None],
    torch.zeros(2, 2, 2), torch.zeros(5).bool(),
])  # fmt: skip
def test_a_packet_that_is_refused_was_never_sent(tiny, bad):
    wav, listener = swell(), tiny.listener(every=0.3)
    for i, packet in enumerate(wav.split(2000)):
        if i in (0, 3, 7):
            before = dict(vars(listener))
            with pytest.raises(audio.AudioError):
                listener.push(bad)
            assert vars(listener) == before
        listener.push(packet)
    assert listener.finish() == tiny.listen((wav, RATE))


def test_packets_come_in_every_type(tiny):
    wav, expected = swell(), None
    ints = (wav * 32767).short()
    for packets in (ints.split(3000), [p.numpy() for p in ints.split(3000)], [p.numpy().astype(">i2") for p in
                    ints.split(999)], [memoryview(p.numpy()) for p in (ints / 32768).split(5000)], [ints]):
        listener = tiny.listener(prefill=False)
        for packet in packets:
            listener.push(packet)
        expected = expected or listener.finish()
        assert listener.finish() == expected


def test_a_question_too_short_may_go_on(tiny):
    wav, listener = swell(), tiny.listener(every=0.3)
    listener.push(wav[:1100])
    for _ in range(2):
        with pytest.raises(audio.AudioError, match="too short"):
            listener.finish()
    listener.push(wav[1100:])
    assert listener.finish() == tiny.listen((wav, RATE))


class Interrupts:
    """Raises at the n-th call of any of these functions, before or after it does its work."""

    def __init__(self, monkeypatch, places, at, after=False):
        self.calls, self.at, self.after = 0, at, after
        for owner, name in places:
            monkeypatch.setattr(owner, name, self.around(getattr(owner, name)))

    def around(self, function):
        def wrapper(*args, **kwargs):
            self.calls += 1
            if self.calls == self.at and not self.after:
                raise KeyboardInterrupt
            mine, result = self.calls, function(*args, **kwargs)
            if mine == self.at and self.after:
                raise KeyboardInterrupt
            return result

        return wrapper


def places_of(tiny, listener):
    """Whatever a look calls."""
    layers = [(layer, "forward") for layer in tiny.backbone.model.layers]
    return [
        (tiny.semantic, "encode"), (tiny.linguistic, "push"), (tiny.linguistic.encoder, "forward"), (tiny, "prompt"),
        (tiny.semantic.encoder, "forward"), (audio, "energy_norm"), (audio, "endpoints"), *layers,
        (listener.prefill.decoder, "feed"), (listener.prefill, "rewind"), (tiny.backbone.model.embed_tokens, "forward"),
    ]  # fmt: skip


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_an_interrupt_anywhere_changes_nothing_that_is_heard_or_said(tiny, after):
    wav, options = swell(0.9), {"seed": 1, "max_tokens": 12}
    expected = tiny.listen((wav, RATE))
    said, at, hits = tiny.ask(expected, **options).tokens, 0, 0
    while True:
        at, listener = at + 1, tiny.listener(every=0.3)
        with pytest.MonkeyPatch.context() as patch:
            fault = Interrupts(patch, places_of(tiny, listener), at, after)
            for packet in wav.split(1600):
                before = dict(vars(listener))
                try:
                    listener.push(packet)
                except KeyboardInterrupt:
                    hits += 1
                    assert vars(listener) == {**before, "wav": listener.wav}  # the samples are taken, nothing else is
                    assert torch.equal(listener.wav, torch.cat([before["wav"], packet]))
            for _ in range(2):
                try:
                    ids = listener.finish()
                    break
                except KeyboardInterrupt:
                    hits += 1
                    assert not listener.ended
        assert ids == expected
        assert listener.stream(**options).answer.tokens == said
        if fault.calls < at:
            break
    assert hits == at - 1 > 20


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_an_interrupted_reading_of_a_prompt_changes_no_answer(tiny, after):
    first, other, options = tiny.prompt([*range(50, 80)]), tiny.prompt([*range(70, 110)]), {"seed": 1, "max_tokens": 40}
    expected = [step.id for step in tiny.generate(other, **options)]
    for at in range(1, 12):
        reader = Prefill(tiny.backbone, 400)
        reader.read(first)
        with pytest.MonkeyPatch.context() as patch:
            places = [(layer, "forward") for layer in tiny.backbone.model.layers]
            places += [(reader.decoder, "feed"), (tiny.backbone.model.embed_tokens, "forward")]
            Interrupts(patch, places, at, after)
            with pytest.raises(KeyboardInterrupt):
                reader.read(other)
                reader.read(first)
                list(tiny.generate(other, prefill=reader, **options))
        assert [step.id for step in tiny.generate(other, prefill=reader, **options)] == expected


# ---- an early answer ----


@pytest.mark.parametrize("history", [(), (("user", "seven"), ("assistant", "twelve"))])
def test_reading_while_listening_changes_no_answer_and_is_not_repeated(tiny, monkeypatch, history):
    wav, short, fed = swell(), {"seed": 2, "max_tokens": 80}, []
    listener = tiny.listener(history=history)
    feed = listener.prefill.decoder.feed
    monkeypatch.setattr(listener.prefill.decoder, "feed", lambda x: (fed.append(x.shape[1]), feed(x))[1])
    prompt = tiny.prompt(pushed(listener, wav, 320).finish(), history)
    next(tiny.generate(prompt, prefill=listener.prefill))
    assert fed[-1] == 1 and len(fed) > 5
    assert listener.stream(**short).answer.tokens == tiny.ask((wav, RATE), history=history, **short).tokens


def test_the_bench_reports_what_it_found(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(loading, "load", lambda *args, **options: tiny)
    monkeypatch.setattr(streaming, "STEPS", (0.24,))
    out = tmp_path / "streaming.json"
    bench.main("streaming", preset="tiny", limit=1, out=out)
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["what"] == "streaming" and found["questions"] == 1 and found["every 0.24 s"]["equal"] == 1
    assert found["answers"]["first_id"] > 0 and "semantic_changed" in capsys.readouterr().out


def test_changes_are_counted_by_distance():
    found = list(streaming.changes([5, 6, 7], [5, 0, 0], 0.6, "linguistic"))
    assert found == [((0.5, 1), False), ((0.5, 1), True), ((0.24, 0.5), True)]
