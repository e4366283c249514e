"""`aqaa bench`: one runner for all; idle and busy, who takes turns, what is counted; modules stay what they are."""

import contextlib
import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from aqaa import cli, loading, pipeline
from aqaa.config import preset
from aqaa.evaluation import bench, parts, peers, speed
from aqaa.fast import prepared
from aqaa.weights import model_folder
from tests.conftest import RATE, tone


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("as_json", [False, True])
def test_a_new_measurement_is_an_entry_and_a_file(monkeypatch, tmp_path, capsys, as_json):
    def measure(model, seed, limit=3, progress=True):
        return {"given": [model, seed, limit, progress], "rows": [1], "faults": {"x": "no"}}

    new = SimpleNamespace(measure=measure, table=lambda result: result["given"][0])
    monkeypatch.setitem(sys.modules, "aqaa.evaluation.new", new)
    monkeypatch.setitem(bench.BENCHES, "new", "new")
    monkeypatch.setattr(loading, "load", lambda preset, device: f"{preset} on {device}")
    out, options = tmp_path / "new.json", {"seed": 4, "limit": None, "busy": False}
    assert bench.main("new", preset="tiny", out=out, as_json=as_json, **options) == 1  # it has faults
    printed, written = capsys.readouterr().out, read(out)
    assert written["what"] == "new" and written["given"] == ["tiny on cpu", 4, 3, not as_json]
    assert written.pop("rows") == [1]  # single cases stand in the file only
    assert (json.loads(printed) == written) if as_json else (printed == "tiny on cpu\n")


def test_turns_are_taken_and_ratios_are_of_neighbours(monkeypatch):
    clock, ran = [0.0], []

    def work(name, costs):
        def run():
            ran.append(name)
            clock[0] += costs.pop(0)

        return run

    for name in ("process_time", "perf_counter"):
        monkeypatch.setattr(parts.time, name, lambda: clock[0])
    ours, theirs = [9, 1, 2, 4, 9, 1], [9, 3, 6, 12, 9, 5]  # the machine slows down; the ratio stays
    row = parts.time_case(parts.Case("x", 2, work("a", ours), {"b": work("b", theirs)}, lambda: {"max_error": 0.5}), 3)
    assert ran == ["a", "b"] * 6
    assert row["cpu"] == {"aqaa": 0.5, "b": 1.5} and row["wall"] == {"aqaa": 0.5, "b": 2.5}
    assert row["times_faster"] == {"b": 3.0} and row["max_error"] == 0.5


def test_threads_are_given_back_after_a_fault():
    def fail():
        raise RuntimeError("no")

    before = torch.get_num_threads()
    with pytest.raises(RuntimeError):
        parts.time_case(parts.Case("x", 1, fail, {}), 1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("only", ["linguistic", "hift", "backbone"])
def test_the_command(tmp_path, capsys, monkeypatch, only):
    monkeypatch.setattr(peers, "installed", lambda package: False)
    out = tmp_path / "parts.json"
    assert cli.main(["bench", "parts", "--only", only, "--limit", "1", "--out", str(out)]) == 0
    results, printed = read(out), capsys.readouterr().out
    assert results["what"] == "parts" and results["preset"] == "mini" and results["commit"] is not None
    assert results["peers"] == {"s3tokenizer": None, "funasr": None, "matcha-tts": None}
    assert "| part |" in printed and "pip install 'aqaa[peers]'" in printed
    for row in results["parts"]:
        assert f"| {row['part']} |" in printed
        assert (row["cpu"]["aqaa"] if "cpu" in row else row["tokens_per_s"]) > 0
        assert row.get("max_error", 0) < 1e-4


def test_it_wants_sizes_not_weights(capsys):
    assert cli.main(["bench", "parts", "--preset", "data/mini"]) == 1
    assert "--preset is mini or full" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["linguistic", "semantic", "flow", "hift"])
def test_prepared_weights_are_the_same_weights(name, tmp_path):
    torch.manual_seed(0)
    config = preset("mini")
    module = model_folder.build(name, config)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    matrices = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    after = prepared.prepare(module).state_dict()
    assert not module.training and all(layer.weight.stride(0) == 1 for layer in matrices)
    for key, value in before.items():
        assert key.endswith(("weight_g", "weight_v")) or torch.equal(value, after[key])
    model_folder.save_part(tmp_path, name, module)
    again = model_folder.load_part(tmp_path, name, model_folder.build(name, config))
    assert again.state_dict().keys() == before.keys()


def test_a_prepared_layer_still_learns():
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 8), torch.randn(5, 24)
    expected = torch.autograd.grad(layer(x).square().sum(), layer.parameters())
    prepared.prepare(layer)
    found = torch.autograd.grad(layer(x).square().sum(), layer.parameters())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("fault", [None, ValueError, KeyboardInterrupt])
def test_a_busy_machine_is_idle_again_whatever_happens(monkeypatch, fault):
    started, real = [], speed.subprocess.Popen
    monkeypatch.setattr(speed.subprocess, "Popen", lambda *args: started.append(real(*args)) or started[-1])
    with contextlib.suppress(fault or ()):
        with speed.busy_machine(2):
            assert len(started) == 2 and all(process.poll() is None for process in started)
            if fault:
                raise fault
    assert not any(process.poll() is None for process in started)


def test_idle_and_busy_stand_side_by_side(tiny_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "_questions", lambda count: [(tone(), RATE)] * count)
    monkeypatch.setitem(pipeline.SAMPLING, "max_tokens", 60)
    out = tmp_path / "speed.json"
    assert cli.main(["bench", "speed", "--preset", str(tiny_folder), "--limit", "1", "--busy", "--out", str(out)]) == 0
    results = read(out)
    assert results["busy_loops"] == os.cpu_count()
    assert set(results["busy"]) == set(speed.SIDE_BY_SIDE) <= set(results)
    ratio = results["busy"]["total_s"] / results["total_s"]
    assert results["busy_over_idle"] == pytest.approx(ratio, rel=0.05)
