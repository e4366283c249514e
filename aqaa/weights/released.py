"""The published folders as parts of the system: what each file is, whether it fits, and how it is read.

Opening a folder looks at headers and small files only, and raises at once whatever is wrong (ModelError, one sentence).
Weights are read when a part is first used.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from math import prod
from pathlib import Path

import numpy as np
import torch

from aqaa import audio
from aqaa.config import (
    AQAAConfig,
    BackboneConfig,
    FlowConfig,
    HiftConfig,
    IdsConfig,
    LinguisticConfig,
    MelConfig,
)
from aqaa.files import AGAIN, ModelError, brief, check_file
from aqaa.tokenizers import s3_onnx
from aqaa.tokenizers.linguistic import read_mvn
from aqaa.tokenizers.text import TextTokenizer
from aqaa.weights import model_folder, shards, verify
from aqaa.weights.model_folder import ROLES, build, fit
from aqaa.weights.readers import file_in, pick, pickled, read_json, read_yaml
from aqaa.weights.verify import all_finite, as_recorded, skip_init

NPY, ONNX, YAML = "linguistic_tokenizer.npy", "speech_tokenizer_v1.onnx", "cosyvoice.yaml"
STREAMING = "SANMEncoderChunkOpt"  # FunASR's class; the offline encoder has the same tensors and gives other codes
STEP1 = ("step1", "mmgpt_step1", "mmgpt_step1_v2", "step1o")  # model_type of the family
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_attention_groups", "max_seq_len",
)  # fmt: skip
SPEAKER_SECONDS = 30  # of a recording whose voice is taken

# our field: where the yaml has it; what it leaves out is as published
ENCODER = {name: name for name in ("output_size", "attention_heads", "linear_units", "num_blocks", "kernel_size")}
FRONTEND = {name: name for name in ("n_mels", "lfr_m", "lfr_n")}
FLOW = {
    **{name: name for name in ("input_size", "output_size", "spk_embed_dim", "input_frame_rate")},
    "encoder_size": "encoder.output_size", "encoder_heads": "encoder.attention_heads",
    "encoder_units": "encoder.linear_units", "encoder_blocks": "encoder.num_blocks",
    **{name: f"decoder.estimator.{name}"
       for name in ("channels", "attention_head_dim", "n_blocks", "num_mid_blocks", "num_heads")},
    **{name: f"decoder.cfm_params.content.{name}" for name in ("inference_cfg_rate", "training_cfg_rate", "sigma_min")},
}  # fmt: skip
HIFT = {field.name: field.name for field in fields(HiftConfig)} | {
    "istft_n_fft": "istft_params.n_fft", "istft_hop": "istft_params.hop_len",
    "f0_channels": "f0_predictor.cond_channels",
}  # fmt: skip
MEL = {field.name: field.name for field in fields(MelConfig)}


@dataclass(frozen=True)
class Source:
    """A part of a released folder that has been looked at.

    sizes: fields of AQAAConfig that its files decide; facts: a line on it; load(device, dtype) reads the weights; note:
    what is left out of it, if anything.
    """

    sizes: dict
    facts: str
    load: Callable
    note: str = ""


# ---- whole folders --------------------------------------------------------------------------------------------------


def open_folders(folders):
    """{role: folder} -> {part: Source}, for the roles tokenizer, backbone and vocoder. Raises ModelError."""
    return {part: look(place(folder, role)) for role, folder in folders.items() for part, look in PARTS[role].items()}


def place(folder, role):
    """Where the files of a role lie: the folder, or the one folder in it that has a flow.pt. Raises ModelError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"no folder at {folder}: --{role} names the folder that holds the released files.")
    inside = sorted(path.parent for path in folder.glob("*/flow.pt")) if role == "vocoder" else []
    if (folder / "flow.pt").exists() or not inside:
        recorded(folder)
        return folder
    if len(inside) > 1:
        raise ModelError(f"{folder} holds {len(inside)} vocoders, {' and '.join(p.name for p in inside)}: name one.")
    return place(inside[0], role)


def recorded(folder, hashes=False):
    """Are files as a record.json of the folder says, in size and, if asked, in hash? Raises ModelError."""
    for name in verify.recorded(folder):
        if (file := Path(folder) / name).is_file():
            as_recorded(file, hashes)


def combine(config, sources, folder=None):
    """The AQAAConfig in which parts of `config` (of the model in `folder`) are replaced. ModelError if ids differ."""
    for source in sources.values():
        config = replace(config, **source.sizes)
    ids, model = config.ids, "the language model" + (f" in {folder}" if folder and "backbone" not in sources else "")
    for name, size, wanted in (
        ("linguistic", config.linguistic.codebook_size, ids.n_linguistic),
        ("semantic", config.semantic.n_codebook_size, ids.n_semantic),
    ):
        if size != wanted:
            raise ModelError(f"the {name} tokenizer has {size:,} codes, {model} knows {wanted:,}: they are no pair.")
    if config.backbone.vocab_size < ids.end:
        raise ModelError(f"{model} has {config.backbone.vocab_size:,} rows, audio ids go up to {ids.end - 1:,}: the "
                         "tokenizer.model is of another model.")
    if not ids.n_audio <= config.flow.vocab_size <= ids.n_audio + 1:  # the published one may have a row for padding
        raise ModelError(f"the flow has {config.flow.vocab_size:,} audio ids, {model} speaks {ids.n_audio:,}: "
                         "they are no pair.")
    return config


# ---- tokenizer ------------------------------------------------------------------------------------------------------


def linguistic(folder):
    """Source of Step-Audio-Tokenizer's Paraformer encoder (model.pt, am.mvn, config.yaml) and centroids (npy)."""
    npy = file_in(folder, NPY)
    found = sorted(folder.rglob("model.pt"), key=lambda file: (not file.with_name("am.mvn").is_file(), file))
    model = found[0] if found else folder / "model.pt"
    check_file(model, AGAIN)
    mvn, path = file_in(model.parent, "am.mvn"), file_in(model.parent, "config.yaml")
    given = read_yaml(path)
    if (kind := given.get("encoder", STREAMING)) != STREAMING:
        kind = kind if isinstance(kind, str) else verify.shown(kind)
        raise ModelError(f"{path} is of an encoder {kind}: the streaming one, {STREAMING}, is needed.")
    sizes = pick(LinguisticConfig, given, ENCODER, path, "encoder_conf")
    sizes |= pick(LinguisticConfig, given, FRONTEND, path, "frontend_conf")
    centroids = _centroids(npy)
    config = LinguisticConfig(codebook_size=len(centroids), **sizes)
    if centroids.shape[1] != config.output_size:
        raise ModelError(f"{npy} has rows of {centroids.shape[1]}, {path.name} says {config.output_size}: {AGAIN}.")
    try:
        shift, rescale = read_mvn(mvn)
    except UnicodeDecodeError as fault:
        raise ModelError(f"{mvn} is no text ({brief(fault)}): {AGAIN}.") from None
    except ValueError as fault:
        raise ModelError(f"{brief(fault)}; {AGAIN}.") from None
    all_finite({"shift": shift, "rescale": rescale}, mvn)
    if {len(shift), len(rescale)} != {config.input_size}:
        raise ModelError(f"{mvn} normalises {len(shift)} values, {path.name} says {config.input_size}: {AGAIN}.")
    rest = {"centroids": torch.from_numpy(centroids), "add_shift": shift, "rescale": rescale}

    def state():
        return {name: t for name, t in pickled(model).items() if name.startswith("encoder.")} | rest

    return _module("linguistic", {"linguistic": config}, state, model, path.name, f"{len(centroids):,} codes")


def _centroids(path):
    """(codes, width) float32."""
    try:
        table = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError, OverflowError, MemoryError) as fault:
        raise ModelError(f"{path} is no whole npy file ({brief(fault)}): {AGAIN}.") from None
    if table.ndim != 2 or table.dtype.kind != "f":
        raise ModelError(f"{path} holds {table.dtype} of shape {table.shape}, not a table of centroids: {AGAIN}.")
    table = table.astype(np.float32)
    all_finite({"centroids": torch.from_numpy(table)}, path)
    return table


def semantic(folder):
    """Source of speech_tokenizer_v1.onnx, the S3 tokenizer at 25 Hz."""
    path = file_in(folder, ONNX)
    try:
        config, _ = s3_onnx.read(path)
    except ValueError as fault:
        raise ModelError(str(fault)) from None
    facts = f"{config.n_codebook_size:,} codes"
    return _module("semantic", {"semantic": config}, lambda: s3_onnx.read(path)[1], path, "the S3 tokenizer", facts)


# ---- language model -------------------------------------------------------------------------------------------------


def text(folder):
    """Source of tokenizer.model. Text ids end where `<audio_0>` stands."""
    path = file_in(folder, "tokenizer.model")
    try:
        tokenizer = TextTokenizer.from_sentencepiece(path)
    except ValueError as fault:
        raise ModelError(f"{brief(fault)}; {AGAIN}.") from None
    find = tokenizer.tokenizer.token_to_id
    if (n_text := find("<audio_0>")) is None:
        raise ModelError(f"{path} knows no <audio_0>: it is the tokenizer of a model without sound.")
    ids = replace(IdsConfig(), n_text=n_text)
    markers = {"<s>": ids.bos, "<|EOT|>": ids.eot, "<|BOT|>": ids.bot, f"<audio_{ids.n_audio - 1}>": ids.end - 1}
    for piece, wanted in markers.items():
        if find(piece) != wanted:
            raise ModelError(f"{path} has {piece} at {find(piece)}, not at {wanted}: it is of another model.")
    facts = f"{tokenizer.n_text:,} pieces, {n_text:,} of them text"
    return Source({"ids": ids}, facts, lambda device, dtype: tokenizer)


def backbone(folder):
    """Source of a Step-1 language model in shards (config.json says `step1` or `mmgpt_step1_v2`)."""
    from huggingface_hub.errors import StrictDataclassError

    from aqaa.backbone import step1
    from aqaa.backbone.quantized_linear import empty_linears, format_in

    path = file_in(folder, "config.json")
    config, kind = _step1_config(path)
    tensors = shards.scan(folder)
    names, others = shards.language_model(tensors, folder)
    try:
        with verify.Room(len(names), sum(tensors[name].bytes for name in names.values())), torch.device("meta"):
            model = step1.build(config)
        if quantization := read_json(path).get("quantization"):
            empty_linears(model, **format_in(quantization))
    except (*verify.BROKEN, AttributeError, StrictDataclassError) as fault:
        why = str(fault).splitlines()[-1].strip(" .")
        raise ModelError(f"{path} describes no Step-1 model ({why}): {AGAIN}.") from None
    shards.check(model, tensors, names, folder)
    count = sum(tensors[theirs].numel for theirs in names.values())
    used = sum(tensors[theirs].bytes for theirs in names.values())
    files = len({tensor.path for tensor in tensors.values()})
    note, dropped = "", sum(tensors[name].numel for name in others)
    if others:
        note = f"{len(others):,} tensors ({dropped:,} values) of {folder} see pictures and are not loaded."
    facts = f"{kind}, {len(names):,} tensors, {count:,} parameters, {shards.in_bytes(used)} in {files} shards"

    def load(device, dtype):
        return shards.fill(model, tensors, names, device, dtype)

    return Source({"backbone": config}, facts, load, note)


def _step1_config(path):
    """(BackboneConfig, model_type) of a released config.json, whose sizes are at its top or in a text_config."""
    data = read_json(path)
    if (kind := data.get("model_type")) not in STEP1:
        kind = verify.shown(kind)
        raise ModelError(f"{path} is of model_type {kind}, not of Step-1 ({', '.join(STEP1)}): name another folder.")
    inner = data.get("text_config") or {}
    if not isinstance(inner, dict):
        raise ModelError(f"{path} gives text_config as {verify.shown(inner)}, not names and values: {AGAIN}.")
    given = data | inner
    if lost := [name for name in SIZES if type(given.get(name)) is not int or given[name] < 1]:
        raise ModelError(f"{path} gives no {lost[0]}: {AGAIN}.")
    sizes = {name: given[name] for name in SIZES} | {"rms_norm_eps": given.get("rms_norm_eps", 1e-5)}
    try:
        for setting in fields(BackboneConfig):
            if setting.name in sizes:
                verify.check_setting(setting, sizes[setting.name], setting.name)
    except ValueError as fault:
        raise ModelError(f"{path} describes no Step-1 model ({fault}): {AGAIN}.") from None
    return BackboneConfig(**sizes), kind


# ---- vocoder --------------------------------------------------------------------------------------------------------


def flow(folder):
    """Source of flow.pt, sized by cosyvoice.yaml and, as for the vocabulary, by itself."""
    path = file_in(folder, "flow.pt")
    state = pickled(path)
    if any(name.startswith("encoder.up_layer.") or "estimator.blocks." in name for name in state):
        raise ModelError(f"{path} is the DiT flow of Step-Audio-EditX, which reads two streams at 24 kHz: take "
                         "CosyVoice-300M-25Hz of Step-Audio-TTS-3B.")
    if "input_embedding.weight" not in state:
        raise ModelError(f"{path} holds no input_embedding, so it is no flow of CosyVoice: {AGAIN}.")
    config, mel, _ = vocoder_sizes(folder / YAML)
    config = replace(config, vocab_size=len(state["input_embedding.weight"]))
    facts = f"{config.vocab_size:,} ids at {config.input_frame_rate:.2f} a second"
    return _module("flow", {"flow": config, "mel": mel}, lambda: pickled(path), path, YAML, facts)


def hift(folder):
    """Source of hift.pt, sized by cosyvoice.yaml; either naming of weight norm, with or without `generator.`."""
    path = file_in(folder, "hift.pt")
    config = vocoder_sizes(folder / YAML)[2]
    return _module("hift", {"hift": config}, lambda: pickled(path), path, YAML, f"{config.sampling_rate:,} Hz")


def vocoder_sizes(path):
    """(FlowConfig, MelConfig, HiftConfig) of a cosyvoice.yaml. Raises ModelError."""
    given = read_yaml(path)
    flow = FlowConfig(**pick(FlowConfig, given, FLOW, path, "flow"))
    mel = MelConfig(**(pick(MelConfig, given, MEL, path, "feat_extractor")
                       | pick(MelConfig, given, MEL, path, "flow.mel_feat_conf")))  # fmt: skip
    hift = HiftConfig(**pick(HiftConfig, given, HIFT, path, "hift"))
    hop = prod(hift.upsample_rates) * hift.istft_hop
    for name, a, b in (
        ("samples a frame", mel.hop_size, hop), ("sample rates", mel.sampling_rate, hift.sampling_rate),
        ("mel bands", mel.num_mels, flow.output_size), ("mel bands", mel.num_mels, hift.in_channels),
    ):  # fmt: skip
        if a != b:
            raise ModelError(f"{path} contradicts itself, {name} are {a} and {b}: {AGAIN}.")
    return flow, mel, hift


def voice(folder, wav):
    """A function from an AQAA to the options of its Vocoder that give it the voice of a recording. Raises ModelError.

    The recording's own ids and mel are the prompt, and the CAM++ network of campplus.onnx tells who speaks.
    """
    network = file_in(place(folder, "vocoder"), "campplus.onnx")
    try:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(network), providers=["CPUExecutionProvider"])
        samples, rate = audio.read(wav, SPEAKER_SECONDS)
        heard = audio.load_question((samples, rate))
    except ModuleNotFoundError:
        raise ModelError("a speaker's voice needs onnxruntime: pip install it, or leave --speaker out.") from None
    except audio.AudioError as fault:
        raise ModelError(str(fault)) from None
    except Exception as fault:  # the library has a dozen kinds of its own
        raise ModelError(f"{network} is no network that onnxruntime can run ({brief(fault)}): {AGAIN}.") from None

    def options(model):
        token = model.codes(model.listen((samples, rate)))
        mel = audio.mel(audio.resample(samples, rate, model.config.mel.sampling_rate), model.config.mel)
        bank = audio.fbank(heard, window="povey")
        (vector,) = session.run(None, {session.get_inputs()[0].name: (bank - bank.mean(0))[None].numpy()})
        feat = mel[None, :, : model.flow.frames(len(token))].mT  # (1, T, n_mels)
        return {"prompt_token": torch.tensor([token]), "prompt_feat": feat, "embedding": torch.from_numpy(vector)}

    return options


PARTS = dict(zip(ROLES, (
    {"linguistic": linguistic, "semantic": semantic}, {"text": text, "backbone": backbone}, {"flow": flow, "hift": hift}
)))  # fmt: skip


# ---- modules -------------------------------------------------------------------------------------------------------


def _module(name, sizes, state, path, told_by, facts):
    """Source of one of our modules whose weights state() gives; `told_by` is named where they do not fit."""
    config, given = replace(AQAAConfig(), **sizes), state()
    try:
        with verify.Room(len(given), sum(tensor.nbytes for tensor in given.values())), torch.device("meta"):
            module = build(name, config)
    except verify.BROKEN as fault:
        raise ModelError(f"{told_by} describes no network for {path} ({brief(fault)}): {AGAIN}.") from None
    fit(module, {key: tensor.to("meta") for key, tensor in given.items()}, path, told_by)

    def load(device, dtype):
        with skip_init():
            module = build(name, config)
        fit(module, state(), path, told_by)
        as_recorded(path)
        return model_folder.cast(module.eval(), device, dtype, path)

    count = sum(tensor.numel() for tensor in given.values())
    return Source(sizes, f"{len(given):,} tensors, {count:,} parameters, {facts}", load)
