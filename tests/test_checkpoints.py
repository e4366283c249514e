"""Weights on disk: what is saved comes back, and whatever is wrong with a folder is one sentence."""

import json
import shutil

import pytest
import torch

import aqaa
from aqaa.files import ModelError
from aqaa.weights import model_folder, verify


@pytest.fixture
def copy(tiny_folder, tmp_path):
    """A folder of weights that a test may break."""
    return shutil.copytree(tiny_folder, tmp_path / "copy")


def says(fault, *words):
    """Is the message one sentence that holds all the words?"""
    text = str(fault.value)
    assert "\n" not in text and text.endswith("."), text
    assert all(word in text for word in words), text
    return True


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
    with pytest.raises(ModelError, match="missing"):
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
    with pytest.raises(ModelError, match="nothing.safetensors is missing"):
        model_folder.gather(tmp_path / "other", config, tiny_folder / "tokenizer.json", parts, {})
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", [*(f"{p}.safetensors" for p in model_folder.PARTS), "config.json"])
def test_a_missing_file(copy, name):
    (copy / name).unlink()
    with pytest.raises(ModelError) as fault:
        aqaa.load(copy)
    says(fault, name, "missing")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_file_cut_short(copy, keep):
    path = copy / "flow.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError) as fault:
        aqaa.load(copy)
    says(fault, "flow.safetensors", "cut short or damaged")


def test_a_damaged_file(copy):
    (copy / "hift.safetensors").write_bytes(b"\xff" * 5000)
    with pytest.raises(ModelError) as fault:
        aqaa.load(copy)
    says(fault, "hift.safetensors", "damaged")


@pytest.mark.parametrize("name", ["semantic.safetensors", "config.json", "tokenizer.json"])
def test_a_git_lfs_pointer(copy, name):
    (copy / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", encoding="utf-8")
    with pytest.raises(ModelError) as fault:
        aqaa.load(copy).text  # noqa: B018
    says(fault, name, "Git LFS pointer", "git lfs pull")


def test_weights_of_another_size(copy):
    config = model_folder.read_config(copy)
    data = config.to_dict()
    data["backbone"]["hidden_size"] = 32
    (copy / "config.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ModelError) as fault:
        aqaa.load(copy).backbone  # noqa: B018
    says(fault, "backbone.safetensors", "does not fit")


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"flow": {"colour": 1}}', '{"flow": 3}', '{"name": "\ud800'])
def test_a_configuration_that_is_none(copy, content):
    (copy / "config.json").write_text(content, errors="surrogatepass", encoding="utf-8")
    with pytest.raises(ModelError) as fault:
        aqaa.load(copy)
    says(fault, "config.json", "not a configuration")


def test_a_damaged_text_tokenizer(copy):
    (copy / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError) as fault:
        aqaa.load(copy).text  # noqa: B018
    says(fault, "tokenizer.json", "damaged")


def test_a_text_tokenizer_with_too_many_ids(copy):
    data = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    data["ids"]["n_text"] = 100
    (copy / "config.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ModelError) as fault:
        aqaa.load(copy).text  # noqa: B018
    says(fault, "tokenizer.json", "128 ids")


def test_an_unknown_preset_and_an_unshipped_one():
    with pytest.raises(ModelError) as fault:
        aqaa.load("maxi")
    says(fault, "'maxi'", "mini")
    with pytest.raises(ModelError) as fault:
        aqaa.load("full")
    says(fault, "'full'", "folder")


def test_no_data_folder_names_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("AQAA_DATA", str(tmp_path))
    with pytest.raises(ModelError) as fault:
        aqaa.load("mini")
    says(fault, "AQAA_DATA", str(tmp_path))


def test_aqaa_data_is_where_the_mini_is_sought(monkeypatch, copy):
    copy.rename(copy.parent / "mini")
    monkeypatch.setenv("AQAA_DATA", str(copy.parent))
    assert aqaa.load().config.name == "tiny"


@pytest.mark.parametrize("device", ["cuda:77", "teapot"])
def test_a_device_that_is_not_here(tiny_folder, device):
    with pytest.raises(ModelError) as fault:
        aqaa.load(tiny_folder, device=device)
    says(fault, device, "--device cpu")


def test_skip_init_leaves_buffers_and_shapes_alone():
    torch.manual_seed(0)
    with verify.skip_init():
        layer = torch.nn.Linear(3, 2)
        table = torch.nn.Parameter(torch.arange(6.0))
    assert layer.weight.shape == (2, 3) and torch.equal(table, torch.arange(6.0))
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(0)))
