"""Weights on disk: what is saved comes back, and whatever is wrong with a folder is one sentence."""

import json

import pytest
import torch

import aqaa
from aqaa.weights import model_folder, verify
from tests.conftest import fails


def test_what_is_saved_comes_back(tiny, tiny_folder):
    model = aqaa.load(str(tiny_folder))
    assert model.config == tiny.config
    assert model.text.encode("seven plus five") == tiny.text.encode("seven plus five")
    for name in ("linguistic", "semantic", "backbone", "flow"):
        mine, saved = getattr(tiny, name).state_dict(), getattr(model, name).state_dict()
        assert mine.keys() == saved.keys()
        for key, value in mine.items():
            torch.testing.assert_close(saved[key], value, rtol=1e-3, atol=1e-6)
            assert saved[key].dtype == value.dtype


def test_loaded_modules_are_ready_and_whole(tiny_folder):
    model = aqaa.load(tiny_folder)
    for name in model_folder.PARTS:
        module = getattr(model, name)
        assert not module.training
        assert all(torch.isfinite(t).all() for t in module.state_dict().values() if t.is_floating_point())
        assert getattr(model, name) is module


def test_parts_are_read_when_first_used(copy):
    model = aqaa.load(copy)
    assert model.hift is not None
    (copy / "flow.safetensors").unlink()
    with fails("missing"):
        model.flow  # noqa: B018


def test_matrices_are_half_and_small_tensors_whole_on_disk(tmp_path):
    module = torch.nn.Linear(128, 64)
    model_folder.save_part(tmp_path, "x", module, {"steps": 3})
    from safetensors import safe_open

    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.get_tensor("weight").dtype == torch.float16
        assert torch.equal(file.get_tensor("bias"), module.bias)
        assert file.metadata() == {"part": "x", "steps": "3"}


def test_saving_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = model_folder.save_part(tmp_path, "x", torch.nn.Linear(2, 2))
    before = path.read_bytes()

    def full_disk(state, part, meta):
        part.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(model_folder, "save_file", full_disk)
    with pytest.raises(OSError):
        model_folder.save_part(tmp_path, "x", torch.nn.Linear(2, 2))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_gather_makes_a_folder_that_loads(tiny_folder, tmp_path):
    config = model_folder.read_config(tiny_folder)
    parts = {name: tiny_folder / f"{name}.safetensors" for name in model_folder.PARTS}
    model_folder.gather(tmp_path / "new", config, tiny_folder / "tokenizer.json", parts, {"flow": {"steps": 5}})
    record = json.loads((tmp_path / "new" / "record.json").read_text(encoding="utf-8"))
    assert record["flow"] == {"steps": 5} and len(record["files"]) == len(model_folder.PARTS)
    assert all(row["as_recorded"] for row in model_folder.inspect(tmp_path / "new").values())
    aqaa.load(tmp_path / "new").hift  # noqa: B018
    parts["flow"] = tmp_path / "nothing.safetensors"
    with fails("nothing.safetensors is missing"):
        model_folder.gather(tmp_path / "other", config, tiny_folder / "tokenizer.json", parts, {})
    assert not (tmp_path / "other").exists()


# ---- one sentence for each fault ----

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
WEIGHTS = [f"{part}.safetensors" for part in model_folder.PARTS]


@pytest.mark.parametrize("name", [*WEIGHTS, "config.json"])
def test_a_missing_file(copy, name):
    (copy / name).unlink()
    with fails(name, "missing"):
        aqaa.load(copy)


@pytest.mark.parametrize("keep", [0, 5, 100, -1, None])
def test_a_file_cut_short_or_damaged(copy, keep):
    path = copy / "flow.safetensors"
    path.write_bytes(b"\xff" * 5000 if keep is None else path.read_bytes()[:keep])
    with fails("flow.safetensors", "cut short or damaged"):
        aqaa.load(copy)


@pytest.mark.parametrize("content", [
    b"{", b"[]", b"3", b'{"flow": {"colour": 1}}', b'{"flow": 3}', b'{"name": "\xed\xa0\x80',
])  # fmt: skip
def test_a_configuration_that_is_none(copy, content):
    (copy / "config.json").write_bytes(content)
    with fails("config.json", "not a configuration"):
        aqaa.load(copy)


@pytest.mark.parametrize("name, content, words", [
    *((name, POINTER, ("Git LFS pointer", "git lfs pull")) for name in ("semantic.safetensors", "config.json")),
    ("tokenizer.json", POINTER, ("Git LFS pointer", "git lfs pull")), ("tokenizer.json", b"{}", ("damaged",)),
])  # fmt: skip
def test_what_stands_in_for_a_file(copy, name, content, words):
    (copy / name).write_bytes(content)
    with fails(name, *words):
        aqaa.load(copy).text  # noqa: B018


@pytest.mark.parametrize("setting, value, part, words", [
    ("backbone.hidden_size", 32, "backbone", ("backbone.safetensors", "does not fit")),
    ("ids.n_text", 100, "text", ("tokenizer.json", "128 ids")),
])  # fmt: skip
def test_files_that_do_not_match(copy, setting, value, part, words):
    data, (group, name) = json.loads((copy / "config.json").read_text(encoding="utf-8")), setting.split(".")
    data[group][name] = value
    (copy / "config.json").write_text(json.dumps(data), encoding="utf-8")
    with fails(*words):
        getattr(aqaa.load(copy), part)


@pytest.mark.parametrize("source, words", [("maxi", ("'maxi'", "mini")), ("full", ("'full'", "folder"))])
def test_an_unknown_preset_and_an_unshipped_one(source, words):
    with fails(*words):
        aqaa.load(source)


def test_aqaa_data_is_where_the_mini_is_sought(monkeypatch, copy):
    monkeypatch.setenv("AQAA_DATA", str(copy.parent))
    with fails("AQAA_DATA", str(copy.parent)):
        aqaa.load("mini")
    copy.rename(copy.parent / "mini")
    assert aqaa.load().config.name == "tiny"


@pytest.mark.parametrize("device", ["cuda:77", "teapot"])
def test_a_device_that_is_not_here(tiny_folder, device):
    with fails(device, "--device cpu"):
        aqaa.load(tiny_folder, device=device)


def test_skip_init_leaves_buffers_and_shapes_alone():
    torch.manual_seed(0)
    with verify.skip_init():
        layer = torch.nn.Linear(3, 2)
        table = torch.nn.Parameter(torch.arange(6.0))
    assert layer.weight.shape == (2, 3) and torch.equal(table, torch.arange(6.0))
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(0)))
