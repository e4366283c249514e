"""Merging of models that share a parent: one set of weights out of several (AQAA paper 3.4).

The paper merges W = (5·W_SFT1 + 5·W_SFT2 + 1·W_DPO) / 11. Beside it stand slerp and TIES (Yadav et
al. 2023), and what shows why a plain mean may work: the loss along the line between two models.
All take state dicts, count in fp32, and return fp32."""

from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file

from aqaa.files import ModelError, check_file, fingerprint, named, scratch
from aqaa.records import provenance
from aqaa.weights import model_folder

PARALLEL = 0.9995  # of the cosine: beyond it the arc is as good as a straight line


def linear(states, weights):
    """The weighted mean of state dicts. Raises ValueError for weights that add up to nothing."""
    total = float(sum(weights))
    if len(weights) != len(states) or not total or min(weights) < 0:
        raise ValueError(f"weights {weights} for {len(states)} models: give each one, 0 or more")
    return {
        name: sum(w / total * state[name].float() for w, state in zip(weights, states, strict=True))
        for name in states[0]
    }


def slerp(states, share=0.5):
    """Between two models, each tensor along the arc of its directions; share of the second one."""
    first, second = states
    return {name: _slerp(first[name].float(), second[name].float(), share) for name in first}


def _slerp(a, b, share):
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0)
    if cosine.abs() > PARALLEL or not a.norm() or not b.norm():
        return torch.lerp(a, b, share)
    angle = torch.arccos(cosine)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def ties(base, states, weights, density=0.5):
    """`base` and the changes of several models: trim each to its largest share `density`, elect the
    sign of greater mass, take the weighted mean of those changes that have it."""
    merged = {}
    for name, start in base.items():
        start = start.float()
        changes = torch.stack([_trimmed(state[name].float() - start, density) for state in states])
        column = torch.tensor(weights, dtype=torch.float32).view(-1, *[1] * start.ndim)
        weighted = changes * column
        elected = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
        agree = changes.sign() == elected
        mass = (column * agree).sum(0).clamp(min=1e-8)
        merged[name] = start + (weighted * agree).sum(0) / mass
    return merged


def _trimmed(change, density):
    """The largest share of a tensor's values by magnitude, the others 0."""
    keep = max(1, int(density * change.numel()))
    kept = torch.zeros_like(change).flatten()
    largest = change.abs().flatten().topk(keep).indices
    kept[largest] = change.flatten()[largest]
    return kept.view_as(change)


METHODS = {  # name: of states and weights; slerp takes two, ties the first as base of the others
    "linear": linear,
    "slerp": lambda states, weights: slerp(states, weights[1] / sum(weights)),
    "ties": lambda states, weights: ties(states[0], states[1:], weights[1:]),
}


def simplex(parts=4, corners=3):
    """Every way to share `parts` among so many models: tuples of whole numbers."""
    return (row for row in product(range(parts + 1), repeat=corners) if sum(row) == parts)


def barrier(loss, first, second, points=5):
    """Losses at equal steps along the line between two models, and how far the worst of them rises
    above the line between the ends. loss: a function of a state dict."""
    shares = [i / (points - 1) for i in range(points)]
    losses = [loss(linear([first, second], (1 - share, share))) for share in shares]
    ends = [(1 - share) * losses[0] + share * losses[-1] for share in shares]
    return losses, max(at - line for at, line in zip(losses, ends, strict=True))


# ---- files --------------------------------------------------------------------------------------


def read_parents(paths):
    """State dicts of safetensors files. Raises ModelError that names two which do not fit."""
    states = []
    for path in map(Path, paths):
        model_folder.read_header(path)
        states.append(load_file(path))
        for name in sorted(states[0].keys() | states[-1].keys()):
            shapes = [tuple(one[name].shape) if name in one else "none"
                      for one in (states[0], states[-1])]  # fmt: skip
            if shapes[0] != shapes[1]:
                fault = f"{paths[0]} has {shapes[0]} for {name}, {path} has {shapes[1]}"
                raise ModelError(f"{fault}: merge models of one shape.")
    return states


def merged(states, weights, method="linear"):
    """A state dict, merged by a name of METHODS. Raises ValueError."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    least, most = {"slerp": (2, 2), "ties": (2, 99)}.get(method, (1, 99))
    if not least <= len(states) <= most or len(weights) != len(states) or not sum(weights):
        count = f"{len(states)} models and {len(weights)} weights"
        need = "2" if most == 2 else f"{least} or more"
        raise ValueError(f"{method} of {count}: it takes {need}, and a weight for each")
    return METHODS[method](states, weights)


def trained(run, names):
    """State dicts of what stages left. Raises ModelError where one weight file stands for two."""
    paths = {}
    for name in names:
        if (path := run.part_file(name)) in paths.values():  # that of `init`
            fault = f"{name} has not been trained, {path} would stand in for two parents"
            raise ModelError(f"{fault}: run `aqaa train {name}` first.")
        paths[name] = path
    return read_parents(list(paths.values()))


def from_run(run, stage):
    """Merge what the stages in `stage.settings` left; writes the part of this stage."""
    settings = {"method": "linear", **stage.settings}
    states = trained(run, settings["parents"])
    backbone = model_folder.build("backbone", run.config)
    state = merged(states, settings["weights"], settings["method"])
    model_folder.fit(backbone, state, " + ".join(settings["parents"]))
    model_folder.save_part(run.out / "parts", stage.name, backbone)
    return {name: settings[name] for name in ("method", "parents", "weights")}


def merge_folders(folders, weights, out, method="linear"):
    """Write a model folder whose backbone is merged from those of several; the other parts are the
    first one's. Raises ModelError for other tokenizers or shapes, naming the folders."""
    folders, out = [Path(folder) for folder in folders], Path(out)
    first = folders[0]
    if out.resolve() in [folder.resolve() for folder in folders]:
        raise ModelError(f"{out} is one of the parents: write the merged model elsewhere.")
    configs = [model_folder.read_config(folder) for folder in folders]
    for folder in folders:
        for name in ("tokenizer.json", "linguistic.safetensors", "semantic.safetensors"):
            for path in (first / name, folder / name):
                check_file(path)
            if fingerprint(folder / name) != fingerprint(first / name):
                fault = f"{folder / name} differs from that of {first}"
                raise ModelError(f"{fault}: merge models that share their tokenizers.")
    states = read_parents([folder / "backbone.safetensors" for folder in folders])
    backbone = model_folder.build("backbone", configs[0])
    model_folder.fit(backbone, merged(states, weights, method), named(list(map(str, folders))))
    parts = {name: first / f"{name}.safetensors" for name in model_folder.parts_in(first)}
    how = {"method": method, "parents": list(map(str, folders)), "weights": list(weights)}
    record = {"merge": {**how, **provenance()}}
    with scratch() as place:
        parts["backbone"] = model_folder.save_part(place, "backbone", backbone)
        model_folder.gather(out, configs[0], first / "tokenizer.json", parts, record)
