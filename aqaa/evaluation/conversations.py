"""`aqaa bench turns`: dialogues made of recordings, with pauses, hesitations, noise and barge-in.

A person who is never there asks the shipped questions. Sound comes in packets of 20 ms by a clock
of its own, and the work of the model takes the time that it really takes (or `cost` seconds a
unit): packets that come meanwhile wait, as in a microphone's buffer. The same dialogue is held with
and without speculation, so that what a speculation saves is a difference of one question."""

import gc
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from aqaa import audio
from aqaa.config import SAMPLE_RATE
from aqaa.conversation import Conversation, State
from aqaa.corpus import degrade
from aqaa.evaluation import streaming
from aqaa.evaluation.accuracy import share
from aqaa.evaluation.speed import busy_machine
from aqaa.evaluation.streaming import PACKET

KINDS = {"plain": 0.35, "hesitation": 0.25, "noise": 0.15, "barge_in": 0.15, "cough": 0.10}
BACKGROUND = -65.0  # dB below full scale, of the quiet room
SNR = 15.0  # dB, of questions in noise
HESITATIONS = 0.3, 1.1  # seconds; some are longer than the pause that ends a turn
COUGH = 0.4  # seconds, of noise
LONGEST = 60.0  # seconds until a turn without an end counts as lost
PACE = 5.0  # times as long a wait before a turn of a long conversation: 200 take half an hour
WINDOW, GROWTH = 20, 5.0  # turns at its ends that are compared; percent more memory it may take


@dataclass(frozen=True)
class Said:
    """What the person does in a turn: wait (s), then (N,) samples; cough: noise in the answer."""

    kind: str
    wait: float
    sound: np.ndarray
    cough: bool = False


def spoken(wav):
    """The part of (N,) at 16 kHz from its first to its last frame within 25 dB of its level."""
    energy, level = audio.energies(wav)
    loud = (energy > audio.FAINT * level).nonzero()
    return wav[160 * int(loud[0]) : 160 * int(loud[-1]) + 160]


def script(wavs, n, seed, pace=1.0):
    """n turns (Said) of questions (N,), each in a kind of KINDS; the first is plain."""
    rng, made = np.random.default_rng(seed), []
    for i in range(n):
        kind = rng.choice(list(KINDS), p=list(KINDS.values())) if i else "plain"
        sound = spoken(wavs[rng.integers(len(wavs))]).numpy()
        wait = rng.uniform(0.3, 1.5)
        if kind == "hesitation":
            at = _faintest(sound)
            gap = np.zeros(int(rng.uniform(*HESITATIONS) * SAMPLE_RATE), np.float32)
            sound = np.concatenate([sound[:at], gap, sound[at:]])
        if kind == "noise":
            sound = degrade.noise(sound, SNR, rng, rng.uniform(0, 0.9)).astype(np.float32)
        wait *= 1 if kind == "barge_in" else pace
        made.append(Said(str(kind), wait, sound, kind == "cough"))
    return made


def _faintest(sound):
    """The middle of the faintest 50 ms in the middle half of a question: between words, mostly."""
    energy = np.convolve(sound**2, np.ones(800), "same")
    n = len(sound)
    return n // 4 + int(energy[n // 4 : n - n // 4].argmin())


class Room:
    """A person, a clock and a Conversation. cost: seconds of a unit of work, None: as it takes."""

    def __init__(self, model, cost=None, seed=0, sampling=None, **options):
        self.now = self.sound = 0.0  # of the clock, of the microphone
        self.cost, self.rng, self._began = cost, np.random.default_rng(seed), None
        self.talk = Conversation(model, clock=self.clock, **options, **sampling or {})
        self.detector, self.frame = self.talk.detector, self.talk.detector.frame
        self.talk.detector, self.heard = self, 0  # samples that came so far

    def __call__(self, frame):  # it is the talk's detector, and counts
        self.heard += len(frame)
        return self.detector(frame)

    def clock(self):
        """Seconds; they go on while the model works."""
        if self._began is None:
            return self.now
        return self.now + (time.perf_counter() - self._began if self.cost is None else self.cost)

    def play(self, sound):
        """(N,) samples reach the microphone in real time, over the noise of the room -> Events."""
        events, level = [], 10 ** (BACKGROUND / 20)
        sound = sound + level * self.rng.standard_normal(len(sound))
        for packet in torch.from_numpy(sound.astype(np.float32)).split(PACKET):
            self.sound += len(packet) / SAMPLE_RATE
            while self.talk.busy and self.now < self.sound:
                self._began = time.perf_counter()
                events += self.talk.work()
                self.now, self._began = self.clock(), None
            self.now = max(self.now, self.sound)
            events += self.talk.push(packet)
        return events

    def until(self, condition):
        """Quiet until condition(its events) or LONGEST seconds -> Events."""
        events, ends = [], self.sound + LONGEST
        while not condition(events) and self.sound < ends:
            events += self.play(np.zeros(PACKET))
        return events

    def turn(self, said):
        """One turn -> its row: kind; lost; latency in s from the last sound of the question to the
        first of the answer; cut: answered in mid-question; resumed, used: a speculation was
        discarded, or let out; interruptions: by this question; barge_in, wrong_interruption: None,
        or whether there was one; behind_s: how long the packets wait by then."""
        talk, used = self.talk, self.talk.counts["used"]
        self.play(np.zeros(int(said.wait * SAMPLE_RATE)))
        wanted = said.kind == "barge_in" and talk.state is State.REPLYING
        events = self.play(said.sound)
        end, cut = self.sound, any(reply(events[: i + 1]) is not None for i in range(len(events)))
        events += self.play(np.zeros(SAMPLE_RATE // 2)) if cut else []  # the rest may interrupt yet
        events += self.until(lambda seen: reply(events + seen) is not None
                             or any(event.kind == "refused" for event in seen))  # fmt: skip
        kinds, first = [event.kind for event in events], reply(events)
        row = {"kind": said.kind, "lost": first is None, "cut": cut, "resumed": "resumed" in kinds,
               "latency": None if cut or first is None else first - end,
               "used": talk.counts["used"] > used, "wrong_interruption": None,
               "barge_in": "interrupted" in kinds if wanted else None,
               "interruptions": kinds.count("interrupted"),
               "behind_s": self.now - self.sound}  # fmt: skip
        if said.cough and first is not None:
            noise = 0.1 * self.rng.standard_normal(int(COUGH * SAMPLE_RATE))
            row["wrong_interruption"] = "interrupted" in [e.kind for e in self.play(noise)]
        return row

    def dialogue(self, turns, tell=lambda: None):
        """Rows of all turns; before each but a barge-in the person hears the answer out."""
        rows = []
        for said in turns:
            if said.kind != "barge_in":
                self.until(lambda _: self.talk.state is State.SILENCE and not self.talk.busy)
            row, history = self.turn(said), self.talk.model.prompt((), self.talk.history)
            rows.append(row | {"memory_mb": memory(), "history_ids": len(history)})
            tell()
        self.until(lambda _: self.talk.state is State.SILENCE and not self.talk.busy)
        return rows


def reply(events):
    """When the first sound of the answer to the latest question came; None if it has not."""
    ended, first = False, None
    for event in events:
        if event.kind in ("started", "resumed", "interrupted"):
            ended, first = False, None
        elif event.kind == "ended":
            ended = True
        elif ended and first is None and event.kind == "piece" and len(event.audio):
            first = event.at
    return first


def memory():
    """MB of this process that are in memory now; None where the system does not tell."""
    gc.collect()
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:
        return None


def summary(rows, other=()):
    """Numbers of a dialogue's rows; other: those of the same dialogue without speculation.
    memory_mb, latency: [early, late] medians, of memory once all caches are made."""
    heard = [row["latency"] for row in rows]
    saved = [1000 * (b["latency"] - a["latency"]) for a, b in zip(rows, other, strict=False)
            if (a["used"] or b["used"]) and None not in (a["latency"], b["latency"])]  # fmt: skip
    n = max(1, min(WINDOW, len(rows) // 3))
    pairs = {key: [_quantile([row[key] for row in part], 0.5) for part in (first, rows[-n:])]
             for key, first in (("memory_mb", rows[n : 2 * n]), ("latency", rows[:n]))}  # fmt: skip
    early, late = pairs["memory_mb"]
    return {
        "turns": len(rows), "lost": sum(row["lost"] for row in rows),
        "latency_median_s": _quantile(heard, 0.5), "latency_95_s": _quantile(heard, 0.95),
        "used": share(row["used"] for row in rows),
        "saved_ms_median": _quantile(saved, 0.5), "saved_n": len(saved),
        "cut_questions": share(row["cut"] for row in rows if row["kind"] == "hesitation"),
        "barge_ins_heard": share(row["barge_in"] for row in rows),
        "wrong_interruptions": share(row["wrong_interruption"] for row in rows),
        **pairs, "memory_growth_percent": early and 100 * (late / early - 1),
    }  # fmt: skip


def _quantile(values, q):
    values = [value for value in values if value is not None]
    return round(float(np.quantile(values, q)), 4) if values else None


def steady(rows, room):
    """The same of one long conversation (unheard_s: part of a frame waits), and faults by name."""
    asked = sum(row["interruptions"] for row in rows)
    found = summary(rows) | {
        "minutes": room.sound / 60, "unheard_s": round(room.sound - room.heard / SAMPLE_RATE, 6),
        "interruptions_by_nobody": room.talk.counts["interruptions"] - asked,
        **{f"{key}_most": max(row[key] for row in rows) for key in ("behind_s", "history_ids")},
    }  # fmt: skip
    apart = max(abs(room.now - room.sound), found["unheard_s"])
    growth = found["memory_growth_percent"] or 0.0
    faults = {"turns": found["lost"] and f"{found['lost']} of {len(rows)} have no answer",
              "clock": apart > PACKET / SAMPLE_RATE and f"it is {apart:.3f} s from the sound heard",
              "memory": growth > GROWTH and f"{growth:.1f} % more at the end"}  # fmt: skip
    return found, {name: text for name, text in faults.items() if text}


def measure(model, seed=0, limit=200, busy=False, long=False, progress=True, cost=None, **sampling):
    """`limit` turns with and without speculation. busy: while every core runs an endless loop;
    long: with it and with longer waits, and whether the conversation ends as it began."""
    wavs = streaming.shipped_questions(pattern="[!u]*.wav")  # not unheard_*: nobody speaks there
    turns, found, results = script(wavs, limit, seed, PACE**long), {}, {}
    with busy_machine() if busy else nullcontext():
        for name, speculate in (("with", True), ("without", False))[: 1 if long else 2]:
            room = Room(model, cost, seed, {"seed": seed} | sampling, speculate=speculate)
            with tqdm(total=limit, desc=f"{name} speculation", disable=not progress) as bar:
                found[name] = room.dialogue(turns, bar.update)
            results[name] = {"counts": dict(room.talk.counts), "drift_s": room.now - room.sound}
    if long:
        row, faults = steady(found["with"], room)
        row |= results["with"] | {"load": getattr(os, "getloadavg", tuple)()}  # of others, too
        return {"busy": busy, "one conversation": row, "faults": faults, "rows": found}
    for name, other in (("with", "without"), ("without", "with")):
        results[name] |= summary(found[name], found[other])
    return {"busy": busy, **{f"{name} speculation": row for name, row in results.items()},
            "rows": found}  # fmt: skip


def table(result):
    return streaming.table({name: row for name, row in result.items() if name != "rows"}, 20)
