"""Training by several processes: the numbers of one process, in every way to divide the work; cut off and resumed."""

import csv
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from aqaa import cli, config
from aqaa.backbone import step1
from aqaa.scale import convert
from aqaa.tokenizers import dialogue
from aqaa.training import sharded
from aqaa.training.pairs import Pair, write_pairs

ROOT = Path(__file__).resolve().parent.parent
MINI = config.preset("mini")
RUNS = """
import json, sys
from aqaa.training import loop, sharded
real = sharded.SharedTrainer._one_step
sharded.distributed.init_process_group("gloo")
for options in json.load(open(sys.argv[1])):
    cut = options.pop("cut", None)
    def one_step(trainer):
        if trainer.step == cut:
            raise LookupError("cut off")  # a fault in mid-run, on every process
        return real(trainer)
    sharded.SharedTrainer._one_step, loop.SAVE_SECONDS = one_step, 60.0 if cut is None else 0.0
    try:
        sharded.main(**options, quiet=True)
    except LookupError:
        pass
sharded.distributed.destroy_process_group()
"""


def answers(rng):
    ids = MINI.ids
    words = rng.integers(60, ids.n_text, rng.integers(3, 8)).tolist()
    groups = [[*rng.integers(ids.n_text, ids.semantic_start, 2), *rng.integers(ids.semantic_start, ids.end, 3)]
              for _ in range(rng.integers(3, 6))]  # fmt: skip
    return [int(i) for i in dialogue.layout().arrange(words, [i for group in groups for i in group], ids)]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with a small language model of the mini's ids, the same in int4, lines and pairs."""
    folder, rng = tmp_path_factory.mktemp("given"), np.random.default_rng(0)
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_attention_groups": 2}
    step1.build(replace(MINI.backbone, num_hidden_layers=3, **sizes)).save_pretrained(folder / "model")
    convert.convert(folder / "model", folder / "int4", group=16, quiet=True)
    prompts = [[MINI.ids.bos, *rng.integers(60, MINI.ids.n_text, 10).tolist()] for _ in range(40)]
    lines = [{"prompt": prompt, "answer": answers(rng)} for prompt in prompts]
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    write_pairs(folder / "pairs.npz", [Pair(line["prompt"], line["answer"], answers(rng), "sampled", f"q{i}")
                                       for i, line in enumerate(lines)])  # fmt: skip
    return folder


def options(given, out, data="lines.jsonl", **changed):
    return {"model": str(given / "model"), "data": str(given / data), "length": 200, "steps": 4, "lr": 1e-3,
            "rows": 4, "out": str(given / out), **changed}  # fmt: skip


def run(given, runs, processes):
    """Run some trainings one after the other, in so many processes."""
    name = given / f"runs{processes}.json"
    name.write_text(json.dumps(runs), encoding="utf-8")
    script = given / "runs.py"
    script.write_text(RUNS, encoding="utf-8")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run([*start, script, name], cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]


def last(given, out):
    with open(given / out / "full.csv", newline="", encoding="utf-8") as file:
        return {name: float(value) for name, value in list(csv.DictReader(file))[-1].items()}


@pytest.fixture(scope="module")
def trained(given):
    """The same trainings by one process, by two, and by four."""
    half = {"rows": 2}
    kinds = {"sft": {}, "dpo": {"data": "pairs.npz", "objective": "text_masked"},
             "anchored": {"data": "pairs.npz", "objective": "anchored"}, "lora": {"adapt": 4},
             "qlora": {"adapt": 4, "model": str(given / "int4")}}  # fmt: skip
    for name, kind in kinds.items():
        sharded.main(**options(given, f"one-{name}", **kind), quiet=True)
    two = [options(given, f"two-{name}", **kind, **half) for name, kind in kinds.items()]
    two += [options(given, "two-layers", ranks=2), options(given, "two-cut", **half, cut=3),
            options(given, "two-cut", **half, resume=True)]  # fmt: skip
    run(given, two, 2)
    run(given, [options(given, "four", ranks=2, **half)], 4)
    return kinds


@pytest.mark.parametrize("one, other", [
    ("one-sft", "two-sft"), ("one-sft", "two-layers"), ("one-sft", "four"), ("one-dpo", "two-dpo"),
    ("one-anchored", "two-anchored"), ("one-lora", "two-lora"), ("one-qlora", "two-qlora"),
])  # fmt: skip
def test_several_processes_reach_the_loss_of_one(given, trained, one, other):
    losses = [last(given, name)["loss"] for name in (one, other)]
    assert losses[0] == pytest.approx(losses[1], abs=3e-4)  # bf16 products where the processor has them
    part = "adapters/adapter_model" if "lora" in one else "model/model"
    ours, theirs = (load_file(given / name / f"{part}.safetensors") for name in (one, other))
    before = load_file(given / "model" / "model.safetensors")
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name in [name for name in ours if "lora_A" not in name]:  # which began at random; lora_B as zeros
        moved = (ours[name] - before.get(name, 0.0)).norm()
        assert (ours[name] - theirs[name]).norm() < 0.05 * moved, name


def test_a_run_that_was_cut_off_ends_as_one_that_was_not(given, trained):
    whole, cut = (load_file(given / name / "model" / "model.safetensors") for name in ("two-sft", "two-cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert last(given, "two-cut") | {"seconds": 0} == last(given, "two-sft") | {"seconds": 0}
    kept = sorted(path.name for path in (given / "two-cut").glob("*.ckpt"))
    assert len(kept) == 2 and kept[-1] == "full-00000004.ckpt"
    shares = list((given / "two-cut" / kept[-1]).glob("*.distcp"))
    assert len(shares) == 2  # one a process


def test_all_weights_learn_or_those_of_lora_alone(given, trained):
    before = load_file(given / "model" / "model.safetensors")
    after = load_file(given / "one-sft" / "model" / "model.safetensors")
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in before)
    for name in ("one-lora", "one-qlora"):
        made = load_file(given / name / "adapters" / "adapter_model.safetensors")
        assert len(made) == 2 * 7 * 3 and all("lora_" in key for key in made)
        assert all(value.any() for value in made.values())  # B begins as zeros


def test_text_masked_moves_no_row_that_makes_sound(given, trained):
    before = load_file(given / "model" / "model.safetensors")["lm_head.weight"]
    for name, moves in (("one-dpo", False), ("two-dpo", False), ("two-anchored", True)):
        after = load_file(given / name / "model" / "model.safetensors")["lm_head.weight"]
        audio = slice(MINI.ids.n_text, MINI.ids.end)
        assert torch.equal(before[audio], after[audio]) != moves and not torch.equal(before, after)


def test_the_released_class_loads_what_was_trained(given, trained):
    model = step1.Step1ForCausalLM.from_pretrained(given / "four" / "model")
    record = json.loads((given / "four" / "full.json").read_text(encoding="utf-8"))
    assert record["processes"] == 4 and record["steps"] == 4 and model.config.num_hidden_layers == 3


@pytest.mark.parametrize("changed, said", [
    ({"data": "nowhere.jsonl"}, "cannot be read"), ({"data": "runs.py"}, "line 1 of .* is no example"),
    ({"data": "model"}, "cannot be read"), ({"data": "pairs.npz"}, "is no example"),
    ({"data": "lines.jsonl", "objective": "plain"}, "lines.jsonl"), ({"model": "int4"}, "--adapt RANK"),
    ({"ranks": 3}, "cannot share a layer"), ({"model": "."}, "neither 130b"),
])  # fmt: skip
def test_bad_input_is_one_sentence(given, changed, said, capsys):
    (given / "runs.py").write_text(RUNS, encoding="utf-8")
    words = []
    for name, value in ({"model": "model", "data": "lines.jsonl"} | changed).items():
        words += [f"--{name}", str(given / value) if name in ("model", "data") else str(value)]
    out = given / "refused"
    assert cli.main(["train", "full", *words, "--out", str(out), "--steps", "2"]) == 1
    err = capsys.readouterr().err
    told = [line for line in err.splitlines() if line.startswith("aqaa: ")]
    assert len(told) == 1 and re.search(said, told[0]) and "Traceback" not in err
    assert not out.exists()


@pytest.mark.parametrize("line, said", [
    ({"prompt": [1, 2], "answer": []}, "neither of them empty"), ({"prompt": [1], "answer": [MINI.ids.end]}, "outside"),
    ({"prompt": [1]}, "answer"), ([1, 2], "no example"), ({"prompt": [1], "answer": ["a"]}, "no example"),
])  # fmt: skip
def test_a_bad_line_is_named(tmp_path, line, said):
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"prompt": [1], "answer": [2]}, line])), encoding="utf-8")
    with pytest.raises(sharded.ModelError, match=f"line 2 of .*{said}"):
        sharded.Lines(path, MINI.ids)


def test_a_checkpoint_of_another_run_is_refused(given, trained):
    with pytest.raises(sharded.ModelError, match="no checkpoint of this task"):
        sharded.main(**options(given, "one-lora", resume=True, steps=6), quiet=True)
