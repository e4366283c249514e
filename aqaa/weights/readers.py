"""Small readers for files that others wrote: json, yaml and pickles, taken as plain data and never executed.

Whatever is wrong with a file is one sentence (ModelError).
"""

import math
import pickle
import re
from dataclasses import fields
from pathlib import Path

import torch
import yaml

from aqaa.files import AGAIN, ModelError, brief, check_file, read_object
from aqaa.weights import verify

BROKEN = (pickle.UnpicklingError, EOFError, OSError, AttributeError, *verify.BROKEN)
YAML_BYTES = 1_000_000  # of the longest yaml that is read; published ones have a few thousand


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
    """{name: tensor} of a torch.save file, mapped where its format allows; its wrappings are taken off.

    Raises ModelError for a file that is cut, foreign, or holds anything but tensors, which is never executed.
    """
    check_file(path, AGAIN)
    with open(path, "rb") as file:
        mapped = file.read(4) == b"PK\3\4"
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except BROKEN as fault:
        if foreign := re.search(r"GLOBAL ([\w.]+)", str(fault)):
            raise ModelError(f"{path} wants to run {foreign[1]} when read: take a file of tensors only.") from None
        raise ModelError(f"{path} is cut short or no file of torch.save: {AGAIN}.") from None
    while isinstance(data, dict) and (inner := data.get("state_dict", data.get("model"))) is not None:
        data = inner
    data = data if isinstance(data, dict) else {}
    tensors = {str(name).removeprefix("module."): t for name, t in data.items() if isinstance(t, torch.Tensor)}
    if not tensors:
        raise ModelError(f"{path} holds no named tensors: {AGAIN}.")
    return tensors


class Ref(str):
    """`!ref <name>` of a yaml: the value of another entry."""


class PlainLoader(yaml.SafeLoader):
    """Every tag (`!new:`, `!name:`, `!apply:`, python's own) is passed over and its content kept as data."""

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
    try:
        if (size := path.stat().st_size) > YAML_BYTES:
            raise ValueError(f"it has {size:,} bytes, at most {YAML_BYTES:,} are expected")
        data = yaml.load(path.read_text(encoding="utf-8"), PlainLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as fault:
        raise ModelError(f"{path} is no yaml that can be read ({brief(fault)}): {AGAIN}.") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path} is no yaml of names and values: {AGAIN}.")
    return data


def pick(cls, tree, names, path, below):
    """{field of cls: value} of what a yaml's entry `below` says by the table `names`, as the type of the default."""
    found, defaults = {}, {field.name: field.default for field in fields(cls)}
    for name, where in names.items():
        value = tree
        for step in f"{below}.{where}".split("."):
            value = value.get(step) if isinstance(value, dict) else None
            if isinstance(value, Ref):
                value = tree.get(value.strip().strip("<>"), value)
        if value is None:
            continue
        try:
            found[name] = _like(defaults[name], value)
        except (ValueError, TypeError, OverflowError):
            value = verify.shown(value)  # aliases of aliases would be endless
            raise ModelError(f"{path} gives {below}.{where} as {value}, which is no number: {AGAIN}.") from None
    return found


def _like(default, value):
    """value (yaml reads 1e-06 as text) as the type of a default: a number, or tuples of numbers."""
    if isinstance(default, tuple):
        return tuple(_like(default[0], one) for one in value)
    number = type(default)(value)
    if isinstance(value, bool) or not math.isfinite(number) or number != float(value):
        raise ValueError(value)
    return number
