"""The benchmark of the full-scale model, rehearsed at a small size: what it writes, and when."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tests.interpreter  # noqa: F401  first: it sets the interpreter up
from aqaa import cli, records
from aqaa.backbone import memory
from aqaa.config import BackboneConfig
from aqaa.evaluation import gpu_speed, kernel_bench
from aqaa.fast import triton_kernels
from aqaa.scale import plan, plan_table, random_model
from tests.conftest import tiny_config

CPU = torch.device("cpu")


@pytest.fixture
def config():
    tiny = tiny_config()
    return replace(tiny, backbone=BackboneConfig(tiny.ids.end, 128, 192, 2, 8, 2, max_seq_len=1024))


def test_every_measurement_is_made_and_written_as_it_is_made(config, tmp_path, monkeypatch):
    for name, value in {"QUESTION": 60, "TOKENS": 12, "ASKED": 0.5, "ANSWER": 60, "REPEATS": 1, "SPOKEN": 0.5}.items():
        monkeypatch.setattr(gpu_speed, name, value)
    monkeypatch.setattr(triton_kernels, "TILE", (128, 32, 1, 1))
    monkeypatch.setattr(triton_kernels, "SUMS", 1024)
    monkeypatch.setattr(triton_kernels, "CANDIDATES", ((128, 32, 1, 1), (64, 8, 1, 1)))
    path = tmp_path / "run.json"
    bench, seen = gpu_speed.Bench(config, CPU, contexts=(16, 64, 2000)), {}
    record = bench.record(path)
    assert list(json.loads(path.read_text(encoding="utf-8")))[:2] == ["what", "date"]
    for name in gpu_speed.STEPS:
        real = getattr(bench, name)

        def step(record, name=name, real=real):
            seen[name] = set(json.loads(path.read_text(encoding="utf-8")))
            real(record)

        monkeypatch.setattr(bench, name, step)
    bench.run(record)
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data == record.data and data["faults"] == {} and data["what"] == "scale-rehearsal"
    assert {"command", "commit", "versions", "hardware", "setup", "build_s", "host_peak_gib"} <= set(data)
    assert data["setup"]["sizes"]["hidden_size"] == 128 and data["setup"]["weights"] == "int4"
    linear = memory.linear_bytes(config.backbone, "int4", 64)  # the rest is fp32 here and bf16 in the plan
    assert data["resident_bytes"] == 2 * memory.resident_bytes(config.backbone, "int4", 64) - linear
    assert data["copy_gb_per_s"] > 0 and data["kernels"] and data["layer_error"] < 1e-3
    assert list(data["kernel_errors"]) == list(kernel_bench.CHECKS) and max(data["kernel_errors"].values()) < 1e-4
    assert [point["ids"] for point in data["prefill"]] == [60, triton_kernels.FEW] and data["prefill"][0]["seconds"] > 0
    assert [point["context"] for point in data["decode"]] == [16, 64]
    for point in data["decode"] + data["fp8"]["decode"]:
        assert point["tokens_per_s"] > 0 and point["step_ms"] > 0 and 0 < point["share_of_copy"] < 1
    assert data["ask"]["ids"] == 60 and 0 < data["ask"]["first_audio_s"] < data["ask"]["timings"]["total"]
    assert data["vocoder"]["rtf"] > 0
    assert "copy_gb_per_s" in seen["check_layer"] and "decode" in seen["vocoder"] and "ask" in seen["fp8"]


def test_every_tile_of_every_kernel_is_timed_and_the_fastest_kept(config, monkeypatch):
    good, broken = [(128, 32, 1, 1), (128, 16, 1, 1)], (128, 32, 1, 9)
    monkeypatch.setattr(triton_kernels, "CANDIDATES", (broken, *good))
    monkeypatch.setattr(triton_kernels, "SUMS", 1024)
    monkeypatch.setattr(triton_kernels, "TILES", {})
    pool = contextlib.nullcontext(SimpleNamespace(map=map))  # the interpreter runs one kernel at a time
    monkeypatch.setattr(kernel_bench, "ThreadPoolExecutor", lambda workers: pool)
    bench = gpu_speed.Bench(config, CPU, contexts=(16,), fast=True)
    bench.build("int4", 64, records.Record(None, {}))

    def seconds(launch, layers):
        launch(layers[0])
        if broken in triton_kernels.TILES.values():
            raise MemoryError("shared")
        return 1e-3 if good[0] in triton_kernels.TILES.values() else 1e-6

    with torch.inference_mode():
        tuned = kernel_bench.tune(bench.engine, 2, seconds)
        others = kernel_bench.others(bench.engine, lambda launch, layers: launch(layers[0]) is None or 1e-6)
    rates = {name: value for name, value in tuned.items() if isinstance(value, dict)}
    assert list(rates) == ["heads 128 to 192", "added 128 to 128", "gated 128 to 384", "added 192 to 128"]
    assert all(set(rate["tiles"]) == {"128 32 1 1", "128 16 1 1"} and rate["gb_per_s"] > 0 for rate in rates.values())
    assert rates["heads 128 to 192"]["tile"] == good[1] and "MemoryError: shared" in tuned["gated (128, 32, 1, 9)"]
    assert set(triton_kernels.TILES.values()) == {good[1]} and min(others.values()) == 1


def test_bytes_of_a_step_are_those_of_the_planner(config):
    bench, backbone = gpu_speed.Bench(config, CPU, contexts=(16,)), config.backbone
    bench.build("int4", 64, records.Record(None, {}))
    linear = memory.linear_bytes(backbone, "int4", 64)
    wide = memory.norm_bytes(backbone) + 300 * memory.cache_bytes(backbone)  # fp32 here, bf16 in the plan
    assert bench.step_bytes(300) == linear + 2 * wide


def test_a_fault_is_named_and_the_rest_still_measured(config, tmp_path, monkeypatch, capsys):
    bench = gpu_speed.Bench(config, CPU, contexts=(16,))
    for name in gpu_speed.STEPS:
        monkeypatch.setattr(bench, name, lambda record: None)
    monkeypatch.setattr(bench, "copy", lambda record: 1 / 0)
    monkeypatch.setattr(bench, "vocoder", lambda record: record.add(vocoder=1))
    record = bench.record(tmp_path / "run.json")
    bench.run(record)
    assert record.data["faults"] == {"copy": "ZeroDivisionError: division by zero"} and record.data["vocoder"] == 1
    assert "copy was not measured" in capsys.readouterr().err


def test_random_weights_are_as_wide_as_they_should_be(config):
    for weights, group in (("int4", 64), ("int8", None), ("fp8", None)):
        model = random_model.random_backbone(config.backbone, weights, group, CPU, torch.float32)
        matrix = model.model.layers[1].mlp.down_proj.dequantized()
        assert matrix.isfinite().all() and matrix.std().item() == pytest.approx(random_model.STD, rel=0.1)


def test_the_command(monkeypatch, capsys):
    class Small(gpu_speed.Bench):
        def run(self, record):
            record.add(layers=self.config.backbone.num_hidden_layers, group=self.group)

    monkeypatch.setattr(gpu_speed, "Bench", Small)
    assert cli.main(["bench", "scale", "--preset", "full", "--layers", "3", "--json"]) == 0
    data = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert data["layers"] == 3 and data["group"] == 128 and data["setup"]["model"] == "130b"
    assert cli.main(["bench", "scale", "--preset", "huge"]) == 1


BARE = r"""
import importlib.machinery, re, sys
from importlib import metadata

import aqaa

def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()

kept, left = set(), ["torch", "triton", "transformers", "safetensors", "numpy"]
while left:
    name = plain(left.pop())
    if name not in kept:
        kept.add(name)
        try:
            asked = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for other systems
            asked = []
        left += [re.match(r"[\w.-]+", line)[0] for line in asked if "extra ==" not in line]
tops = metadata.packages_distributions()
absent = {top for top, names in tops.items() if kept.isdisjoint(map(plain, names))} - {"aqaa"}
assert {"soundfile", "scipy"} <= absent and "tqdm" not in absent
find = importlib.machinery.PathFinder.find_spec
def found(name, *more):
    return None if name.split(".")[0] in absent else find(name, *more)

importlib.machinery.PathFinder.find_spec = found

from aqaa import cli
from aqaa.evaluation import gpu_speed

assert gpu_speed.__file__.startswith(sys.argv[1])
gpu_speed.TOKENS, gpu_speed.ANSWER, gpu_speed.QUESTION, gpu_speed.REPEATS, gpu_speed.SPOKEN = 8, 30, 40, 1, 0.5
gpu_speed.ASKED, gpu_speed.COPIED = 0.5, 1 << 20
sys.exit(cli.main(["bench", "scale", "--preset", "mini", "--layers", "1", "--out", "run.json"]))
"""


def test_it_runs_from_the_package_alone_on_a_bare_machine(tmp_path):
    """No soundfile, no scipy, no weights: whatever torch, triton, transformers, safetensors and numpy do not bring
    cannot be imported. The tree that travels is the folder aqaa/; data/, notebooks/ and tests/ stay behind."""
    package = Path(gpu_speed.__file__).parents[1]
    shutil.copytree(package, tmp_path / "aqaa", ignore=shutil.ignore_patterns("__pycache__"))
    assert sum(path.stat().st_size for path in tmp_path.rglob("*")) < 3e6  # bytes; 48 MiB would travel
    run, env = [sys.executable, "-c", BARE, str(tmp_path)], {**os.environ, "PYTHONPATH": str(tmp_path)}
    env["TRITON_INTERPRET"] = "0"  # as where kernels are compiled
    done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    wanted = {"copy_gb_per_s", "layer_error", "prefill", "decode", "vocoder", "ask", "fp8"}
    assert wanted <= set(data) and data["faults"] == {} and data["setup"]["layers"] == 1


def test_it_fits_an_h100_in_four_bits():
    bench = gpu_speed.Bench(gpu_speed.presets.preset("full"), CPU)
    (setup,) = plan_table.setups("130b", ["1xH100-80"], "int4", context=bench.size)
    assert plan.plan(setup).spare > 2 and bench.size > 8192  # GiB of 79.1


def test_segments_may_grow(monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "of others")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")  # and as it was afterwards
    monkeypatch.setattr(gpu_speed.presets, "preset", lambda name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gpu_speed.measure()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
