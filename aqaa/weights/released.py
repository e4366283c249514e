"""The published folders as parts of the system: what each file is, whether it fits, how it is read.

Opening a folder looks at headers and small files only, and raises at once whatever is wrong
(ModelError, one sentence). Weights are read when a part is first used."""

import tomllib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from math import prod
from pathlib import Path

import numpy as np
import torch

from aqaa import audio
from aqaa.backbone.quantized_linear import empty_linears, format_in
from aqaa.config import AQAAConfig, BackboneConfig
from aqaa.files import AGAIN, ModelError, brief, check_file, passing_on, refusing
from aqaa.tokenizers import s3_onnx
from aqaa.tokenizers.linguistic import read_mvn
from aqaa.tokenizers.text import TextTokenizer
from aqaa.weights import model_folder, readers, shards, verify
from aqaa.weights.model_folder import build, fit
from aqaa.weights.packing import quantization_of
from aqaa.weights.readers import file_in, pick, pickled, unusable
from aqaa.weights.verify import all_finite, as_recorded, skip_init

NPY, ONNX, YAML = "linguistic_tokenizer.npy", "speech_tokenizer_v1.onnx", "cosyvoice.yaml"
STREAMING = "SANMEncoderChunkOpt"  # the offline encoder has the same tensors, and other codes
STEP1 = ("step1", "mmgpt_step1", "mmgpt_step1_v2", "step1o")  # model_type of the family
PUBLISHED = AQAAConfig()
BACKBONE = {field.name: field for field in fields(BackboneConfig)}
SIZES = [name for name, field in BACKBONE.items() if field.type is int and name[-3:] != "_id"]
SPEAKER_SECONDS = 30  # of a recording whose voice is taken
ONE = "take both from one release."
OTHER = "take the tokenizer.model of Step-Audio."

NAMES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
HIFT = {field.name: field.name for field in fields(PUBLISHED.hift)} | NAMES["hift"]
MEL = {field.name: field.name for field in fields(PUBLISHED.mel)}


@dataclass(frozen=True)
class Source:
    """A part of a released folder that has been looked at. sizes: fields of AQAAConfig that its
    files decide; facts: a line on it; load(device, dtype) reads it; note: what is left out."""

    sizes: dict
    facts: str
    load: Callable
    note: str = ""


# ---- whole folders ------------------------------------------------------------------------------


def open_folders(folders):
    """{role: folder} -> {part: Source}, for tokenizer, backbone and vocoder. Raises ModelError."""
    places = {role: place(folder, role) for role, folder in folders.items()}
    return {part: look(places[role]) for role in folders for part, look in PARTS[role].items()}


def place(folder, role):
    """Where a role's files lie: the folder, or the one in it with a flow.pt. Raises ModelError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"no folder at {folder}: --{role} names the folder of the released files.")
    inside = sorted(path.parent for path in folder.glob("*/flow.pt")) if role == "vocoder" else []
    if (folder / "flow.pt").exists() or not inside:
        recorded(folder)
        return folder
    if len(inside) > 1:
        names = " and ".join(path.name for path in inside)
        raise ModelError(f"{folder} holds {len(inside)} vocoders, {names}: name one.")
    return place(inside[0], role)


def recorded(folder, hashes=False):
    """Raise ModelError if record.json gives a file another size or, if asked, another hash."""
    for name in verify.recorded(folder):
        if (file := Path(folder) / name).is_file():
            as_recorded(file, hashes)


def combine(config, sources, folder=None):
    """AQAAConfig: `config` (of the model in `folder`) with parts replaced. Raises ModelError."""
    for source in sources.values():
        config = replace(config, **source.sizes)
    ids = config.ids
    own = f" in {folder}" if folder and "backbone" not in sources else ""
    model = f"the language model{own}"
    for name, size, wanted in (
        ("linguistic", config.linguistic.codebook_size, ids.n_linguistic),
        ("semantic", config.semantic.n_codebook_size, ids.n_semantic),
    ):
        if size != wanted:
            sizes = f"{size:,} codes, {model} expects {wanted:,}"
            raise ModelError(f"the {name} tokenizer has {sizes}: {ONE}")
    if (rows := config.backbone.vocab_size) < ids.end:
        sizes = f"{rows:,} rows, audio ids go up to {ids.end - 1:,}"
        raise ModelError(f"{model} has {sizes}: {ONE}")
    n_flow = config.flow.vocab_size
    if not ids.n_audio <= n_flow <= ids.n_audio + 1:  # the published one may have a padding row
        raise ModelError(f"the flow has {n_flow:,} audio ids, {model} has {ids.n_audio:,}: {ONE}")
    return config


# ---- tokenizer ----------------------------------------------------------------------------------


def linguistic(folder):
    """Source of a Paraformer encoder (model.pt, am.mvn, config.yaml) and centroids (npy)."""
    npy = file_in(folder, NPY)
    models = sorted(folder.rglob("model.pt")) or [folder / "model.pt"]
    model = max(models, key=lambda file: file.with_name("am.mvn").is_file())  # the first of those
    check_file(model, AGAIN)
    mvn = file_in(model.parent, "am.mvn")
    path = file_in(model.parent, "config.yaml")
    given = readers.read_yaml(path)
    if (kind := given.get("encoder", STREAMING)) != STREAMING:
        kind = kind if isinstance(kind, str) else verify.shown(kind)
        raise ModelError(f"{path} is of an encoder {kind}: {STREAMING} is needed, which streams.")
    config = PUBLISHED.linguistic
    for entry in ("encoder_conf", "frontend_conf"):
        config = pick(config, given, NAMES[entry], path, entry)
    centroids = _centroids(npy)
    config = replace(config, codebook_size=len(centroids))
    if (width := centroids.shape[1]) != config.output_size:
        raise unusable(f"{npy} has rows of {width}, {path.name} says {config.output_size}")
    with passing_on(AGAIN), refusing(f"{mvn} is no text", AGAIN, UnicodeDecodeError):
        shift, rescale = read_mvn(mvn)
    all_finite({"shift": shift, "rescale": rescale}, mvn)
    if {len(shift), len(rescale)} != {size := config.input_size}:
        raise unusable(f"{mvn} normalises {len(shift)} values, {path.name} says {size}")

    def state():
        weights = {name: t for name, t in pickled(model).items() if name.startswith("encoder.")}
        return weights | {"centroids": centroids, "add_shift": shift, "rescale": rescale}

    facts = f"{len(centroids):,} codes"
    return _module("linguistic", {"linguistic": config}, state, model, path.name, facts)


def _centroids(path):
    """(codes, width) float32."""
    faults = (ValueError, EOFError, OSError, OverflowError, MemoryError)
    with refusing(f"{path} is no whole npy file", AGAIN, *faults):
        table = np.load(path, allow_pickle=False)
    if table.ndim != 2 or table.dtype.kind != "f":
        form = f"{table.dtype} of shape {table.shape}"
        raise unusable(f"{path} holds {form}, not a table of centroids")
    table = torch.from_numpy(table.astype(np.float32))
    all_finite({"centroids": table}, path)
    return table


def semantic(folder):
    """Source of speech_tokenizer_v1.onnx, the S3 tokenizer at 25 Hz."""
    path = file_in(folder, ONNX)
    with passing_on():
        config, _ = s3_onnx.read(path)
    sizes, facts = {"semantic": config}, f"{config.n_codebook_size:,} codes"
    return _module("semantic", sizes, lambda: s3_onnx.read(path)[1], path,
                   "the S3 tokenizer", facts)  # fmt: skip


# ---- language model -----------------------------------------------------------------------------


def text(folder):
    """Source of tokenizer.model. Text ids end where `<audio_0>` stands."""
    path = file_in(folder, "tokenizer.model")
    with passing_on(AGAIN):
        tokenizer = TextTokenizer.from_sentencepiece(path)
    find = tokenizer.tokenizer.token_to_id
    if (n_text := find("<audio_0>")) is None:
        raise ModelError(f"{path} has no <audio_0>, it belongs to a text model: {OTHER}")
    ids = replace(PUBLISHED.ids, n_text=n_text)
    markers = {"<s>": ids.bos, "<|EOT|>": ids.eot, "<|BOT|>": ids.bot}
    for piece, wanted in (markers | {f"<audio_{ids.n_audio - 1}>": ids.end - 1}).items():
        if (at := find(piece)) != wanted:
            raise ModelError(f"{path} has {piece} at {at}, Step-1 at {wanted}: {OTHER}")
    facts = f"{tokenizer.n_text:,} pieces, {n_text:,} of them text"
    return Source({"ids": ids}, facts, lambda device, dtype: tokenizer)


def backbone(folder):
    """Source of a Step-1 language model in shards (config.json: `step1`, `mmgpt_step1_v2` …)."""
    from huggingface_hub.errors import StrictDataclassError

    from aqaa.backbone import step1  # transformers takes seconds to import

    path = file_in(folder, "config.json")
    config, kind = _step1_config(path)
    tensors = shards.scan(folder)
    names, others = shards.language_model(tensors, folder)
    used = [tensors[theirs] for theirs in names.values()]
    size = sum(entry.bytes for entry in used)
    try:
        with verify.Room(len(names), size), torch.device("meta"):
            model = step1.build(config)
        if quantization := quantization_of(readers.read_json(path)):
            empty_linears(model, **format_in(quantization))
    except (*verify.BROKEN, AttributeError, StrictDataclassError) as fault:
        why = str(fault).splitlines()[-1].strip(" .")
        raise unusable(f"{path} describes no Step-1 model ({why})") from None
    shards.check(model, tensors, names, folder)
    count = sum(entry.numel for entry in used)
    files = len({entry.path for entry in tensors.values()})
    room = f"{shards.in_bytes(size)} in {files} shards"
    facts = f"{kind}, {len(names):,} tensors, {count:,} parameters, {room}"
    values = sum(tensors[name].numel for name in others)
    dropped = f"{len(others):,} tensors ({values:,} values) of {folder}"
    note = f"{dropped} see pictures and are not loaded." if others else ""

    def load(device, dtype):
        return shards.fill(model, tensors, names, device, dtype)

    return Source({"backbone": config}, facts, load, note)


def _step1_config(path):
    """(BackboneConfig, model_type) of a config.json: sizes at its top, or in text_config."""
    data = readers.read_json(path)
    if (kind := data.get("model_type")) not in STEP1:
        kinds = f"{verify.shown(kind)}, not of Step-1 ({', '.join(STEP1)})"
        raise ModelError(f"{path} is of model_type {kinds}: name another folder.")
    inner = data.get("text_config") or {}
    if not isinstance(inner, dict):
        raise unusable(f"{path} gives text_config as {verify.shown(inner)}, not names and values")
    given = data | inner
    for name in SIZES:
        if type(given.get(name)) is not int or given[name] < 1:
            raise unusable(f"{path} gives no {name}")
    sizes = {name: given[name] for name in SIZES}
    sizes["rms_norm_eps"] = given.get("rms_norm_eps", 1e-5)
    with refusing(f"{path} describes no Step-1 model", AGAIN, ValueError):
        for name, value in sizes.items():
            verify.check_setting(BACKBONE[name], value, name)
    return BackboneConfig(**sizes), kind


# ---- vocoder ------------------------------------------------------------------------------------


def flow(folder):
    """Source of flow.pt, sized by cosyvoice.yaml and, as for the vocabulary, by itself."""
    path = file_in(folder, "flow.pt")
    state = pickled(path)
    if any(name.startswith("encoder.up_layer.") or "estimator.blocks." in name for name in state):
        other = "the DiT flow of Step-Audio-EditX, which reads two streams at 24 kHz"
        raise ModelError(f"{path} is {other}: take CosyVoice-300M-25Hz of Step-Audio-TTS-3B.")
    if "input_embedding.weight" not in state:
        raise unusable(f"{path} holds no input_embedding, so it is no flow of CosyVoice")
    config, mel, _ = vocoder_sizes(folder / YAML)
    config = replace(config, vocab_size=len(state["input_embedding.weight"]))
    facts = f"{config.vocab_size:,} ids at {config.input_frame_rate:.2f} a second"
    sizes = {"flow": config, "mel": mel}
    return _module("flow", sizes, lambda: pickled(path), path, YAML, facts)


def hift(folder):
    """Source of hift.pt, sized by cosyvoice.yaml; HiFT reads every naming of its weights."""
    path = file_in(folder, "hift.pt")
    config = vocoder_sizes(folder / YAML)[2]
    facts = f"{config.sampling_rate:,} Hz"
    return _module("hift", {"hift": config}, lambda: pickled(path), path, YAML, facts)


def vocoder_sizes(path):
    """(FlowConfig, MelConfig, HiftConfig) of a cosyvoice.yaml. Raises ModelError."""
    given = readers.read_yaml(path)
    mel = pick(PUBLISHED.mel, given, MEL, path, "feat_extractor")
    mel = pick(mel, given, MEL, path, "flow.mel_feat_conf")
    flow = pick(PUBLISHED.flow, given, NAMES["flow"], path, "flow")
    hift = pick(PUBLISHED.hift, given, HIFT, path, "hift")
    hop = prod(hift.upsample_rates) * hift.istft_hop
    for name, a, b in (
        ("samples a frame", mel.hop_size, hop),
        ("sample rates", mel.sampling_rate, hift.sampling_rate),
        ("mel bands", mel.num_mels, flow.output_size),
        ("mel bands", mel.num_mels, hift.in_channels),
    ):
        if a != b:
            raise unusable(f"{path} contradicts itself, {name} are {a} and {b}")
    return flow, mel, hift


def voice(folder, wav):
    """A function from an AQAA to the options of its Vocoder for the voice of a recording, whose ids
    and mel are the prompt; CAM++ (campplus.onnx) tells who speaks. Raises ModelError."""
    network = file_in(place(folder, "vocoder"), "campplus.onnx")
    try:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(network), providers=["CPUExecutionProvider"])
        samples, rate = audio.read(wav, SPEAKER_SECONDS)
        at_16k = audio.load_question((samples, rate))
    except ModuleNotFoundError:
        fix = "pip install it, or leave --speaker out"
        raise ModelError(f"a speaker's voice needs onnxruntime: {fix}.") from None
    except audio.AudioError as fault:
        raise ModelError(str(fault)) from None
    except Exception as fault:  # the library has a dozen kinds of its own
        why = brief(fault)
        raise unusable(f"{network} is no network that onnxruntime can run ({why})") from None

    def options(model):
        token = model.codes(model.listen((samples, rate)))
        mel = model.config.mel
        feat = audio.mel(audio.resample(samples, rate, mel.sampling_rate), mel)
        feat = feat[None, :, : model.flow.frames(len(token))].mT  # (1, T, n_mels)
        bank = audio.fbank(at_16k, window="povey")
        name = session.get_inputs()[0].name
        (vector,) = session.run(None, {name: (bank - bank.mean(0))[None].numpy()})
        embedding = torch.from_numpy(vector)
        return {"prompt_token": torch.tensor([token]), "prompt_feat": feat, "embedding": embedding}

    return options


PARTS = {"tokenizer": {"linguistic": linguistic, "semantic": semantic},
         "backbone": {"text": text, "backbone": backbone},
         "vocoder": {"flow": flow, "hift": hift}}  # fmt: skip


# ---- modules ------------------------------------------------------------------------------------


def _module(name, sizes, state, path, told_by, facts):
    """Source of a module of ours with the weights of state(); `told_by` gave its sizes."""
    config = replace(PUBLISHED, **sizes)
    given = state()
    size = sum(tensor.nbytes for tensor in given.values())
    with refusing(f"{told_by} describes no network for {path}", AGAIN, *verify.BROKEN):
        with verify.Room(len(given), size), torch.device("meta"):
            module = build(name, config)
    fit(module, {key: tensor.to("meta") for key, tensor in given.items()}, path, told_by)

    def load(device, dtype):
        with skip_init():
            module = build(name, config)
        fit(module, state(), path, told_by)
        as_recorded(path)
        return model_folder.cast(module.eval(), device, dtype, path)

    count = sum(tensor.numel() for tensor in given.values())
    return Source(sizes, f"{len(given):,} tensors, {count:,} parameters, {facts}", load)
