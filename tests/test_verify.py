"""What is checked before weights are used: that they are numbers, have their hash, and fit settings that make sense."""

import json
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import aqaa
from aqaa import cli
from aqaa.config import AQAAConfig, preset
from aqaa.fast import prepared
from aqaa.files import ModelError
from aqaa.scale import convert
from aqaa.weights import model_folder, sources, verify
from tests.conftest import fails, tiny_config

NAN, INF = float("nan"), float("inf")


def rewrite(path, name, place, value):
    """Set one value of one tensor of a safetensors file; its header and record.json stay as they are."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        meta = file.metadata()
    state = load_file(path)
    state[name][place] = value
    save_file(state, path, meta)


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_first_value_that_is_no_number_is_named(dtype, value):
    state = {"a": torch.ones(3, dtype=dtype), "big": torch.ones(90, 90, dtype=dtype), "n": torch.arange(4)}
    assert verify.not_finite(state) == ""
    for name, place in (("a", (2,)), ("big", (3, 5)), ("big", (89, 89))):
        state[name][place] = value
        assert verify.not_finite(state) == f"{value} at {name}{list(place)}"
        state[name][place] = 1
    assert verify.not_finite({"x": torch.tensor(value, dtype=dtype)}) == f"{value} at x"
    largest = torch.full((200, 50), torch.finfo(dtype).max, dtype=dtype)
    assert verify.not_finite({"largest": largest, "none": torch.ones(0), "b": largest[0]}) == ""  # sums would overflow


@pytest.mark.parametrize("part, name, place, value", [
    ("backbone", "model.layers.1.mlp.up_proj.weight", (3, 5), NAN), ("flow", "encoder_proj.bias", (2,), INF),
    ("hift", "conv_pre.weight_g", (1, 0, 0), -INF), ("linguistic", "centroids", (7, 1), NAN),
    ("semantic", "quantizer._codebook.embed", (0, 0), INF),
])  # fmt: skip
def test_a_folder_with_a_value_that_is_no_number(copy, tmp_path, part, name, place, value):
    rewrite(copy / f"{part}.safetensors", name, place, value)
    words = (f"{part}.safetensors holds {value} at {name}{list(place)}", "finite number")
    with fails(*words):
        getattr(aqaa.load(copy), part)
    (copy / "record.json").unlink()
    config, parts = model_folder.read_config(copy), {name: copy / f"{name}.safetensors" for name in model_folder.PARTS}
    for spoil in (
        lambda: convert.convert(copy, tmp_path / "out", "int8", quiet=True),
        lambda: model_folder.gather(tmp_path / "out", config, copy / "tokenizer.json", parts, {}),
    ):
        with fails(*words):
            spoil()
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weights, name, value", [
    ("int4", "scale", NAN), ("int8", "scale", INF), ("fp8", "scale", -INF), ("fp8", "qweight", 0x7F),
    ("fp8", "qweight", 0xFF),
])  # fmt: skip
def test_scales_and_codes_of_quantised_layers(tmp_path, weights, name, value):
    from aqaa.backbone.quantized_linear import FORMATS, empty_linears, numbers

    module = torch.nn.ModuleDict({"proj": torch.nn.Linear(128, 8, bias=False)})
    empty_linears(module, weights, 64 if weights == "int4" else None, device="cpu")
    state = FORMATS[weights].from_weights(torch.randn(8, 128), module["proj"].group).state_dict(prefix="proj.")
    model_folder.fit(module, state, "a.safetensors")
    state[f"proj.{name}"][2, 1 if name == "qweight" else 0] = value
    with pytest.raises(ModelError, match=rf"a.safetensors holds -?(nan|inf) at proj\.{name}\[2, "):
        model_folder.fit(module, state, "a.safetensors")
    assert numbers(module, "proj.scale", state["proj.scale"]) is state["proj.scale"]


def test_a_weight_too_large_for_a_dtype(copy):
    rewrite(copy / "backbone.safetensors", "model.norm.weight", (3,), 1e6)
    (copy / "record.json").unlink()
    aqaa.load(copy, dtype="bfloat16").backbone  # noqa: B018
    with fails("too large for float16", "inf at model.norm.weight[3]", "choose bfloat16"):
        aqaa.load(copy, dtype="float16").backbone  # noqa: B018


# ---- hashes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", model_folder.PARTS)
def test_one_flipped_bit_is_found(copy, tmp_path, part):
    path = copy / f"{part}.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with fails(f"{part}.safetensors does not have the hash that record.json says"):
        getattr(aqaa.load(copy), part)
    with pytest.raises(ModelError, match="does not have the hash"):
        convert.convert(copy, tmp_path / "out", "int8", quiet=True)
    (copy / "record.json").unlink()
    assert getattr(aqaa.load(copy), part) is not None  # nobody knows better


@pytest.mark.parametrize("record", [
    "[", "5", "null", '{"files": 5}', '{"files": {"../x": {}}}', '{"files": {"flow.safetensors": 3}}',
    '{"files": {"flow.safetensors": {"bytes": "x"}}}', '{"files": {"flow.safetensors": {"sha256": 5}}}', "[" * 200_000,
    '{"files": {"flow.safetensors": {"bytes": NaN}}}',
])  # fmt: skip
def test_a_damaged_record(copy, record, capsys):
    (copy / "record.json").write_text(record, encoding="utf-8")
    for look in (lambda: aqaa.load(copy).flow, lambda: model_folder.inspect(copy)):
        with fails("record.json does not list files"):
            look()
    assert cli.main(["doctor", "--preset", str(copy)]) == 1 and "record.json" in capsys.readouterr().err


# ---- settings -------------------------------------------------------------------------------------------------------


def with_setting(folder, place, value, write=False):
    """What config.json of a folder holds, with another value at a place such as "flow.channels"."""
    data = inner = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    *above, name = place.split(".")
    for step in above:
        inner = inner[step]
    inner[name] = value
    if write:
        (folder / "config.json").write_text(json.dumps(data), encoding="utf-8")
    return data


WRONG = [0, -1, 10**7, 10**30, "x", None, [], {}, 1.5, 1e308, True, [1], NAN, INF]
WHOLE = ("linguistic.num_blocks", "semantic.n_audio_layer", "ids.n_text", "backbone.num_hidden_layers",
         "hift.istft_hop", "backbone.hidden_size", "flow.encoder_heads", "mel.n_fft", "hift.nb_harmonics")  # fmt: skip
REAL = ("backbone.rms_norm_eps", "flow.mel_std", "flow.temperature", "hift.lrelu_slope", "flow.input_frame_rate")
LISTS = ("flow.channels", "hift.upsample_rates", "hift.resblock_dilation_sizes")


@pytest.mark.parametrize("name", ["tiny", "mini", "full"])
def test_settings_that_are_right_are_taken(name):
    config = tiny_config() if name == "tiny" else preset(name)
    assert verify.settings(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("place", [*WHOLE, *REAL, *LISTS, "ids", "flow", "name"])
def test_a_wrong_setting_is_named(tiny_folder, place):
    kind = place.partition(".")[0]
    for value in WRONG:
        if (place, value) in (("name", "x"), ("hift.nb_harmonics", 0)):
            continue
        if place in REAL and (value in (1.5, 0, True) or place == "flow.temperature"):
            continue  # some of them may be so
        if place == kind and value == {} or place in LISTS[:2] and value == [1]:
            continue  # all its settings as published; a list
        with pytest.raises(ValueError) as fault:
            verify.settings(with_setting(tiny_folder, place, value))
        text = str(fault.value)
        assert text.startswith(place) and " expected" in text and len(text) < 250, (value, text)


@pytest.mark.parametrize("place, value", [
    ("backbone.num_attention_groups", 3), ("linguistic.attention_heads", 3), ("flow.vocab_size", 60),
    ("mel.hop_size", 128), ("mel.sampling_rate", 22_050), ("hift.in_channels", 64), ("semantic.n_codebook_size", 31),
    ("ids.eot", 1), ("ids.first_text", 20), ("backbone.vocab_size", 100), ("flow.input_frame_rate", 50.0),
])  # fmt: skip
def test_settings_that_contradict_each_other(copy, place, value):
    with_setting(copy, place, value, write=True)
    with fails("config.json", "expected"):
        aqaa.load(copy)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, '{"name": NaN}', '{"ids": [[[[[]]]]]}'])
def test_json_of_endless_depth_or_without_numbers(copy, text):
    (copy / "config.json").write_text(text, encoding="utf-8")
    with fails("config.json is not a configuration"):
        aqaa.load(copy)


@pytest.mark.parametrize("place, value, part", [
    ("backbone.num_hidden_layers", 8000, "backbone"), ("linguistic.num_blocks", 5000, "linguistic"),
    ("semantic.n_audio_layer", 600, "semantic"), ("backbone.hidden_size", 1_000_000, "backbone"),
    ("flow.num_mid_blocks", 1200, "flow"), ("flow.encoder_units", 200_000, "flow"),
    ("semantic.n_audio_ctx", 150_000, "semantic"), ("backbone.intermediate_size", 3_000_000, "backbone"),
    ("hift.base_channels", 50_000, "hift"), ("linguistic.output_size", 50_000, "linguistic"),
])  # fmt: skip
def test_settings_beyond_the_file_are_refused_before_it_costs(copy, place, value, part):
    with_setting(copy, place, value, write=True)
    model = aqaa.load(copy)
    began = time.process_time()
    with fails(f"{part}.safetensors does not fit", "use matching files"):
        getattr(model, part)
    assert time.process_time() - began < 2


@pytest.mark.parametrize("how", ["{", "[1]", "5", "null", '{"evil": 1}', '{"weights": "int3"}', '{"weights": ["int4"]}',
                                 '{"weights": "int4", "group": 0}', '{"weights": "int4", "group": -3}', "[" * 100_000])
def test_a_quantisation_that_is_none(copy, how):
    path = copy / "backbone.safetensors"
    save_file(load_file(path), path, {"quantization": how})
    (copy / "record.json").unlink()
    with fails("backbone.safetensors is quantised in no way that is known"):
        aqaa.load(copy).backbone  # noqa: B018


# ---- saved as it was read -------------------------------------------------------------------------------------------


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def sound(hift):
    mel = torch.randn(1, 80, 20, generator=torch.Generator().manual_seed(0)) - 6
    return hift.inference(mel, hift.m_source.start(seed=0))


@pytest.mark.parametrize("source", ["mini", "int4", "fp8"])
def test_loading_and_saving_change_nothing(tmp_path, source):
    """All tensors as they were read, also folded and quantised ones; and a second time the very same bytes."""
    folder = sources.find("mini")
    if source != "mini":
        convert.convert("mini", tmp_path / "source", source, quiet=True)
        folder = tmp_path / "source"
    model_folder.save(aqaa.load(folder), tmp_path / "a")
    model_folder.save(aqaa.load(tmp_path / "a"), tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    for part in model_folder.PARTS:
        read, saved = (load_file(place / f"{part}.safetensors") for place in (folder, tmp_path / "a"))
        assert read.keys() == saved.keys()
        assert all(torch.equal(value, saved[name]) and value.dtype == saved[name].dtype for name, value in read.items())
    assert torch.equal(sound(aqaa.load(folder).hift), sound(aqaa.load(tmp_path / "a").hift))
    words = aqaa.load(folder).text.encode("seven plus five")
    assert aqaa.load(tmp_path / "b").text.encode("seven plus five") == words


def test_folded_layers_know_their_factors_until_they_change():
    torch.manual_seed(0)
    module = model_folder.build("hift", tiny_config())
    with torch.no_grad():
        module.conv_pre.weight_g.mul_(1.7)
    read = {name: value.clone() for name, value in module.state_dict().items()}
    ready = prepared.prepare(module)
    assert not any(name.endswith("weight_v") for name in ready.state_dict())
    again = prepared.unprepared(ready)
    assert again.keys() == read.keys() and all(torch.equal(value, read[name]) for name, value in again.items())
    other = {name: 2 * value for name, value in read.items()}
    ready.load_state_dict(dict(other))  # into a folded module
    again = prepared.unprepared(ready)
    assert all(torch.equal(again[name], value) for name, value in other.items())
    ready.load_state_dict(prepared.prepare(model_folder.build("hift", tiny_config())).state_dict())
    assert torch.equal(prepared.unprepared(ready)["conv_pre.weight_v"], ready.conv_pre.weight)
    with torch.no_grad():
        ready.conv_pre.weight.mul_(1.01)  # trained on, say
    again = prepared.unprepared(ready)
    assert torch.equal(again["conv_pre.weight"], ready.conv_pre.weight) and "conv_pre.weight_v" not in again


def test_the_published_settings_are_within_their_own_ranges():
    for config in (AQAAConfig(), preset("mini")):
        assert list(verify.contradictions(config)) == []
