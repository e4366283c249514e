"""Features and codes on disk: what the tokenizers hear, in the order asked for, written whole or not at all."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aqaa import audio
from aqaa.corpus.codes import load_codes, store_codes
from aqaa.files import ModelError
from aqaa.tokenizers.linguistic import LinguisticTokenizer, row_count
from aqaa.tokenizers.semantic import SemanticTokenizer
from aqaa.training import features as K
from tests import tones
from tests.conftest import tiny_config

CONFIG = tiny_config()


class Shelf:
    """Stands in for a Corpus: three recordings and who speaks them."""

    def __init__(self):
        said = (("a0", "answer", "seven plus five"), ("q1", "question", "hello"), ("g2", "generic", "the moon is up"))
        self.items, self.waves, self.read = [], {}, 0
        for number, (name, role, text) in enumerate(said):
            wave = tones.say("flite:slt", text, SimpleNamespace(rate=1, pitch=1, spread=1))
            self.waves[name] = (wave[: len(wave) - 100 * number] * 16_000).astype(np.int16)
            self.items.append(SimpleNamespace(id=name, role=role, text=text, phones=[*tones.spell(text), "pau"],
                                              length=len(self.waves[name])))  # fmt: skip

    def wav(self, item):
        self.read += 1
        return self.waves[item.id]


@pytest.fixture(scope="module")
def shelf():
    return Shelf()


@pytest.fixture(scope="module")
def folder(shelf, tmp_path_factory):
    return K.prepare(shelf, shelf.items, tmp_path_factory.mktemp("features"), workers=1)


def test_questions_are_heard_at_full_level_and_answers_as_loud_as_they_are(shelf):
    for item in shelf.items:
        wave = shelf.waves[item.id]
        loud, quiet = (K.as_heard(item, samples) for samples in (wave, (wave * 0.25).astype(np.int16)))
        assert loud.dtype == torch.float32 and loud.shape == wave.shape
        if item.role == "answer":
            assert torch.equal(loud, torch.from_numpy(wave / np.float32(32768)))
            assert quiet.abs().max() < 0.3 * loud.max()
        else:
            assert torch.equal(loud, audio.energy_norm(torch.from_numpy(wave / np.float32(32768))))
            assert loud.abs().max() == pytest.approx(quiet.abs().max().item(), rel=1e-3)


def test_rows_are_those_the_tokenizers_see(shelf, folder):
    lfr, mels = (K.utterances(folder, shelf.items, kind) for kind in ("lfr", "log_mel"))
    for i, item in enumerate(shelf.items):
        wave = K.as_heard(item, shelf.wav(item))
        x, lengths = lfr.gather([i])
        assert lengths[0] == row_count(len(wave))
        assert torch.allclose(x[0], LinguisticTokenizer(CONFIG.linguistic).features(wave), rtol=2e-3, atol=2e-2)
        x, lengths = mels.gather([i])
        assert lengths[0] == len(wave) // 640
        log_mel = SemanticTokenizer(CONFIG.semantic).features(wave)[:, : 4 * lengths[0]]
        assert torch.allclose(x.reshape(-1, 128).T, log_mel, atol=2e-3)


def test_pitch_is_in_octaves_above_its_floor(shelf, folder):
    data = K.utterances(folder, shelf.items, "log_mel")
    octaves, _ = data.gather([0], data.extra["f0"])
    voiced = octaves[octaves > 0]
    assert (octaves >= 0).all() and 0.5 < len(voiced) / octaves.numel() < 1  # the rest is the silence at both ends
    base = 195 * (0.95 + tones.crc32(b"flite:slt") % 100 / 1000)
    assert 60 * 2 ** voiced.median().item() == pytest.approx(base, rel=0.05)
    assert octaves.shape[2:] == (4,) and len(data.extra["f0"]) == len(data.rows)


def test_phones_and_weights_belong_to_the_items(shelf, folder):
    data = K.utterances(folder, shelf.items, "lfr")
    assert data.weights.tolist() == [K.ANSWER_SHARE, 1, 1] and data.extra == {}
    assert data.phones == [K.phone_ids(item.phones) for item in shelf.items]
    assert len(data.phones[0]) == len(shelf.items[0].phones) - 1  # without the pause


def test_features_are_computed_once(shelf, folder):
    before = shelf.read, (folder / "lfr.npy").stat().st_mtime_ns
    assert K.prepare(shelf, shelf.items, folder, workers=1) == folder
    assert (shelf.read, (folder / "lfr.npy").stat().st_mtime_ns) == before


def test_another_list_of_items_is_computed_anew(shelf, tmp_path):
    K.prepare(shelf, shelf.items[:1], tmp_path, workers=1)
    K.prepare(shelf, shelf.items[1:], tmp_path, workers=1)
    data = K.utterances(tmp_path, shelf.items[1:], "lfr")
    assert len(data.lengths) == 2 and data.lengths.sum() == len(data.rows)


def test_an_interruption_leaves_no_features(shelf, tmp_path, monkeypatch):
    monkeypatch.setattr(K, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        K.prepare(shelf, shelf.items[:1], tmp_path, workers=1)
    assert not (tmp_path / "features.json").exists()
    monkeypatch.undo()
    K.prepare(shelf, shelf.items[:1], tmp_path, workers=1)
    assert len(K.utterances(tmp_path, shelf.items[:1], "lfr").lengths) == 1


def test_measured_rows_are_what_the_finished_tokenizer_makes(shelf, folder):
    data = K.utterances(folder, shelf.items, "lfr")
    model = LinguisticTokenizer(CONFIG.linguistic)
    K.measure_cmvn(data, model)
    rows = (torch.from_numpy(data.rows.astype(np.float32)) + model.add_shift) * model.rescale
    assert rows.mean(0).abs().max() < 0.02 and (rows.std(0) - 1).abs().max() < 0.02
    for i, item in enumerate(shelf.items):
        x, _ = data.gather([i])
        wanted = model.features(K.as_heard(item, shelf.wav(item)))
        assert ((x[0] + model.add_shift) * model.rescale - wanted).abs().max() < 0.05  # fp16 on disk


def test_a_sample_of_many_rows_measures_them():
    rows = (3 + 2 * np.random.default_rng(0).standard_normal((450_000, 4))).astype(np.float16)
    model = SimpleNamespace(add_shift=torch.zeros(4), rescale=torch.zeros(4))
    K.measure_cmvn(SimpleNamespace(rows=rows), model)
    assert (model.add_shift + 3).abs().max() < 0.02 and (model.rescale - 0.5).abs().max() < 0.01


codes = st.lists(st.integers(0, 1023), max_size=12).map(np.array)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(codes, codes), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_codes_come_back_in_any_order(tmp_path_factory, pairs, random):
    folder = tmp_path_factory.mktemp("codes")
    items = [SimpleNamespace(id=f"q{i}") for i in range(len(pairs))]
    store_codes(folder / "codes.npz", [item.id for item in items], *zip(*pairs, strict=True))
    order = random.sample(range(len(items)), len(items))
    for index, found in zip(order, load_codes(folder, [items[i] for i in order]), strict=True):
        for stored, loaded in zip(pairs[index], found, strict=True):
            assert loaded.dtype == np.int64 and np.array_equal(stored, loaded)


@pytest.mark.parametrize("name, data", [
    ("features.json", b'{"ids": ["a0"'), ("features.json", b"{}"), ("lfr.npy", b""), ("lfr.npy", None),
])  # fmt: skip
def test_torn_features_are_one_sentence(tmp_path, name, data):
    shelf = Shelf()
    K.prepare(shelf, shelf.items, tmp_path, workers=1)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-99] if data is None else data)
    with pytest.raises(ModelError, match=f"{name} is cut short or damaged .*: remove features.json"):
        K.utterances(tmp_path, shelf.items, "lfr")


@pytest.mark.parametrize("data", [b"", b"PK\3\4 and no more", bytes(300)])
def test_torn_codes_are_one_sentence(tmp_path, data):
    (tmp_path / "codes.npz").write_bytes(data)
    with pytest.raises(ModelError, match="codes.npz is cut short or damaged .*: run `aqaa train codes` again.$"):
        load_codes(tmp_path, [])


def test_codes_before_their_stage_are_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no codes.npz: run `aqaa train codes` first"):
        load_codes(tmp_path, [])


def test_half_a_file_never_replaces_a_whole_one(shelf, tmp_path, monkeypatch):
    K.prepare(shelf, shelf.items[:1], tmp_path, workers=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        K.prepare(shelf, shelf.items[1:], tmp_path, workers=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
