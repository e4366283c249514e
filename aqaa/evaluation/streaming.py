"""`aqaa bench streaming`: how early can an answer begin, when listening begins with the question?

Every shipped question is played to a Listener in packets of 20 ms. Counted are the codes that are taken back later, by
their distance from the end of what had been heard; timed are listening itself, and the way from the end of the question
to the first id and the first sound. On a CPU the times are work of one thread, not time of the clock.
"""

import time
from collections import Counter
from itertools import pairwise
from statistics import mean, median

import torch

from aqaa import audio
from aqaa.config import SAMPLE_RATE

PACKET = 320  # samples
STEPS = (0.12, 0.24, 0.48)  # seconds between two looks
BINS = tuple(pairwise((0, 0.12, 0.24, 0.5, 1, 2, 60)))  # seconds from the end of what was heard
CODE_SECONDS = {"linguistic": 0.06, "semantic": 0.04}


def main(args):
    """Measure and print. args: preset, device, seed, json, out, limit (how many questions). ValueError without any."""
    from aqaa import files, loading
    from aqaa.records import about, report

    folder = files.data_folder() / "questions"
    wavs = [audio.load_question(path) for path in sorted(folder.glob("*.wav"))[: args.limit]]
    if not wavs:
        raise ValueError(f"{folder} holds no wav files: set AQAA_DATA to the `data` folder of a clone of aqaa.")
    torch.set_num_threads(1)
    model = loading.load(args.preset, device=args.device)
    model.ask((wavs[0], SAMPLE_RATE), seed=args.seed)  # the first call is slower
    rows = {f"every {every} s": listening(model, wavs, every) for every in STEPS}
    rows["answers"] = answering(model, wavs, args.seed)
    lines = [f"{title:13} {name:22} {value}" for title, row in rows.items() for name, value in row.items()]
    report(args, {**about("streaming", args.device), "questions": len(wavs), **rows}, lines)


def timer(model):
    """A clock in seconds: of work on a CPU, of time on an accelerator."""
    return time.process_time if model.device.type == "cpu" else time.perf_counter


def heard(model, wav, looks=None, **options):
    """A listener that has heard (N,), packet by packet. looks: a list that receives what every look found."""
    listener = model.listener(**options)
    for packet in wav.split(PACKET):
        before = listener.heard
        listener.push(packet)
        if looks is not None and listener.heard != before:
            looks.append((listener.heard, listener.peak, {kind: getattr(listener, kind) for kind in CODE_SECONDS}))
    return listener


def listening(model, wavs, every):
    """Listening with a look every so many seconds: a dict of means over questions, seconds of work as medians.

    equal: share of questions whose ids are those of offline listening; prompt_known: share of the prompt that stands in
    the cache before the last look; work: of both encoders, for a second of question; *_changed: shares of codes taken
    back; *_after_peak: counted in looks after the loudest sample only.
    """
    counts = {(kind, after): Counter() for kind in CODE_SECONDS for after in ("", "_after_peak")}
    rows = [_listen(model, wav, every, counts) for wav in wavs]
    values = {name: [row[name] for row in rows] for name in rows[0]}
    middle = {name: median if name.startswith("work") else mean for name in values}
    return {
        **{name: round(middle[name](found), 4) for name, found in values.items()},
        **{f"{kind}_changed{after}": _shares(count) for (kind, after), count in counts.items()},
    }


def _listen(model, wav, every, counts):
    clock, seconds, looks = timer(model), len(wav) / SAMPLE_RATE, []
    began = clock()
    expected = model.listen((wav, SAMPLE_RATE))
    offline = clock() - began
    heard(model, wav, every=every, prefill=False).finish()
    live = clock() - began - offline
    listener = heard(model, wav, looks, every=every)
    prompt = model.prompt(expected)
    known, ids = listener.prefill.known(prompt), listener.finish()
    settled = [bool(peak == listener.peak) for _, peak, _ in looks]
    for (kind, after), count in counts.items():
        for (samples, _, codes), final in zip(looks, settled, strict=True):
            if final or not after:
                count.update(changes(codes[kind], getattr(listener, kind), samples / SAMPLE_RATE, kind))
    return {
        "equal": ids == expected, "prompt_known": known / len(prompt), "restarts": listener.restarts,
        "looks_after_peak": mean(settled or [0]), "work": live / seconds, "work_offline": offline / seconds,
    }  # fmt: skip


def changes(codes, settled, seconds, kind):
    """Of each code of a look: (bin of its distance from the end at `seconds`, whether it became another one)."""
    for i, (code, final) in enumerate(zip(codes, settled, strict=False)):
        distance = seconds - i * CODE_SECONDS[kind]
        yield next(pair for pair in BINS if distance <= pair[1]), code != final


def _shares(count):
    """{bin: share of its codes that changed}."""
    found = {pair: count[pair, True] + count[pair, False] for pair in BINS}
    return {f"{a}-{b} s": round(count[(a, b), True] / n, 4) for (a, b), n in found.items() if n}


def answering(model, wavs, seed):
    """Medians, in seconds from the end of the question: to the first id and sound, with listening and without.

    start_delay and stalls are by the clock on any device, from the last id of the question on: how long to wait so that
    speech never stalls, and how long it would stall if played at once.
    """
    rows = [_answer(model, wav, seed) for wav in wavs]
    return {name: round(median(row[name] for row in rows), 4) for name in rows[0]}


def _answer(model, wav, seed):
    sound, clock, times = (wav, SAMPLE_RATE), timer(model), {}

    def spent(name, call):
        began = clock()
        result = call()
        times[name] = clock() - began
        return result

    one, other = heard(model, wav), heard(model, wav)
    spent("first_id", lambda: next(model.generate(model.prompt(one.finish()), prefill=one.prefill, seed=seed)))
    spent("first_id_offline", lambda: next(model.generate(model.prompt(model.listen(sound)), seed=seed)))
    spent("first_sound_offline", lambda: next(iter(model.stream(sound, seed=seed))))
    talk, _ = spent("first_sound", lambda: (talk := other.stream(seed=seed), next(iter(talk))))
    delay, gaps = talk.answer.playout
    return {**times, "start_delay": delay, "stalls": sum(gaps[1:])}
