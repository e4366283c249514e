"""The released folders, as tiny fakes with the real names: they answer through the command line, and each damage that
a download or a mix-up can do to them is one sentence of its own."""

import io
import json
import math
import os
import pickle
import shutil
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file, save_file

import aqaa
from aqaa import cli, files
from aqaa.fast import prepared
from aqaa.files import ModelError
from aqaa.pipeline import AQAA
from aqaa.weights import model_folder, readers, shards, sources
from tests import release
from tests.conftest import tiny_config, tone
from tests.test_text import field

N_TEXT = 512  # pieces of the small release; the whole way is gone once with 65,536
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    from aqaa import pipeline

    monkeypatch.setitem(pipeline.SAMPLING, "max_tokens", 60)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """{role: folder}; copy before breaking."""
    return release.write(tmp_path_factory.mktemp("small"), N_TEXT)


@pytest.fixture
def copy(small, tmp_path):
    """The folder that holds a copy of all three."""
    return shutil.copytree(small["backbone"].parent, tmp_path / "copy")


def options(folder, *roles):
    return [word for role in roles or sources.ROLES for word in (f"--{role}", str(folder / role))]


def test_the_environment_may_name_the_folders(small, question, monkeypatch):
    for role in sources.ROLES:
        monkeypatch.setenv(f"AQAA_{role.upper()}", str(small[role]))
    by_name = model(small["backbone"].parent).ask(question, max_tokens=20)
    assert aqaa.load("full").ask(question, max_tokens=20).tokens == by_name.tokens
    with pytest.raises(ModelError, match="no-such-folder"):
        aqaa.load("full", vocoder="no-such-folder")  # an argument is stronger


def model(folder, *roles, **more):
    return aqaa.load("full" if not roles else "mini", **{r: folder / r for r in roles or sources.ROLES}, **more)


def fault(use, seconds=math.inf):
    """The sentence of the ModelError that use() raises within so many seconds."""
    began = time.process_time()
    with pytest.raises(ModelError) as caught:
        use()
    assert time.process_time() - began < seconds and "\n" not in str(caught.value)
    return str(caught.value)


# ---- the whole way --------------------------------------------------------------------------------------------------


def test_a_full_release_answers_through_the_command_line(tmp_path, question, capsys):
    release.write(tmp_path / "full")
    args = ["ask", str(question), "--preset", "full", *options(tmp_path / "full"), "-o", str(tmp_path / "out.wav")]
    code = cli.main([*args, "--json"])
    out, err = capsys.readouterr()
    assert code == 0 and err.startswith("aqaa: note: 3 tensors (576 values)") and err.count("\n") == 1
    row = json.loads(out)
    wave, rate = soundfile.read(tmp_path / "out.wav")
    assert rate == 22_050 and len(wave) == int(row["tokens"]["semantic"] / 3 * 5 * 22_050 / 256 / 41.67) * 256
    assert cli.main(["listen", *args[1:-2]]) == 0
    heard = capsys.readouterr()[0]
    assert "prompt" in heard and "answer" in heard


def test_weights_arrive_where_they_belong(small):
    """Each part holds the very values of the files, and the output layer is not the embedding."""
    system = model(small["backbone"].parent)
    state = {}
    for path in sorted(small["backbone"].glob("*.safetensors")):
        state |= load_file(path)
    mine = system.backbone.state_dict()
    assert set(state) - set(mine) == {n for n in state if n.startswith("vi")} and set(mine) <= set(state)
    assert all(torch.equal(value, state[name]) for name, value in mine.items())
    assert not torch.equal(system.backbone.lm_head.weight, system.backbone.model.embed_tokens.weight)
    assert system.backbone.dtype == torch.bfloat16 and not system.backbone.training
    for name in ("flow", "hift"):
        saved = model_folder.build(name, system.config)
        saved.load_state_dict(torch.load(small["vocoder"] / f"{name}.pt", weights_only=True))
        saved = prepared.prepare(saved).state_dict()
        assert all(torch.equal(value, saved[key]) for key, value in getattr(system, name).state_dict().items())
    centroids = np.load(small["tokenizer"] / "linguistic_tokenizer.npy")
    assert torch.equal(system.linguistic.centroids, torch.from_numpy(centroids))
    assert system.linguistic.add_shift.tolist() == [-8.0] * 560 and system.linguistic.config.dither == 0
    assert system.semantic.quantizer._codebook.embed.shape == (4096, 16)
    expected = release.sizes(N_TEXT)
    for name in ("linguistic", "semantic", "hift", "mel"):
        assert getattr(system.config, name) == getattr(expected, name)
    assert system.config.flow.input_frame_rate == 41.67 and system.config.flow.sigma_min == 1e-6
    assert system.ids.n_text == N_TEXT and system.text.decode(system.text.encode("w3 w41")) == "w3 w41"


def test_dtype_is_of_backbone_and_flow_alone(small, question):
    system = model(small["backbone"].parent, dtype="float16")
    kinds = {name: next(getattr(system, name).parameters()).dtype for name in model_folder.PARTS}
    assert {name for name, kind in kinds.items() if kind == torch.float16} == {"backbone", "flow"}
    assert model(small["backbone"].parent).flow.encoder_proj.weight.dtype == torch.float32
    with pytest.raises(ModelError, match="'int4': choose"):
        model(small["backbone"].parent, dtype="int4")


@pytest.fixture
def refused(question, capsys):
    """A function: the one line of `aqaa ask QUESTION` with options that it refuses."""
    def ask(*args):
        assert cli.main(["ask", str(question), *args]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("aqaa: ") and err.count("\n") == 1 and err.endswith(".\n"), err
        return err

    return ask


@pytest.mark.parametrize("role", sources.ROLES)
def test_the_mini_takes_no_part_with_other_codes(small, refused, role):
    assert "take both from one release" in refused(*options(small["backbone"].parent, role))


def test_parts_mix_where_their_ids_fit(tiny_text, small, tmp_path, question):
    """A folder like the mini, with as many codes as the released tokenizers have, takes them and the vocoder."""
    config, ids = tiny_config(), replace(tiny_config().ids, n_linguistic=1024, n_semantic=4096)
    config = replace(
        config, ids=ids, backbone=replace(config.backbone, vocab_size=ids.end),
        linguistic=replace(config.linguistic, codebook_size=1024), flow=replace(config.flow, vocab_size=ids.n_audio),
        semantic=replace(config.semantic, n_codebook_size=4096),
    )  # fmt: skip
    parts = {name: model_folder.build(name, config) for name in model_folder.PARTS} | {"text": tiny_text}
    model_folder.save(AQAA(config, parts.__getitem__), tmp_path / "own")
    (tmp_path / "own" / "flow.safetensors").unlink()  # not needed
    mixed = aqaa.load(tmp_path / "own", tokenizer=small["tokenizer"], vocoder=small["vocoder"])
    answer = mixed.ask(question)
    assert answer.sample_rate == 22_050 and len(answer.audio) and mixed.backbone.config.hidden_size == 16


def test_one_folder_that_holds_the_vocoder_will_do(small, copy):
    (copy / "vocoder").rename(copy / "inner")
    (copy / "vocoder").mkdir()
    (copy / "inner").rename(copy / "vocoder" / "CosyVoice-300M-25Hz")
    assert model(copy).flow is not None
    shutil.copytree(copy / "vocoder" / "CosyVoice-300M-25Hz", copy / "vocoder" / "CosyVoice-300M-25Hz-Music")
    with pytest.raises(ModelError, match="2 vocoders, CosyVoice-300M-25Hz and CosyVoice-300M-25Hz-Music: name one"):
        model(copy)


@pytest.mark.parametrize("names", [
    ["model"], ["model-00001-of-00002", "model-00002-of-00002"], ["a-0", "a-1"], ["model-00001", "model-00002"],
])  # fmt: skip
def test_shards_of_any_name(copy, names):
    folder = copy / "backbone"
    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    for i, name in enumerate(names):
        save_file(dict(list(state.items())[i :: len(names)]), folder / f"{name}.safetensors")
    assert torch.equal(model(copy).backbone.lm_head.weight, state["lm_head.weight"])


def test_nested_configuration_and_prefix(copy):
    """As other releases of the family wrap them: text_config, and the language model below a prefix."""
    folder = copy / "backbone"
    for path in sorted(folder.glob("*.safetensors")):
        save_file({f"language_model.{k}" if k[:2] != "vi" else k: v for k, v in load_file(path).items()}, path)
    (folder / "model.safetensors.index.json").unlink()
    data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    nested = {"model_type": "mmgpt_step1_v2", "text_config": data | {"model_type": "step1"}}
    (folder / "config.json").write_text(json.dumps(nested), encoding="utf-8")
    system = model(copy)
    assert system.backbone.config.hidden_size == 32 and "3 tensors" in system.notes[0]


@pytest.mark.parametrize("content", [b"", b"abc" * 99, pickle.dumps({1: 2}, 2), b"PK\3\4" + bytes(99)])
def test_what_is_no_pickle_of_tensors_is_told(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    assert "a.pt is cut short or no file of torch.save" in fault(lambda: readers.pickled(tmp_path / "a.pt"))


def test_old_names_of_weight_norm_and_old_pickles(copy):
    path = copy / "vocoder" / "hift.pt"
    state = torch.load(path, weights_only=True)
    before = model(copy).hift.conv_pre.kernel()
    renamed = {f"generator.{release.normed(name)}": value for name, value in state.items()}
    torch.save(renamed, path, _use_new_zipfile_serialization=False)
    assert torch.equal(model(copy).hift.conv_pre.kernel(), before)


def test_yaml_is_read_and_never_executed(tmp_path):
    text = release.COSYVOICE_YAML + f"\nx: !!python/object/apply:os.mkdir ['{tmp_path}/made']\ny: !ref <z>\n"
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    data = readers.read_yaml(tmp_path / "a.yaml")
    assert not (tmp_path / "made").exists() and data["__set_seed1"] == [1986]
    assert data["flow"]["decoder"]["estimator"]["channels"] == [16, 16]
    assert yaml.SafeLoader.yaml_multi_constructors != readers.PlainLoader.yaml_multi_constructors


# ---- damages --------------------------------------------------------------------------------------------------------


def damage(change):
    """change(folder, *args) as a function of args that gives a function of the folder."""
    return lambda *args, **more: lambda folder: change(folder, *args, **more)


@damage
def pointer(folder, name):
    (folder / name).write_bytes(POINTER)


@damage
def cut(folder, name, keep=0.7):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(keep * len(data))])


@damage
def gone(folder, *names):
    for name in names:
        (folder / name).unlink()


@damage
def text(folder, name, old, new):
    """Replace words of a file."""
    before = (folder / name).read_bytes()
    assert old.encode() in before
    (folder / name).write_bytes(before.replace(old.encode(), new.encode()))


@damage
def pickle_with(folder, name, change):
    torch.save(change(torch.load(folder / name, weights_only=True)), folder / name)


def without(name, key):
    return pickle_with(name, lambda state: {k: v for k, v in state.items() if k != key})


@damage
def shard_with(folder, change, index=True):
    """Rewrite the shards' tensors; with index=False the index goes."""
    for path in sorted((folder / "backbone").glob("*.safetensors")):
        save_file(change(load_file(path)), path)
    if not index:
        (folder / INDEX).unlink()


@damage
def config_with(folder, **values):
    path = folder / "backbone/config.json"
    data = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}), encoding="utf-8")


@damage
def s3(folder, change=lambda state: state, **more):
    state = model_folder.build("semantic", release.sizes(N_TEXT)).state_dict()
    release.write_s3(folder / ONNX, change(state), **more)


@damage
def record(folder, facts, name="flow.pt"):
    text = json.dumps({"files": {name: facts}})
    (folder / "vocoder/record.json").write_text(text, encoding="utf-8")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb",)


PT, MVN = f"tokenizer/{release.PARAFORMER}/model.pt", f"tokenizer/{release.PARAFORMER}/am.mvn"
PARAFORMER = f"tokenizer/{release.PARAFORMER}/config.yaml"
NPY, ONNX = "tokenizer/linguistic_tokenizer.npy", "tokenizer/speech_tokenizer_v1.onnx"
INDEX, LAST, VOCABULARY = "backbone/model.safetensors.index.json", "backbone/model-00003.safetensors", N_TEXT + 9216
LAYER = "model.layers.1.mlp.up_proj.weight"
DAMAGES = {  # name: (what is done to a copy, words of the sentence that no other damage gives)
    "pointer model.pt": (pointer(PT), "model.pt is a Git LFS pointer"),
    "pointer shard": (pointer(LAST), "model-00003.safetensors is a Git LFS pointer"),
    "pointer onnx": (pointer(ONNX), "speech_tokenizer_v1.onnx is a Git LFS pointer"),
    "pointer yaml": (pointer("vocoder/cosyvoice.yaml"), "cosyvoice.yaml is a Git LFS pointer"),
    "npy missing": (gone(NPY), "linguistic_tokenizer.npy is missing"),
    "npy cut": (cut(NPY), "linguistic_tokenizer.npy is no whole npy file"),
    "npy flat": (lambda f: np.save(f / NPY, np.zeros(9)), "float64 of shape (9,), not a table of centroids"),
    "npy narrow": (lambda f: np.save(f / NPY, np.zeros((1024, 8))), "has rows of 8, config.yaml says 16"),
    "npy short": (lambda f: np.save(f / NPY, np.ones((500, 16))), "linguistic tokenizer has 500 codes"),
    "model.pt missing": (gone(PT), "model.pt is missing"),
    "model.pt cut": (cut(PT), "model.pt is cut short or no file of torch.save"),
    "model.pt foreign": (pickle_with(PT, lambda s: {"a": s["encoder.after_norm.bias"]}), "lacks encoder.encoders0.0"),
    "model.pt empty": (pickle_with(PT, lambda s: {"epoch": 3}), "model.pt holds no named tensors"),
    "model.pt bomb": (lambda f: torch.save({"a": Bomb()}, f / PT), "model.pt wants to run posix.mkdir"),
    "am.mvn": (text(MVN, "<Rescale>", "<Other>"), "am.mvn is no Kaldi normalisation file"),
    "am.mvn short": (lambda f: (f / MVN).write_text(release.mvn(8), encoding="utf-8"), "am.mvn normalises 8 values"),
    "paraformer yaml": (text(PARAFORMER, "encoder:", "encoder: ["), "config.yaml is no yaml that can be read"),
    "offline paraformer": (text(PARAFORMER, "SANMEncoderChunkOpt", "SANMEncoder"), "is of an encoder SANMEncoder:"),
    "deeper paraformer": (text(PARAFORMER, "num_blocks: 3", "num_blocks: 4"), "lacks encoder.encoders.2"),
    "s3 50 Hz": (s3(stride=1), "is the 50 Hz S3 tokenizer"),
    "s3 version 2": (
        text(ONNX, "/blocks.0/attn/out/MatMul", "/blocks.0/attn/fsmn_block"), "is version 2 of the S3 tokenizer"),
    "s3 cut": (cut(ONNX), "speech_tokenizer_v1.onnx is no ONNX file"),
    "s3 other": (s3(lambda s: {k: v for k, v in s.items() if "codebook" not in k}), "is no 25 Hz S3 tokenizer"),
    "s3 lacks": (s3(lambda s: {k: v for k, v in s.items() if "blocks.1.mlp_ln" not in k}), "lacks encoder.blocks.1"),
    "tokenizer.model missing": (gone("backbone/tokenizer.model"), "tokenizer.model is missing"),
    "tokenizer.model cut": (cut("backbone/tokenizer.model"), "tokenizer.model is not a SentencePiece model"),
    "tokenizer.model other": (
        lambda f: (f / "backbone/tokenizer.model").write_bytes(release.sentencepiece(6000)),
        "has 9,728 rows, audio ids go up to 11,119"),
    "tokenizer.model mute": (text("backbone/tokenizer.model", "<audio_0>", "<radio_0>"), "has no <audio_0>"),
    "tokenizer.model markers": (text("backbone/tokenizer.model", "<|EOT|>", "<|TOE|>"), "has <|EOT|> at None"),
    "config missing": (gone("backbone/config.json"), "config.json is missing"),
    "config broken": (cut("backbone/config.json"), "config.json is cut short or damaged"),
    "config of another": (config_with(model_type="qwen2"), "is of model_type 'qwen2'"),
    "config without size": (config_with(num_attention_groups=None), "config.json gives no num_attention_groups"),
    "config heads": (config_with(num_attention_heads=5), "describes no Step-1 model"),
    "config layers": (config_with(num_hidden_layers=4), "lacks model.layers.3"),
    "config fewer layers": (config_with(num_hidden_layers=2), "no place for model.layers.2"),
    "config width": (config_with(intermediate_size=64), "size mismatch for model.layers.0.mlp.gate_proj.weight"),
    "shard missing": (gone(LAST), "lacks model-00003.safetensors of the 3 shards"),
    "shard missing, no index": (gone("backbone/model-00002.safetensors", INDEX), "lacks shard number 2"),
    "no shards": (gone(INDEX, *(f"backbone/model-0000{i}.safetensors" for i in (1, 2, 3))), "holds no *.safetensors"),
    "shard cut": (cut(LAST, 0.9), "model-00003.safetensors is cut short"),
    "shard foreign": (cut(LAST, 0.01), "no safetensors header"),
    "index broken": (lambda f: (f / INDEX).write_text("{}", encoding="utf-8"), "it has no weight_map"),
    "index of another": (text(INDEX, "model.norm.weight", "model.norm.gain"), "does not hold model.norm.gain"),
    "no lm_head": (shard_with(lambda s: {k: v for k, v in s.items() if "lm" not in k}, False), "lacks lm_head.weight"),
    "tensor lost": (shard_with(lambda s: {k: v for k, v in s.items() if k != LAYER}, False), f"lacks {LAYER}"),
    "quantised": (shard_with(lambda s: s | {k: v.char() for k, v in s.items() if k == LAYER}), f"{LAYER} as I8"),
    "flow missing": (gone("vocoder/flow.pt"), "flow.pt is missing"),
    "flow cut": (cut("vocoder/flow.pt"), "flow.pt is cut short or no file of torch.save"),
    "flow of EditX": (
        pickle_with("vocoder/flow.pt", lambda s: s | {"decoder.estimator.blocks.0.w": s["encoder_proj.bias"]}),
        "is the DiT flow of Step-Audio-EditX"),
    "flow without ids": (without("vocoder/flow.pt", "input_embedding.weight"), "holds no input_embedding"),
    "flow of CosyVoice": (
        pickle_with("vocoder/flow.pt", lambda s: s | {"input_embedding.weight": s["input_embedding.weight"][:4096]}),
        "the flow has 4,096 audio ids"),
    "flow with more": (
        pickle_with("vocoder/flow.pt", lambda s: s | {"llm.weight": torch.ones(1)}), "no place for llm.weight"),
    "hift missing": (gone("vocoder/hift.pt"), "hift.pt is missing"),
    "hift lacks": (without("vocoder/hift.pt", "m_source.l_linear.bias"), "lacks m_source.l_linear.bias"),
    "cosyvoice missing": (gone("vocoder/cosyvoice.yaml"), "cosyvoice.yaml is missing"),
    "cosyvoice broken": (text("vocoder/cosyvoice.yaml", "flow: ", "\tflow: "), "cosyvoice.yaml is no yaml that"),
    "cosyvoice empty": (lambda f: (f / "vocoder/cosyvoice.yaml").write_bytes(b""), "is no yaml of names and values"),
    "cosyvoice rate": (text("vocoder/cosyvoice.yaml", "sample_rate: 22050", "sample_rate: x"), "gives feat_extractor."),
    "cosyvoice hop": (text("vocoder/cosyvoice.yaml", "hop_size: 256", "hop_size: 480"), "a frame are 480 and 256"),
    "cosyvoice heads": (
        text("vocoder/cosyvoice.yaml", "attention_heads: 2", "attention_heads: 0"), "describes no network for"),
    "record of sizes": (record({"bytes": 7}), "record.json says 7"),
}  # fmt: skip


def test_no_two_damages_share_a_sentence():
    words = [words for _, words in DAMAGES.values()]
    assert len(DAMAGES) >= 20 and len(set(words)) == len(words)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_release(copy, refused, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    damage, words = DAMAGES[name]
    damage(copy)
    err = refused("--preset", "full", *options(copy), "-o", "out.wav")
    assert not (tmp_path / "out.wav").exists() and not (tmp_path / "bomb").exists()
    assert words in err and len(err) < 600, err
    assert not any(other in err for _, other in DAMAGES.values() if other != words), err
    assert cli.main(["doctor", *(str(copy / role) for role in sources.ROLES)]) == 1
    assert words in capsys.readouterr()[1].replace("\n", " ")


@pytest.mark.parametrize("args, words", [
    (["--preset", "full"], "--tokenizer and --backbone and --vocoder names none"),
    (["--preset", "full", "--tokenizer", "t", "--vocoder", "v"], "and --backbone names none"),
    (["--backbone", "/no/such/folder"], "no folder at /no/such/folder"),
    (["--speaker", "a.wav"], "needs a released vocoder"),
    (["--dtype", "int8"], "'int8': choose"),
])  # fmt: skip
def test_wrong_usage_is_told(refused, args, words):
    assert words in refused(*args)


def test_a_language_model_is_no_preset(small, refused):
    assert "name it with --backbone" in refused("--preset", str(small["backbone"]))


# ---- numbers, hashes, and files made to hurt -----------------------------------------------------------------------


NAN, INF = float("nan"), float("inf")


@damage
def npy_with(folder, value):
    table = np.load(folder / NPY)
    table[5, 7] = value
    np.save(folder / NPY, table)


def at(key, place, value):
    """A change of a state dict."""
    def change(state):
        state[key][place] = value
        return state

    return change


def put(name, *place_and_value):
    return pickle_with(name, at(*place_and_value))


@pytest.mark.parametrize("damage, part, words", [
    (put(PT, "encoder.after_norm.bias", 2, NAN), "linguistic", "model.pt holds nan at encoder.after_norm.bias[2]"),
    (npy_with(INF), "linguistic", "linguistic_tokenizer.npy holds inf at centroids[5, 7]"),
    (text(MVN, "[ -8.0 ", "[ nan "), "linguistic", "am.mvn holds nan at shift[0]"),
    (s3(at("encoder.conv1.bias", 3, -INF)), "semantic", "speech_tokenizer_v1.onnx holds -inf at encoder.conv1.bias[3]"),
    (shard_with(lambda s: {k: v.clone().fill_(NAN) if k == LAYER else v for k, v in s.items()}), "backbone",
     f"holds nan at {LAYER}[0, 0]"),
    (put("vocoder/flow.pt", "encoder_proj.weight", (1, 2), NAN), "flow", "flow.pt holds nan at encoder_proj.weight[1,"),
    (put("vocoder/hift.pt", "conv_pre.weight_g", (0, 0, 0), INF), "hift", "hift.pt holds inf at conv_pre.weight_g[0, "),
])  # fmt: skip
def test_a_value_that_is_no_number_is_named(copy, damage, part, words):
    damage(copy)
    assert words in fault(lambda: getattr(model(copy), part))


@pytest.mark.parametrize("name", ["flow.pt", "hift.pt"])
def test_a_flipped_bit_is_found_where_a_record_knows(copy, name):
    path = copy / "vocoder" / name
    record(files.fingerprint(path), name)(copy)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match=f"{name} (does not have the hash|holds)"):
        getattr(model(copy), name.removesuffix(".pt"))


@pytest.mark.parametrize("keep", [1, 4, 100, 1000, 3000, 0.2, 0.4, 0.6, 0.8, 0.95, -100, -1])
@pytest.mark.parametrize("name", ["vocoder/hift.pt", PT])
def test_a_pickle_cut_anywhere(copy, name, keep):
    path = copy / name
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    assert f"{path.name} is cut short or no file of torch.save" in fault(lambda: readers.pickled(path))


def npy(shape):
    with io.BytesIO() as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        return file.getvalue() + bytes(100)


ALIASES = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9 if i else ['x'] * 9)}]\n" for i in range(12))
SIZE = "    output_size: 16\n"
HURTFUL = {  # what replaces a file (or words of it), and the sentence
    "onnx varint": (ONNX, b"\xff" * 3_000_000, "is no ONNX file"),
    "onnx name": (ONNX, field(7, field(1, field(3, 10**13))), "is no ONNX file"),
    "onnx dims": (ONNX, field(7, field(5, field(1, 2**62) + field(2, 1) + field(9, bytes(4)))), "is no ONNX"),
    "pieces varint": ("backbone/tokenizer.model", b"\xff" * 3_000_000, "is not a SentencePiece model"),
    "pieces long": ("backbone/tokenizer.model", field(1, field(1, b"a" * 9_000_000)), "is not a SentencePiece model"),
    "pieces nan": ("backbone/tokenizer.model", field(1, field(1, b"a") + field(2, NAN)), "is not a SentencePiece"),
    "npy rows": (NPY, npy((10**12, 16)), "is no whole npy file"),
    "npy sizes": (NPY, npy((2**40, 2**40)), "is no whole npy file"),
    "mvn": (MVN, b"\xff\xfe\0", "am.mvn is no text"),
    "yaml infinite": (PARAFORMER, (SIZE, "    output_size: .inf\n"), "output_size as inf, which is no number"),
    "yaml half": (PARAFORMER, (SIZE, "    output_size: 16.5\n"), "output_size as 16.5, which is no number"),
    "yaml true": (PARAFORMER, (SIZE, "    output_size: true\n"), "output_size as True, which is no number"),
    "yaml deep": (PARAFORMER, b"a: " + b"[" * 20_000, "is no yaml that can be read"),
    "yaml long": (PARAFORMER, b"a: b\n" * 300_000, "is no yaml that can be read"),
    "yaml layers": (PARAFORMER, ("num_blocks: 3", "num_blocks: 100000000"), "describes no network for"),
    "yaml width": (PARAFORMER, ("linear_units: 32", "linear_units: 1000000000"), "describes no network for"),
    "yaml aliases": (PARAFORMER, (SIZE, "    output_size: *a11\n"), "which is no number"),
    "yaml aliases of a name": (PARAFORMER, ("encoder: SANMEncoderChunkOpt", "encoder: *a11"), "is of an encoder"),
    "index deep": (INDEX, b"[" * 200_000, "is cut short or damaged"),
    "header deep": (LAST, (200_000).to_bytes(8, "little") + b"[" * 200_000, "no safetensors header"),
    "config deep": ("backbone/config.json", b'{"a":' * 200_000, "is cut short or damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", HURTFUL)
def test_files_made_to_hurt_are_one_sentence_soon(copy, name):
    place, content, words = HURTFUL[name]
    path = copy / place
    if isinstance(content, tuple):
        old = path.read_text(encoding="utf-8")
        assert content[0] in old
        content = (ALIASES + old.replace(*content)).encode()
    path.write_bytes(content)
    sentence = fault(lambda: model(copy), seconds=10)  # 3 MB of a number took minutes
    assert words in sentence and path.name in sentence and len(sentence) < 600, sentence[:600]


@pytest.mark.parametrize("shape, offsets", [
    ([4, 4], [64, 0]), ([-1, 4], [0, 0]), ([2**70, 4], [0, 0]), ([4, 4], [0, 32]), (["x"], [0, 0]), ([1.5, 4], [0, 24]),
    ("ab", [0, 4]), ([4, 4], [0, 64.0]), ([4, 4], [0]), ([[4]], [0, 16]),
])  # fmt: skip
def test_headers_that_contradict_themselves(tmp_path, shape, offsets):
    head = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(64))
    with pytest.raises(ModelError, match="no safetensors header|a shape that its bytes do not fill"):
        shards.header(tmp_path / "a.safetensors")


@pytest.mark.parametrize("values, words", [
    ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000"), ({"hidden_size": 10**30}, "hidden_size is 1"),
    ({"max_seq_len": 10**15}, "max_seq_len is 1"), ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x'"),
    ({"rms_norm_eps": []}, "rms_norm_eps is []"), ({"text_config": [1]}, "gives text_config as [1]"),
    ({"text_config": 5}, "gives text_config as 5"), ({"quantization": [1]}, "describes no Step-1 model"),
    ({"quantization": {"weights": "int4", "group": 0}}, "its group is 0"), ({"num_hidden_layers": 8000}, "the file"),
    ({"hidden_size": 1_000_000}, "than the file"), ({"num_hidden_layers": True}, "gives no num_hidden_layers"),
])  # fmt: skip
def test_settings_of_a_release_that_cannot_be(copy, values, words):
    config_with(**values)(copy)
    sentence = fault(lambda: model(copy), seconds=5)
    assert words in sentence and "config.json" in sentence


# ---- doctor ---------------------------------------------------------------------------------------------------------


def test_doctor_tells_what_folders_hold_without_loading_them(small, capsys, monkeypatch):
    monkeypatch.setattr(shards, "safe_open", lambda *_: pytest.fail("weights were opened"))
    folders = [str(small[role]) for role in sources.ROLES]
    assert cli.main(["doctor", *folders, "--json"]) == 0
    report = json.loads(capsys.readouterr()[0])
    assert [report[folder]["roles"] for folder in folders] == [["tokenizer"], ["backbone"], ["vocoder"]]
    count = sum(t.numel() for t in model_folder.build("backbone", release.sizes(N_TEXT)).state_dict().values())
    assert f"30 tensors, {count:,} parameters" in report[folders[1]]["backbone"]
    assert report[folders[1]]["licence"] == "apache-2.0 (README.md)" and "3 tensors" in report[folders[1]]["note"]
    assert "not the file of CosyVoice" in report[folders[0]]["semantic"]
    assert cli.main(["doctor", *folders]) == 0 and "22,050 Hz" in capsys.readouterr()[0]


def test_doctor_knows_the_mini_and_what_is_nothing(tiny_folder, tmp_path, capsys):
    assert cli.main(["doctor", str(tiny_folder)]) == 0
    assert "as recorded" in capsys.readouterr()[0]
    (tmp_path / "LICENSE").write_text("MIT License\n\n…", encoding="utf-8")
    assert cli.main(["doctor", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "MIT" in out and "holds nothing that aqaa knows" in err
    assert cli.main(["doctor", str(tmp_path / "none")]) == 1


def test_doctor_checks_hashes_and_looks_into_folders(copy, capsys):
    facts = files.fingerprint(copy / "vocoder/flow.pt")
    record(facts)(copy)
    assert cli.main(["doctor", str(copy)]) == 0  # all three in it
    out = capsys.readouterr()[0]
    assert all(f"{copy / role}\n" in out for role in sources.ROLES)
    record(facts | {"sha256": "0" * 64})(copy)
    assert cli.main(["doctor", str(copy)]) == 1
    assert "does not have the hash" in capsys.readouterr()[1]


def test_doctor_tells_all_faults_at_once_and_whether_folders_fit(copy, capsys):
    DAMAGES["npy missing"][0](copy)
    DAMAGES["s3 50 Hz"][0](copy)
    assert cli.main(["doctor", str(copy / "tokenizer")]) == 1
    assert capsys.readouterr()[1].count("aqaa: ") == 2


# ---- a speaker's voice ----------------------------------------------------------------------------------------------


def test_a_voice_without_onnxruntime_is_one_sentence(small, question, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    args = ["--preset", "full", *options(small["backbone"].parent), "--speaker", str(question)]
    assert "needs onnxruntime" in refused(*args)


class Session:
    """Stands in for onnxruntime: speaks of what it was shown."""

    def __init__(self, path, providers):
        self.seen = None

    def get_inputs(self):
        return [type("Input", (), {"name": "input"})]

    def run(self, _, feeds):
        self.seen = feeds["input"]
        return [np.tile(self.seen.std(1), 3)[:, :192].astype(np.float32)]


def test_a_voice_is_a_prompt_of_ids_mel_and_vector(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", type("onnxruntime", (), {"InferenceSession": Session}))
    soundfile.write(tmp_path / "voice.wav", tone(1.0, 22_050), 22_050)
    system = model(small["backbone"].parent, speaker=tmp_path / "voice.wav")
    voice = system.vocoder.options
    n = voice["prompt_token"].shape[1]
    assert n == 40 and 0 <= voice["prompt_token"].min() and voice["prompt_token"].max() < 5120
    assert voice["prompt_feat"].shape == (1, system.flow.frames(n), 80) and voice["embedding"].shape == (1, 192)
    plain = model(small["backbone"].parent)
    ids = list(voice["prompt_token"][0, :10])
    assert not torch.equal(system.vocoder.synthesize(ids), plain.vocoder.synthesize(ids))
    with pytest.raises(ModelError, match="none.wav does not exist"):
        model(small["backbone"].parent, speaker=tmp_path / "none.wav")
