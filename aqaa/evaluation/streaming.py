"""`aqaa bench streaming`: how early can an answer begin, when listening begins with the question?

Every shipped question is played to a Listener in packets of 20 ms. Counted are the codes that are
taken back later, by their distance from the end of what had been heard; timed (on a CPU: the work
of one thread) are listening, and the way from the question's end to the first id and sound."""

import time
from collections import Counter
from itertools import pairwise
from statistics import mean, median

import torch

from aqaa import audio, files
from aqaa.config import SAMPLE_RATE

PACKET = 320  # samples
STEPS = (0.12, 0.24, 0.48)  # seconds between two looks
BINS = tuple(pairwise((0, 0.12, 0.24, 0.5, 1, 2, 60)))  # seconds from the end of what was heard
CODE_SECONDS = {"linguistic": 0.06, "semantic": 0.04}


def measure(model, seed=0, limit=None):
    """Listening and answering with `limit` shipped questions, on one thread. Raises ValueError."""
    wavs = shipped_questions(limit)
    torch.set_num_threads(1)
    model.ask((wavs[0], SAMPLE_RATE), seed=seed)  # the first call is slower
    rows = {f"every {every} s": listening(model, wavs, every) for every in STEPS}
    return {"questions": len(wavs), **rows, "answers": answering(model, wavs, seed)}


def shipped_questions(limit=None, pattern="*.wav"):
    """The shipped questions, (N,) each, `limit` at most. Raises ValueError if there are none."""
    folder = files.data_folder() / "questions"
    wavs = [audio.load_question(path) for path in sorted(folder.glob(pattern))[:limit]]
    if not wavs:
        raise ValueError(f"{folder} holds no wav files: "
                         "set AQAA_DATA to the `data` folder of a clone of aqaa.")  # fmt: skip
    return wavs


def table(result, width=13):
    """The groups of a result as text, a line a value. width: of their titles."""
    rows = {title: row for title, row in result.items() if isinstance(row, dict)}
    return "\n".join(f"{title:{width}} {name:22} {value}"
                     for title in rows for name, value in rows[title].items())  # fmt: skip


def timer(model):
    """A clock in seconds: of work on a CPU, of time on an accelerator."""
    return time.process_time if model.device.type == "cpu" else time.perf_counter


def heard(model, wav, looks=None, **options):
    """A listener that has heard (N,), packet by packet. looks: a list for each look's codes."""
    listener = model.listener(**options)
    for packet in wav.split(PACKET):
        before = listener.heard
        listener.push(packet)
        if looks is not None and listener.heard != before:
            codes = {kind: getattr(listener, kind) for kind in CODE_SECONDS}
            looks.append((listener.heard, listener.peak, codes))
    return listener


def listening(model, wavs, every):
    """Listening with a look every so many seconds: means over questions, medians of work.

    equal: share of questions whose ids are those of offline listening; prompt_known: share of the
    prompt that stands in the cache before the last look; work: of both encoders, for a second of
    question; *_changed: shares of codes taken back; *_after_peak: counted in looks after the
    loudest sample only."""
    counts = {(kind, after): Counter() for kind in CODE_SECONDS for after in ("", "_after_peak")}
    rows = [_listen(model, wav, every, counts) for wav in wavs]
    middle = {name: median if name.startswith("work") else mean for name in rows[0]}
    result = {name: round(middle[name]([row[name] for row in rows]), 4) for name in rows[0]}
    for (kind, after), count in counts.items():
        totals = {pair: count[pair, True] + count[pair, False] for pair in BINS}
        shares = {f"{a}-{b} s": count[(a, b), True] / n for (a, b), n in totals.items() if n}
        result[f"{kind}_changed{after}"] = {span: round(x, 4) for span, x in shares.items()}
    return result


def _listen(model, wav, every, counts):
    clock, seconds, looks = timer(model), len(wav) / SAMPLE_RATE, []
    began = clock()
    expected = model.listen((wav, SAMPLE_RATE))
    offline = clock() - began
    # The encoders alone are timed; a second listener also reads the prompt, and shows its codes.
    heard(model, wav, every=every, prefill=False).finish()
    live = clock() - began - offline
    listener = heard(model, wav, looks, every=every)
    prompt = model.prompt(expected)
    known, ids = listener.prefill.known(prompt), listener.finish()
    settled = [bool(peak == listener.peak) for _, peak, _ in looks]
    for (kind, after), count in counts.items():
        for (samples, _, codes), final in zip(looks, settled, strict=True):
            if final or not after:
                now = samples / SAMPLE_RATE
                count.update(changes(codes[kind], getattr(listener, kind), now, kind))
    return {"equal": ids == expected, "prompt_known": known / len(prompt),
            "restarts": listener.restarts, "looks_after_peak": mean(settled or [0]),
            "work": live / seconds, "work_offline": offline / seconds}  # fmt: skip


def changes(codes, settled, seconds, kind):
    """Of each code of a look: (bin of its distance from the end, whether it changed)."""
    for i, (code, final) in enumerate(zip(codes, settled, strict=False)):
        distance = seconds - i * CODE_SECONDS[kind]
        yield next(pair for pair in BINS if distance <= pair[1]), code != final


def answering(model, wavs, seed):
    """Medians of seconds from the question's end to the first id and sound, live and offline.
    start_delay and stalls are by the clock on any device, from the last id of the question on: how
    long to wait so that speech never stalls, and how long it would stall if played at once."""
    rows = [_answer(model, wav, seed) for wav in wavs]
    return {name: round(median(row[name] for row in rows), 4) for name in rows[0]}


def _answer(model, wav, seed):
    sound, clock, times = (wav, SAMPLE_RATE), timer(model), {}

    def timed(name, call):
        began = clock()
        result = call()
        times[name] = clock() - began
        return result

    def first_id(ids, **options):
        return next(model.generate(model.prompt(ids), seed=seed, **options))

    def first_sound(talk):  # the stream, once its first sound is made
        next(iter(talk))
        return talk

    one, other = heard(model, wav), heard(model, wav)
    timed("first_id", lambda: first_id(one.finish(), prefill=one.prefill))
    timed("first_id_offline", lambda: first_id(model.listen(sound)))
    timed("first_sound_offline", lambda: first_sound(model.stream(sound, seed=seed)))
    talk = timed("first_sound", lambda: first_sound(other.stream(seed=seed)))
    delay, gaps = talk.answer.playout
    return {**times, "start_delay": delay, "stalls": sum(gaps[1:])}
