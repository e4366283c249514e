"""Voices: every job gets its own sound, manners differ as they should, a variation keeps its promises.

The logic is tried with the speaker of tones; where the synthesizers are installed, once more with them.
"""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from aqaa.corpus import degrade, engines
from aqaa.corpus import voices as V
from tests import tones


@pytest.fixture(scope="module", params=["tones", "engines"] if tones.ENGINES else ["tones"])
def manners(request):
    """Measures of each manner, the mean of two sentences: {manner: {f0, spread, rate, level}}."""
    say = engines.synthesize if request.param == "engines" else tones.synthesize
    texts = ["the little dog ran after the ball", "seven plus five is equal to twelve"]
    jobs = [(V.ANSWER_VOICE, text, how) for how in V.MANNERS.values() for text in texts]
    names, measured = np.repeat(list(V.MANNERS), 2), {}
    for name, sound in zip(names, say(jobs)):
        speech = V.trim(V.say_answer(*sound, name) / np.float32(32768))
        measured.setdefault(str(name), []).append(V.measure(speech, 9) | {"level": 20 * np.log10(degrade.rms(speech))})
    return {n: {key: np.mean([m[key] for m in both]) for key in both[0]} for n, both in measured.items()}


@pytest.mark.parametrize(
    "name, key, low, high",
    [
        ("slow", "rate", 0, 0.75), ("fast", "rate", 1.3, 9), ("high", "f0", 1.3, 9), ("low", "f0", 0, 0.77),
        ("happy", "f0", 1.2, 9), ("happy", "rate", 1.1, 9), ("happy", "spread", 1.2, 9), ("sad", "rate", 0, 0.85),
        ("sad", "f0", 0, 0.9), ("sad", "spread", 0, 0.7), ("angry", "rate", 1.15, 9), ("calm", "rate", 0, 0.92),
    ],
)  # fmt: skip
def test_manners_differ_from_normal_in_the_right_direction(manners, name, key, low, high):
    assert low < manners[name][key] / manners["normal"][key] < high


def test_levels_of_the_manners(manners):
    level = {name: values["level"] for name, values in manners.items()}
    assert -21.5 < level["normal"] < -18.5
    assert level["loud"] > level["normal"] + 4 and level["angry"] > level["normal"] + 4
    assert level["soft"] < level["normal"] - 7 and level["sad"] < level["normal"] - 2


def test_a_variation_keeps_its_promises():
    rng = np.random.default_rng(0)
    speech = np.sin(np.arange(16_000) * 0.05).astype(np.float32)
    clean = V.Draw(gain=-20, lead=0.1, trail=0.2)
    wav = V.vary(speech, clean, rng)
    assert len(wav) == 16_000 + 4800 and not wav[:1600].any()
    assert abs(20 * np.log10(degrade.rms(wav[1600:17_600] / 32768)) + 20) < 0.1
    noisy = V.vary(speech, V.Draw(gain=-20, lead=0.1, trail=0.2, snr=20), rng)
    assert abs(20 * np.log10(degrade.rms(noisy[:1600] / 32768)) + 40) < 1
    assert len(V.to_16k(speech, 16_000, 1.1)) == pytest.approx(16_000 / 1.1, rel=0.01)


@pytest.mark.parametrize("want", ["man", "woman"])
def test_voices_picked_for_a_class_may_reach_it(want):
    rng = np.random.default_rng(0)
    for pool in (V.TRAINING, V.EVALUATION):
        picked = {V.pick(rng, pool, want) for _ in range(50)}
        assert len(picked) > 2 and {V.gender(voice) for voice in picked} == {want}
        assert not any("hts" in voice for voice in picked)


def test_full_scale_is_never_clipped():
    loud = 3 * np.sin(np.arange(1000))
    assert np.abs(V.to_int16(loud)).max() == 32767
    assert np.corrcoef(V.to_int16(loud), loud)[0, 1] > 0.99999


def test_every_job_gets_its_own_sound_and_festival_one_process(monkeypatch):
    """Engines that write the number in the text instead of speech: the order is kept, each voice is loaded once."""
    commands, script = [], ""

    def run(command, text=None):
        nonlocal script
        commands.append(command[0])
        told, paths = f"{command} {text}", [command[-1]]
        if command[0] == "festival":
            told = script = Path(command[-1]).read_text(encoding="utf-8")
            paths = re.findall(r'utt\.save\.wave u "(.+?)"', script)
        for number, path in zip(re.findall(r"text (\d+)", told), paths, strict=True):
            soundfile.write(path, np.full(9, (1 + int(number)) / 64), 16_000)

    monkeypatch.setattr(engines, "_run", run)
    names = ["festival:kal_diphone", "flite:awb", "espeak:en-us+m1", "festival:ked_diphone", "flite:slt"] * 2
    draws = [V.draw(np.random.default_rng(i)) for i in range(len(names))]
    sounds = engines.synthesize([(name, f"text {i}", draws[i]) for i, name in enumerate(names)])
    assert [samples[0] * 64 - 1 for samples, _ in sounds] == list(range(len(names)))
    assert sorted(commands) == ["espeak-ng"] * 2 + ["festival"] + ["flite"] * 4
    assert script.count("(voice_kal_diphone)") == script.count("(voice_ked_diphone)") == 1
    assert all(f'Utterance Text "text {i}{draws[i].mark}"' in script for i in (0, 3, 5, 8))


def test_an_engine_that_fails_is_named():
    with pytest.raises(RuntimeError, match="failed with .*no such voice"):
        engines._run([sys.executable, "-c", "import sys; sys.exit('no such voice')"])


if tones.ENGINES:

    def test_festival_speaks_in_one_process(monkeypatch):
        calls = []
        run = engines._run
        monkeypatch.setattr(engines, "_run", lambda *command: calls.append(command) or run(*command))
        draws = [V.draw(np.random.default_rng(i)) for i in range(3)]
        sounds = engines.synthesize([("festival:kal_diphone", "what is seven plus five", d) for d in draws])
        assert len(calls) == 1 and all(len(samples) > 8000 for samples, _ in sounds)
