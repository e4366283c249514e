"""Shards of a language model: headers, and how much memory it takes to load them."""

import json
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from aqaa.config import AQAAConfig, BackboneConfig
from aqaa.files import ModelError
from aqaa.weights import model_folder, shards

BIG = BackboneConfig(
    vocab_size=32_768, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=2, num_attention_heads=32,
    num_attention_groups=4,
)  # fmt: skip
LOAD = """
import re, sys, torch
from aqaa.weights import shards
from aqaa.backbone import step1
from aqaa.config import BackboneConfig
def peak():  # of this program alone: getrusage would begin with that of the process it was forked from
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
config, folder, dtype = eval(sys.argv[1]), sys.argv[2], getattr(torch, sys.argv[3])
with torch.device("meta"):
    model = step1.build(config)
tensors = shards.scan(folder)
names, _ = shards.language_model(tensors, folder)
before = peak()
shards.fill(model, tensors, names, dtype=dtype)
assert all(weight.dtype == dtype and not weight.is_meta for weight in model.parameters())
total = sum(float(weight.flatten()[::64].sum()) for weight in model.parameters())  # every page is touched
print(peak() - before, sum(weight.nbytes for weight in model.parameters()), total)
"""


def hollow(folder):
    """BIG in three shards of about half a gigabyte: headers, and zeros that take no disk. Returns the largest size."""
    with torch.device("meta"):
        state = model_folder.build("backbone", replace(AQAAConfig(), backbone=BIG)).state_dict()
    sizes = []
    for i in range(3):
        listed, at = {}, 0
        for name, value in state.items():
            if i == (int(name.split(".")[2]) if "layers" in name else 2):
                end = at + 2 * value.numel()
                listed[name], at = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [at, end]}, end
        head = json.dumps(listed).encode()
        head += b" " * (-len(head) % 8)
        with open(folder / f"model-{i + 1:05}-of-00003.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(head)) + head)
            file.truncate(8 + len(head) + at)
        sizes.append(at)
    return max(sizes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_loading_takes_the_model_and_one_shard(tmp_path, dtype):
    """bfloat16 is taken as it lies in the files; float16 has to be made anew."""
    largest = hollow(tmp_path)
    try:
        args = [sys.executable, "-c", LOAD, repr(BIG), str(tmp_path), dtype]
        run = subprocess.run(args, capture_output=True, text=True, check=True)
    finally:
        for path in tmp_path.glob("*.safetensors"):
            path.unlink()
    used, held, total = run.stdout.split()
    assert int(held) > 1.3e9 and largest < 0.6e9 and float(total) == 0
    assert int(used) < int(held) + largest
    assert dtype == "bfloat16" or int(used) > 0.9 * int(held)  # mapped pages may be taken back at any time
    assert run.stderr == ""  # no bar where nobody looks


@given(st.dictionaries(st.text("abc._", min_size=1, max_size=6), st.lists(st.integers(0, 4), max_size=3), max_size=5))
def test_headers_tell_what_is_in_a_shard(tmp_path_factory, shapes):
    path = tmp_path_factory.mktemp("shard") / "a.safetensors"
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, path, {"format": "pt"})
    found = shards.header(path)
    assert {name: list(entry.shape) for name, entry in found.items()} == shapes
    assert all(entry.bytes == 4 * entry.numel and entry.dtype == "F32" for entry in found.values())
    if any(entry.bytes for entry in found.values()):
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ModelError, match="1 of its .* bytes are missing"):
            shards.header(path)


@pytest.mark.parametrize("content", [
    b"", b"\0" * 8, b"\xff" * 40, struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 2) + b"3 ",
])  # fmt: skip
def test_what_is_no_shard_is_told(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="no safetensors header"):
        shards.header(tmp_path / "a.safetensors")


@pytest.mark.parametrize("files, lost", [
    (["model-00001", "model-00002"], []), (["a-1-of-3", "a-3-of-3"], ["2"]), (["a-0", "a-2"], ["1"]), (["model"], []),
    (["a-2"], ["1"]), (["a-0-of-2"], ["1"]), ([f"m-{i:05}-of-00028" for i in range(1, 29)], []),
])  # fmt: skip
def test_names_promise_shards(files, lost):
    assert shards._gaps([f"{name}.safetensors" for name in files]) == lost


def test_sizes_are_told_as_they_are_spoken_of():
    assert shards.in_bytes(263_893_180_416) == "263.9 GB" and shards.in_bytes(81_920_000) == "81.9 MB"
