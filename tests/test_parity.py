"""The parity runner on small fixtures made here: it finds them, it passes the equal, it fails everything else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from aqaa import audio
from tests.parity import common
from tests.parity.__main__ import check, fixtures, kinds, main

ROOT = Path(__file__).parent.parent
PROMISED = [
    "sanm_stream", "preprocess", "s3_v1_25hz", "vq06_long_split", "interleave", "mel_features", "length_regulator",
    "cfm_estimator", "flow", "hift", "io",
]


def preprocess_fixture(folder, name="preprocess", error=0.0, drop=None):
    wav = 0.1 * torch.randn(1, 9000, generator=torch.Generator().manual_seed(0))
    resampled = audio.resample(wav, 24_000)
    normed = audio.energy_norm(resampled)
    outputs = {"resampled_0": resampled, "energy_norm_0": normed, "trimmed_0": audio.trim_silence(normed[0])[None]}
    outputs["trimmed_0"] = outputs["trimmed_0"] + error
    tensors = {"in.wav_0": wav, **{f"out.{k}": v for k, v in outputs.items() if k != drop}}
    save_file(tensors, folder / f"{name}.safetensors")
    tolerance = {k: {"suggested_atol": 1e-6} for k in outputs}
    meta = {"config": {"items": [{"sr": 24_000}]}, "tolerance": tolerance}
    (folder / f"{name}.json").write_text(json.dumps(meta), encoding="utf-8")


def test_equal_tensors_pass(tmp_path, capsys):
    preprocess_fixture(tmp_path)
    assert main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[-1] == "3 passed, 0 failed"
    assert all(line.split()[0] == "preprocess" and line.endswith("PASS") for line in lines[:-1])


@pytest.mark.parametrize(("fault", "passed"), [
    ({"error": 1e-4}, 2), ({"error": float("nan")}, 2), ({"drop": "energy_norm_0"}, 1),
])
def test_anything_else_fails(tmp_path, capsys, fault, passed):
    preprocess_fixture(tmp_path, **fault)
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"{passed} passed, 1 failed"


def test_every_promised_kind_is_registered_and_the_longest_prefix_wins(tmp_path):
    assert set(PROMISED) <= set(kinds())
    for name in ("s3_v1_25hz_tiny", "s3_v1_25hz_other", "preprocess_2"):
        (tmp_path / f"{name}.json").write_text("{}", encoding="utf-8")
    (tmp_path / "README.json").write_text("{}", encoding="utf-8")  # no tensors beside it: no fixture
    save_file({"x": torch.zeros(1)}, tmp_path / "mystery.safetensors")
    (tmp_path / "mystery.json").write_text("{}", encoding="utf-8")
    (tmp_path / "step1").mkdir()
    for name in ("config.json", "preprocess.json"):
        (tmp_path / "step1" / name).write_text("{}", encoding="utf-8")
    save_file({"x": torch.zeros(1)}, tmp_path / "step1" / "io.safetensors")
    found = {path.name: key for key, path in fixtures(tmp_path)}
    assert found == {
        "s3_v1_25hz_tiny": "s3_v1_25hz_tiny", "s3_v1_25hz_other": "s3_v1_25hz", "preprocess_2": "preprocess",
        "mystery": None, "step1": "io",
    }
    assert [line[3] for line in check(None, tmp_path / "mystery")] == [False]


def test_codes_may_differ_only_where_two_entries_are_equally_near():
    want, got = torch.tensor([1, 2, 3]), torch.tensor([1, 5, 3])
    assert common.compare_codes("c", got, want)[1] == 1
    assert common.compare_codes("c", got, want, torch.tensor([1.0, 9e-5, 1.0]))[1] == 0
    assert common.compare_codes("c", got, want, torch.tensor([1.0, 2e-4, 1.0]))[1] == 1
    assert common.compare_codes("c", got[:2], want)[1] == float("inf")
    assert common.max_error(torch.zeros(2), torch.zeros(3)) == float("inf")
    assert common.max_error(torch.zeros(1, 0, 4), torch.zeros(0)) == 0


def test_the_command_line(tmp_path):
    preprocess_fixture(tmp_path)
    command = [sys.executable, "-m", "tests.parity"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    good = subprocess.run([*command, tmp_path], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert (good.returncode, good.stdout.splitlines()[-1], good.stderr) == (0, "3 passed, 0 failed", "")
    assert main([]) == main([str(tmp_path / "none")]) == 2
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 1  # nothing was checked


def test_the_golden_tensors_that_come_with_the_repository():
    """In a process of its own: the rounding mode of MKL's FFT is chosen before torch is loaded."""
    golden = Path(__file__).parent / "parity" / "golden"
    done = subprocess.run([sys.executable, "-m", "tests.parity", str(golden)], capture_output=True, text=True)
    passed = done.stdout.splitlines()[-1]
    assert done.returncode == 0 and int(passed.split()[0]) >= 80, done.stdout + done.stderr
