"""Front ends, both tokenizers and the interleave."""

import json
import math

import torch
from safetensors.torch import load_file

from aqaa import audio
from aqaa.config import IdsConfig, LinguisticConfig, MelConfig, SemanticConfig
from aqaa.tokenizers.interleave import merge, split, to_string
from aqaa.tokenizers.linguistic import STRIDE, LinguisticTokenizer, read_mvn
from aqaa.tokenizers.semantic import SemanticTokenizer
from tests.parity.common import compare, compare_codes, load, max_error, ready


def preprocess(path):
    """Resample, peak normalisation, trim."""
    meta, _, inputs, outputs = load(path)
    for i, item in enumerate(meta["config"]["items"]):
        resampled = audio.resample(inputs[f"wav_{i}"], item["sr"])
        normed = audio.energy_norm(resampled)
        results = {"resampled": resampled, "energy_norm": normed, "trimmed": audio.trim_silence(normed[0])[None]}
        for name, got in results.items():
            yield compare(f"{name}_{i}", got, outputs[f"{name}_{i}"], meta)


def mel_features(path):
    """The vocoder's mel, and the speaker network's filter bank."""
    meta, _, inputs, outputs = load(path)
    for i, item in enumerate(meta["config"]["items"]):
        config = MelConfig(**{k: v for k, v in item.items() if k != "n"})
        yield compare(f"mel_{i}", audio.mel(inputs[f"wav_{i}"], config), outputs[f"mel_{i}"], meta)
    if "spk_wav16k" in inputs:
        bank = audio.fbank(inputs["spk_wav16k"][0], window="povey")
        yield compare("spk_fbank", bank - bank.mean(0), outputs["spk_fbank"], meta)


def sanm_stream(path):
    """Front end, encoder over all chunks, codes, and the same in packets."""
    meta, state, inputs, outputs = load(path)
    conf, chunk = meta["config"]["encoder_conf"], meta["config"]["chunk_size"]
    front = meta["config"]["frontend_conf"]
    sizes = {k: conf[k] for k in ("output_size", "attention_heads", "linear_units", "num_blocks", "kernel_size")}
    model = ready(LinguisticTokenizer(LinguisticConfig(
        codebook_size=len(inputs["centroids"]), chunk_rows=chunk[1], overlap_rows=chunk[0] + chunk[2],
        look_back=meta["config"]["encoder_chunk_look_back"], **sizes,
        **{k: front[k] for k in ("n_mels", "lfr_m", "lfr_n", "dither")},
    )))
    add_shift, rescale = read_mvn(path.with_name(front["cmvn_file"]))
    extra = {"centroids": inputs["centroids"], "add_shift": add_shift, "rescale": rescale}
    model.load_state_dict({**state, **extra})
    for name in sorted(k for k in inputs if k.startswith("wav_")):
        yield from _sanm_wav(model, inputs[name], name[4:], outputs, meta)
    if "stream" in meta["config"]:
        stream = meta["config"]["stream"]
        yield from _sanm_packets(model, inputs[f"wav_{stream['len']}"], stream["packets"], outputs, meta)


def _sanm_wav(model, wav, n, outputs, meta):
    rows = model.features(wav)
    size = model.config.chunk_rows  # a last chunk too short for a row is counted, with none
    counts = [min(size, len(rows) - start) for start in range(0, size * math.ceil(len(wav) / STRIDE), size)]
    hidden = model(rows[None])
    results = {
        "fbank": audio.fbank(wav * 32768, model.config.n_mels), "lfr": rows, "lfr_counts": torch.tensor(counts),
        "enc_out": hidden, "margin": _margin(hidden[0], model.centroids),
    }
    for name, got in results.items():
        if f"{name}_{n}" in outputs:
            yield compare(f"{name}_{n}", got, outputs[f"{name}_{n}"], meta)
    codes = model.encode(wav, energy_norm=False)
    yield compare_codes(f"codes_{n}", codes, outputs[f"codes_{n}"], outputs.get(f"margin_{n}"))


def _sanm_packets(model, wav, packets, outputs, meta):
    state, parts = model.start(), []
    for i, packet in enumerate(wav.split(packets)):
        hidden, state = model.push_hidden(state, packet, final=i == len(packets) - 1)
        parts.append(hidden)
    yield compare("stream_enc_out", torch.cat(parts), outputs["stream_enc_out"], meta)
    yield compare("stream_counts", torch.tensor([len(p) for p in parts]), outputs["stream_counts"], meta)


def _margin(rows, entries):
    """Second smallest minus smallest Euclidean distance, per row."""
    nearest = torch.cdist(rows, entries).topk(2, largest=False).values
    return nearest[..., 1] - nearest[..., 0]


def _unit_margin(model, rows):
    return _margin(torch.nn.functional.normalize(rows, dim=-1), model.quantizer._codebook.embed)


def _semantic(meta, state):
    sizes = {k: v for k, v in meta["config"].items() if k != "name"}
    model = ready(SemanticTokenizer(SemanticConfig(**sizes)))
    model.load_state_dict(state)
    return model


def s3_v1_25hz(path):
    """Log-mel, hidden rows, codes of single waves, and the padded batch."""
    meta, state, inputs, outputs = load(path)
    model = _semantic(meta, state)
    wavs = {name[4:]: wav for name, wav in inputs.items()}
    for n, wav in sorted(wavs.items()):
        logmel = model.features(wav)
        hidden, _ = model.hidden(logmel[None])
        margin = outputs[f"margin_{n}"]
        yield compare(f"logmel_{n}", logmel, outputs[f"logmel_{n}"], meta)
        yield compare(f"hidden_{n}", hidden, outputs[f"hidden_{n}"], meta)
        yield compare(f"margin_{n}", _unit_margin(model, hidden[0]), margin, meta)
        yield compare_codes(f"codes_{n}", model.encode(wav, energy_norm=False)[None], outputs[f"codes_{n}"], margin)
    if "batch_codes" in outputs:
        yield from _s3_batch(model, wavs, outputs, meta)


def _s3_batch(model, wavs, outputs, meta):
    """The padded batch of all waves, in the order of the json; only the valid part of a row has a meaning."""
    lens, want = outputs["batch_code_len"], outputs["batch_codes"]
    order = [name[7:] for name in meta["tensors"] if name.startswith("in.wav_")]
    got = model.encode_batch([wavs[n] for n in order], energy_norm=False)
    yield compare("batch_code_len", torch.tensor([len(c) for c in got]), lens, meta)
    wrong = [compare_codes("", c, row[: len(c)], outputs[f"margin_{n}"])[1] for c, row, n in zip(got, want, order)]
    yield "batch_codes", sum(wrong), 0.0


def s3_onnx(path):
    """The published ONNX file through our own reader."""
    heads = json.loads(path.with_name(path.name + ".json").read_text(encoding="utf-8"))["config"]["n_audio_head"]
    model = SemanticTokenizer.from_onnx(path.with_name(path.name + ".onnx"), heads)
    for file in sorted(path.parent.glob(path.name + "_io_*.safetensors")):
        n, io = file.stem.rsplit("_", 1)[1], load_file(file)
        logmel = model.features(io["wav"])
        margin = _unit_margin(model, model.hidden(logmel[None])[0][0])
        yield f"logmel_{n}", max_error(logmel, io["logmel"]), 2.5e-6
        yield compare_codes(f"codes_{n}", model.encode(io["wav"], energy_norm=False), io["codes"].flatten(), margin)


def vq06_long_split(path):
    """Waves above 30 s."""
    meta, state, inputs, outputs = load(path)
    model = _semantic(meta, state)
    for name, wav in sorted(inputs.items()):
        n = name.rsplit("_", 1)[1]
        yield compare_codes(f"codes_{n}", model.encode(wav / 32768, energy_norm=False), outputs[f"codes_{n}"])


def interleave(path):
    """Codes to ids and strings; the ids split again give the codes that were kept."""
    ids, wrong = IdsConfig(), {"ids": 0, "token_str": 0, "split": 0}
    for case in json.loads(path.with_name(path.name + ".json").read_text(encoding="utf-8"))["cases"]:
        merged = merge(case["vq02"], case["vq06"], ids)
        groups = len(case["ids"]) // 5
        wrong["ids"] += merged != case["ids"]
        wrong["token_str"] += to_string(merged, ids) != case["token_str"]
        wrong["split"] += split(merged, ids) != (case["vq02"][: 2 * groups], case["vq06"][: 3 * groups])
    yield from ((name, count, 0.0) for name, count in wrong.items())


KINDS = {
    "interleave": interleave,
    "preprocess": preprocess,
    "mel_features": mel_features,
    "sanm_stream": sanm_stream,
    "s3_v1_25hz": s3_v1_25hz,
    "s3_v1_25hz_tiny": s3_onnx,
    "vq06_long_split": vq06_long_split,
}
