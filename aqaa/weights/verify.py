"""Checks of what was read, before it is used: settings, sizes, hashes, numbers."""

import math
import reprlib
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass
from itertools import compress
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from aqaa.config import RETIRED, TOKENS_PER_SECOND, AQAAConfig
from aqaa.files import AGAIN, ModelError, fingerprint, read_json

AT_MOST = 100  # times the published value (or 1, if that is less): the largest legal setting
LONGEST = 16  # values of a tuple
HEADS = {  # a size: its divisor
    "linguistic.output_size": "linguistic.attention_heads",
    "semantic.n_audio_state": "semantic.n_audio_head", "flow.encoder_size": "flow.encoder_heads",
    "backbone.hidden_size": "backbone.num_attention_heads",
    "backbone.num_attention_heads": "backbone.num_attention_groups",
}  # fmt: skip
MAY_BE_ZERO = {  # all other settings are sizes, or divide something
    "fmin", "pad_token_id", "num_mid_blocks", "nb_harmonics", "lrelu_slope", "dither", "nsf_alpha",
    "nsf_sigma", "nsf_voiced_threshold", "inference_cfg_rate", "training_cfg_rate", "temperature",
    "lora_rank", "again",
}  # fmt: skip
SMALL = 4096  # values of a tensor that is looked at together with others
SPARE_TENSORS, SPARE_VALUES = 64, 1 << 20  # what a module may have beyond twice its file
BROKEN = (  # what building a module of impossible settings raises
    ValueError, RuntimeError, TypeError, ArithmeticError, AssertionError, LookupError, MemoryError,
)  # fmt: skip


def shown(value):
    """A value of a file as a sentence names it, however large or deep it is."""
    short = reprlib.Repr()
    short.maxlevel = 2
    text = short.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def settings(data):
    """AQAAConfig of what a config.json holds. Raises ValueError, which names the setting, for an
    unknown one, a value of another type or out of range, and two that contradict each other."""
    config = AQAAConfig.from_dict(_checked(AQAAConfig, data))
    for fault in contradictions(config):
        raise ValueError(fault)
    return config


def _checked(cls, data, where=""):
    if not isinstance(data, dict):
        raise ValueError(f"{where or 'it'} is {shown(data)}, settings by name are expected")
    known = {setting.name: setting for setting in fields(cls)}
    if unknown := sorted(set(data) - set(known) - RETIRED):
        raise ValueError(f"{cls.__name__} has no field {', '.join(map(shown, unknown[:3]))}")
    for name in data.keys() - RETIRED:
        setting, place, value = known[name], f"{where}.{name}" if where else name, data[name]
        if is_dataclass(setting.type):
            _checked(setting.type, value, place)
        else:
            check_setting(setting, value, place)
    return data


def check_setting(setting, value, place):
    """Raise ValueError unless `value` has the type of a dataclass field and a plausible size. The
    range follows from the field's default; the sentence calls the value `place`."""
    if setting.type is str:
        wanted = "a short name"
        usable = isinstance(value, str) and value.isprintable() and len(value) < 100
    else:
        whole = setting.type is not float
        most = AT_MOST * max(1, np.max(setting.default).item())
        if setting.name in ("mel_mean", "offset"):
            least = -most
        else:
            least = 0 if setting.name in MAY_BE_ZERO else 1 if whole else 1e-12
        kind = "a whole number" if whole else "a number"
        kind = "a list of whole numbers" if setting.type is tuple else kind
        wanted = f"{kind} from {least:,} to {most:,}"
        usable = _fits(value, setting.default, (int,) if whole else (int, float), least, most)
    if not usable:
        raise ValueError(f"{place} is {shown(value)}, {wanted} is expected")


def _fits(value, default, types, least, most):
    """Is it a number of these types (not a bool) in this range (not NaN), or lists of them?"""
    if isinstance(default, tuple):
        usable = isinstance(value, (list, tuple)) and 0 < len(value) <= LONGEST
        return usable and all(_fits(one, default[0], types, least, most) for one in value)
    return type(value) in types and least <= value <= most


def contradictions(config):
    """Sentences on settings of an AQAAConfig that do not fit one another."""
    for name, divisor in HEADS.items():
        size, heads = attrgetter(name, divisor)(config)
        if size % heads:
            yield f"{name} is {size}, a multiple of its {heads} heads or groups is expected"
    ids, flow, hift = config.ids, config.flow, config.hift
    for name, wanted in (
        ("linguistic.codebook_size", ids.n_linguistic),
        ("semantic.n_codebook_size", ids.n_semantic),
        ("mel.hop_size", math.prod(hift.upsample_rates) * hift.istft_hop),
        ("mel.sampling_rate", hift.sampling_rate),
        ("mel.num_mels", flow.output_size),
        ("hift.in_channels", flow.output_size),
    ):
        if (value := attrgetter(name)(config)) != wanted:
            yield f"{name} is {value}, {wanted} is expected by other parts"
    if (size := config.backbone.vocab_size) < ids.end:
        yield f"backbone.vocab_size is {size}, a row for each of the {ids.end} ids is expected"
    if not ids.n_audio <= flow.vocab_size <= ids.n_audio + 1:  # published: one row for padding
        yield f"flow.vocab_size is {flow.vocab_size}, the {ids.n_audio} audio ids are expected"
    if abs((rate := flow.input_frame_rate) - TOKENS_PER_SECOND) > 0.1:
        yield f"flow.input_frame_rate is {rate}, about {TOKENS_PER_SECOND:.2f} is expected"
    sizes = ("n_text", "n_linguistic", "n_semantic", "first_text")
    markers = [value for name, value in asdict(ids).items() if name not in sizes]
    if len(set(markers)) < len(markers) or not max(markers) < ids.first_text < ids.n_text:
        wanted = f"different ones below first_text {ids.first_text}"
        yield f"ids has the markers {markers}, {wanted} are expected"


class Room(TorchFunctionMode):
    """Within it modules are built that a file of `tensors` tensors and `size` bytes can fill; one
    that asks for more stops with a ValueError before that much memory is taken."""

    def __init__(self, tensors=math.inf, size=math.inf):
        super().__init__()
        self.tensors = 2 * tensors + SPARE_TENSORS
        # Half a byte a value at least (int4); the layers that those codes replace are built first.
        self.values = 4 * size + SPARE_VALUES

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.empty:  # as every layer begins
            sizes = args[0] if args and not isinstance(args[0], int) else args
            self.tensors -= 1
            self.values -= math.prod(sizes)
            if min(self.tensors, self.values) < 0:
                raise ValueError("the settings ask for more weights than the file holds")
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.numel() > max(0, self.values) + SPARE_VALUES:
            raise ValueError("the settings ask for larger tables than the file holds")
        return made


class skip_init(Room):
    """Within it modules are built without random weights, which are about to be overwritten."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return super().__torch_function__(function, types, args, kwargs)


def not_finite(state):
    """"nan at name[3, 5]" of the first value in {name: tensor} that is not finite; "" if none."""
    real = (t.is_floating_point() and t.numel() and not t.is_meta for t in state.values())
    floats = dict(compress(state.items(), real))
    dtypes = {t.dtype for t in floats.values()}
    if all(_finite([t for t in floats.values() if t.dtype == dtype]) for dtype in dtypes):
        return ""
    name, tensor = next((name, t) for name, t in floats.items() if not _finite([t]))
    tensor = tensor.float() if tensor.element_size() == 1 else tensor
    place = tensor.isfinite().logical_not().nonzero()[0].tolist()
    return f"{float(tensor[tuple(place)])} at {name}{place or ''}"


def _finite(tensors):
    """Are all values of tensors of one dtype finite? One pass, without a copy of a large tensor:
    NaN is both the least and the largest of the values around it; small ones go together."""
    if tensors[0].element_size() == 1:  # fp8 has no order
        tensors = [t.float() for t in tensors]
    groups = [t for t in tensors if t.numel() > SMALL]
    if small := [t.flatten() for t in tensors if t.numel() <= SMALL]:
        groups.append(torch.cat(small))
    bounds = [bound for t in groups for bound in torch.aminmax(t)]
    return bool(torch.stack(bounds).isfinite().all())


def all_finite(state, path):
    """Raise ModelError if one of the tensors of `path` holds a NaN or an infinity."""
    if fault := not_finite(state):
        raise ModelError(f"{path} holds {fault}, where a finite number is expected: {AGAIN}.")


def recorded(folder):
    """{file: its "bytes" and "sha256"} by a folder's record.json; {} without. Raises ModelError."""
    path = Path(folder) / "record.json"
    with suppress(ValueError, AttributeError):
        files = read_json(path).get("files", {}) if path.is_file() else {}
        rows = files.values()
        kinds = {(type(row.get("bytes", 0)), type(row.get("sha256", ""))) for row in rows}
        if kinds <= {(int, str)} and all(Path(name).name == name for name in files):
            return files
    raise ModelError(f"{path} does not list files with their sizes and hashes: {AGAIN}.")


def as_recorded(path, hashed=True):
    """Raise ModelError unless the file has the size and hash that record.json beside it gives."""
    facts = recorded(path.parent).get(path.name, {})
    if (size := path.stat().st_size) != facts.get("bytes", size):
        expected = f"record.json says {facts['bytes']:,}"
        raise ModelError(f"{path} has {size:,} bytes, {expected}: {AGAIN}.")
    if hashed and "sha256" in facts and fingerprint(path)["sha256"] != facts["sha256"]:
        raise ModelError(f"{path} does not have the hash that record.json says: {AGAIN}.")
