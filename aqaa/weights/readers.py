"""Small readers for files that others wrote: json, yaml and pickles, taken as plain data and never
executed. Whatever is wrong with a file is one sentence (ModelError)."""

import math
import pickle
import re
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from aqaa.files import AGAIN, ModelError, check_file, read_object, refusing
from aqaa.weights import verify

BROKEN = (pickle.UnpicklingError, EOFError, OSError, AttributeError, *verify.BROKEN)
YAML_BYTES = 1_000_000  # of the longest yaml that is read; published ones have a few thousand


def unusable(sentence):
    """The ModelError that says so, and to get the whole folder again."""
    return ModelError(f"{sentence}: {AGAIN}.")


def file_in(folder, name):
    """The path of a file that must be there. Raises ModelError."""
    path = Path(folder) / name
    check_file(path, AGAIN)
    return path


def read_json(path):
    """A mapping. Raises ModelError."""
    check_file(path, AGAIN)
    return read_object(path, AGAIN, nan=False)


def pickled(path):
    """{name: tensor} of a torch.save file, mapped where its format allows, out of its wrappings.
    Raises ModelError for one that is cut, foreign, or holds code, which is never executed."""
    check_file(path, AGAIN)
    with open(path, "rb") as file:
        mapped = file.read(4) == b"PK\3\4"
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except BROKEN as fault:
        if foreign := re.search(r"GLOBAL ([\w.]+)", str(fault)):
            wish = f"{path} wants to run {foreign[1]} when read"
            raise ModelError(f"{wish}: take a file of tensors only.") from None
        raise unusable(f"{path} is cut short or no file of torch.save") from None
    inner = data
    while isinstance(inner, dict):
        data = inner
        inner = data.get("state_dict", data.get("model"))
    named = data.items() if isinstance(data, dict) and inner is None else ()
    tensors = {str(name): value for name, value in named if isinstance(value, torch.Tensor)}
    if not tensors:
        raise unusable(f"{path} holds no named tensors")
    return {name.removeprefix("module."): value for name, value in tensors.items()}


class Ref(str):
    """`!ref <name>` of a yaml: the value of another entry."""


class PlainLoader(yaml.SafeLoader):
    """Every tag (`!new:`, `!name:`, `!apply:`, python's own) is passed over, its content kept."""

    def plain(self, tag, node):
        if isinstance(node, yaml.MappingNode):
            return self.construct_mapping(node, deep=True)
        if isinstance(node, yaml.SequenceNode):
            return self.construct_sequence(node, deep=True)
        return Ref(node.value) if tag == "!ref" else node.value


PlainLoader.add_multi_constructor("", PlainLoader.plain)


def read_yaml(path):
    """A mapping of plain data. Raises ModelError."""
    check_file(path, AGAIN)
    faults = (yaml.YAMLError, ValueError, TypeError, RecursionError)
    with refusing(f"{path} is no yaml that can be read", AGAIN, *faults):
        if (size := path.stat().st_size) > YAML_BYTES:
            raise ValueError(f"it has {size:,} bytes, at most {YAML_BYTES:,} are expected")
        data = yaml.load(path.read_text(encoding="utf-8"), PlainLoader)
    if not isinstance(data, dict):
        raise unusable(f"{path} is no yaml of names and values")
    return data


def pick(config, tree, names, path, below):
    """`config` with values of a yaml's entry `below`, as numbers of their types, or ModelError.
    names: {field: where it stands}."""
    values = {}
    for name, where in names.items():
        value = tree
        for step in f"{below}.{where}".split("."):
            value = value.get(step) if isinstance(value, dict) else None
            if isinstance(value, Ref):
                value = tree.get(value.strip().strip("<>"), value)
        if value is None:
            continue
        try:
            values[name] = _like(getattr(config, name), value)
        except (ValueError, TypeError, OverflowError):
            value = verify.shown(value)  # aliases of aliases would be endless
            raise unusable(f"{path} gives {below}.{where} as {value}, which is no number") from None
    return replace(config, **values)


def _like(default, value):
    """value (yaml reads 1e-06 as text) as the type of a default: a number, or tuples of them."""
    if isinstance(default, tuple):
        return tuple(_like(default[0], one) for one in value)
    number = type(default)(value)
    if isinstance(value, bool) or not math.isfinite(number) or number != float(value):
        raise ValueError(value)
    return number
