"""Merging: the formulas on small tensors, beside mergekit where it is installed, and folders of models."""

import math
import shutil

import pytest
import torch

import aqaa
from aqaa.training import merging as M
from aqaa.weights import model_folder
from tests.conftest import fails


def states(count=3, seed=0):
    """State dicts of a matrix and a vector, near a common parent: the parent first."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (4, 6), "b": (5,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    near = [{k: v + 0.3 * torch.randn(v.shape, generator=generator) for k, v in base.items()} for _ in range(count - 1)]
    return [base, *near]


def close(one, other):
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


def test_a_weighted_mean_is_the_papers():
    one, two, three = states()
    close(M.linear([one, two, three], (5, 5, 1)), {k: (5 * one[k] + 5 * two[k] + three[k]) / 11 for k in one})
    close(M.linear([one, two, three], (0, 1, 0)), two)
    half = [{k: v.half() for k, v in state.items()} for state in (one, two)]
    merged = M.linear(half, (1, 1))
    assert merged["a"].dtype == torch.float32
    close(merged, {k: (half[0][k].float() + half[1][k].float()) / 2 for k in one})


def test_slerp_keeps_the_length_and_the_angle():
    a, b = {"w": torch.tensor([3.0, 0.0])}, {"w": torch.tensor([0.0, 3.0])}
    third = M.slerp([a, b], 1 / 3)["w"]
    assert third.tolist() == pytest.approx([3 * math.cos(math.pi / 6), 3 * math.sin(math.pi / 6)], abs=1e-5)
    close(M.slerp([a, b], 0), a)
    close(M.slerp([a, b], 1), b)
    close(M.slerp([a, a], 0.3), a)  # no arc between equal ones
    zero = {"w": torch.zeros(2)}
    close(M.slerp([a, zero], 0.5), {"w": torch.tensor([1.5, 0.0])})


def test_ties_trims_elects_and_averages_those_that_agree():
    base = {"w": torch.tensor([1.0, 1.0, 1.0, 1.0])}
    one = {"w": base["w"] + torch.tensor([0.4, -0.3, 0.1, 0.0])}
    two = {"w": base["w"] + torch.tensor([0.2, 0.5, -0.1, 0.3])}
    # Half is kept: one 0.4 −0.3 · ·, two · 0.5 · 0.3. At the second place 0.5 outweighs −0.3.
    close(M.ties(base, [one, two], (1, 1)), {"w": torch.tensor([1.4, 1.5, 1.0, 1.3])})
    close(M.ties(base, [one, one], (1, 3), density=1.0), one)
    close(M.ties(base, [base, base], (1, 1)), base)


def test_mergekit_agrees():
    pytest.importorskip("mergekit", reason="mergekit is not installed: its formulas are tested on numbers above")
    from mergekit.merge_methods.generalized_task_arithmetic import get_mask
    from mergekit.merge_methods.slerp import slerp
    from mergekit.sparsify import SparsificationMethod, sparsify

    base, one, two = states(seed=3)
    for name in base:
        theirs = slerp(torch.tensor([0.3]), one[name][None], two[name][None])[0]
        torch.testing.assert_close(M.slerp([one, two], 0.3)[name], theirs, rtol=1e-5, atol=1e-6)
        changes = [
            sparsify(state[name] - base[name], 0.5, SparsificationMethod.magnitude, rescale_norm=None)
            for state in (one, two)
        ]
        weights = torch.tensor([2.0, 1.0]).view(-1, *[1] * base[name].ndim)
        weighted = torch.stack(changes) * weights
        mask = get_mask(weighted, method="sum")
        mass = (weights * mask).sum(0)
        mass[mass == 0] = 1
        theirs = base[name] + (weighted * mask).sum(0) / mass
        torch.testing.assert_close(M.ties(base, [one, two], (2, 1))[name], theirs, rtol=1e-5, atol=1e-6)


def test_a_simplex_has_every_share_once():
    rows = list(M.simplex(4))
    assert len(rows) == len(set(rows)) == 15 and all(sum(row) == 4 and min(row) >= 0 for row in rows)
    assert list(M.simplex(1)) == [(0, 0, 1), (0, 1, 0), (1, 0, 0)]


def test_a_barrier_is_what_rises_above_the_line():
    one, two = {"w": torch.tensor(-1.0)}, {"w": torch.tensor(1.0)}
    losses, height = M.barrier(lambda state: 1.0 - float(state["w"]) ** 2 + float(state["w"]), one, two)
    assert losses == pytest.approx([-1, 0.25, 1, 1.25, 1]) and height == pytest.approx(1.0)
    flat = M.barrier(lambda state: float(state["w"]), one, two)
    assert flat[1] == pytest.approx(0)


@pytest.mark.parametrize("method, weights, words", [
    ("average", (1, 1), "unknown method 'average': choose one of linear, slerp, ties"),
    ("slerp", (1, 1, 1), "slerp of 3 models and 3 weights: it takes 2"),
    ("linear", (1, 1), "linear of 3 models and 2 weights"),
    ("linear", (0, 0, 0), "a weight for each"),
    ("linear", (2, -1, 1), "each one, 0 or more"),
])  # fmt: skip
def test_merges_that_mean_nothing_are_refused(method, weights, words):
    with pytest.raises(ValueError, match=words):
        M.merged(states(3)[: len(weights)] if method == "slerp" else states(3), weights, method)


# ---- folders --------------------------------------------------------------------------------------------------------


def changed(folder, place, scale):
    """A copy of a model folder whose backbone is another one's."""
    shutil.copytree(folder, place)
    backbone = aqaa.load(folder).backbone
    with torch.no_grad():
        for weight in backbone.parameters():
            weight.mul_(scale)
    model_folder.save_part(place, "backbone", backbone)
    return place


def test_folders_merge_to_a_model_that_loads(tiny_folder, tmp_path):
    other, out = changed(tiny_folder, tmp_path / "other", 1.5), tmp_path / "merged"
    M.merge_folders([tiny_folder, other], (1, 3), out)
    one, two = (aqaa.load(folder).backbone.lm_head.weight for folder in (tiny_folder, out))
    torch.testing.assert_close(two, one * 1.375, rtol=2e-3, atol=1e-4)
    assert model_folder.inspect(out)["backbone"]["as_recorded"]
    with fails("is one of the parents"):
        M.merge_folders([tiny_folder, out], (1, 1), out)


def test_parents_that_do_not_fit_are_named(tiny_folder, tmp_path):
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    path = other / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")
    with fails(str(path), str(tiny_folder), "share their tokenizers"):
        M.merge_folders([tiny_folder, other], (1, 1), tmp_path / "out")
    shutil.copy(tiny_folder / "tokenizer.json", path)
    shutil.copy(tiny_folder / "hift.safetensors", other / "backbone.safetensors")
    with fails(str(other / "backbone.safetensors"), str(tiny_folder / "backbone.safetensors"), "none", "one shape"):
        M.merge_folders([tiny_folder, other], (1, 1), tmp_path / "out")
    assert not (tmp_path / "out").exists()
