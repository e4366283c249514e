"""Writes a complete release with hardly any width: the published folders, file names, formats and key names.

`python -m tests.release FOLDER` leaves FOLDER/tokenizer, FOLDER/backbone and FOLDER/vocoder.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from safetensors.torch import save_file

from aqaa.config import AQAAConfig, BackboneConfig, FlowConfig, HiftConfig, LinguisticConfig, SemanticConfig
from aqaa.weights import model_folder, sources
from tests.test_semantic import consumer
from tests.test_text import field

PARAFORMER = "dengcunqin/speech_paraformer-large_asr_nat-zh-cantonese-en-16k-vocab8501-online"
AUDIO_SLOTS = 9216
CONTROL = (*range(1, 19), *range(21, 25), *range(31, 39))  # ids of pieces that no text produces
MARKERS = {
    0: "<unk>", 1: "<s>", 2: "</s>", 3: "<|EOT|>", 4: "<|BOT|>", 13: "<im_patch>", 14: "<im_start>", 15: "<im_end>",
    31: "<audio_start>", 32: "<audio_end>", 33: "<text_start>", 34: "<text_end>", 35: "<|TTS|>", 36: "<|ASR|>",
    37: "<|TQAA|>", 38: "<|AQTA|>",
}  # fmt: skip
CARD = "---\nlicense: apache-2.0\npipeline_tag: audio-text-to-text\n---\n\nA release of tiny random networks.\n"


def sizes(n_text):
    """AQAAConfig of the release."""
    return replace(
        AQAAConfig(),
        linguistic=LinguisticConfig(output_size=16, attention_heads=2, linear_units=32, num_blocks=3),
        semantic=SemanticConfig(n_audio_state=16, n_audio_head=1, n_audio_layer=2),
        backbone=BackboneConfig(
            vocab_size=n_text + AUDIO_SLOTS, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=4, num_attention_groups=2,
        ),
        flow=FlowConfig(
            input_size=16, encoder_size=16, encoder_heads=2, encoder_units=32, encoder_blocks=2, channels=(16, 16),
            attention_head_dim=8, num_heads=2, n_blocks=1, num_mid_blocks=2,
        ),
        hift=HiftConfig(base_channels=16, f0_channels=16),
    )  # fmt: skip


def write(folder, n_text=65_536, seed=0):
    """{role: folder} of a release below `folder`; n_text: pieces of the text tokenizer before `<audio_0>`."""
    config, folders = sizes(n_text), {role: Path(folder) / role for role in sources.ROLES}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = {name: model_folder.build(name, config).state_dict() for name in model_folder.PARTS}
        for place in folders.values():
            place.mkdir(parents=True)
            (place / "README.md").write_text(CARD, encoding="utf-8")
        write_tokenizer(folders["tokenizer"], config, parts)
        write_backbone(folders["backbone"], config, parts["backbone"])
        write_vocoder(folders["vocoder"], config, parts)
    return folders


# ---- tokenizer ----


def write_tokenizer(folder, config, parts):
    np.save(folder / "linguistic_tokenizer.npy", np.random.default_rng(0).normal(size=(1024, 16)).astype(np.float32))
    semantic = dict(parts["semantic"])
    semantic["quantizer._codebook.embed"] = torch.randn(4096, 16)
    write_s3(folder / "speech_tokenizer_v1.onnx", semantic)
    paraformer = folder / PARAFORMER
    paraformer.mkdir(parents=True)
    state = {k: v for k, v in parts["linguistic"].items() if k.startswith("encoder.")}
    state |= {"decoder.embed.0.weight": torch.zeros(20, 16), "predictor.cif_conv1d.bias": torch.zeros(16)}
    torch.save(state, paraformer / "model.pt")
    (paraformer / "am.mvn").write_text(mvn(560), encoding="utf-8")
    (paraformer / "config.yaml").write_text(PARAFORMER_YAML, encoding="utf-8")
    for name in ("configuration.json", "tokens.json"):
        (paraformer / name).write_text("{}", encoding="utf-8")


def mvn(n):
    """Kaldi's normalisation file of n values."""
    row = "<LearnRateCoef> 0 [ " + " ".join(["{}"] * n) + " ]\n"
    shift, scale = row.format(*[-8.0] * n), row.format(*[0.25] * n)
    return f"<Nnet>\n<Splice> {n} {n}\n[ 0 ]\n<AddShift> {n} {n}\n{shift}<Rescale> {n} {n}\n{scale}</Nnet>\n"


PARAFORMER_YAML = """\
model: ParaformerStreaming
model_conf: {ctc_weight: 0.0, lsm_weight: 0.1}
encoder: SANMEncoderChunkOpt
encoder_conf:
    output_size: 16
    attention_heads: 2
    linear_units: 32
    num_blocks: 3
    dropout_rate: 0.1
    input_layer: pe_online
    kernel_size: 11
    sanm_shfit: 0
frontend: WavFrontendOnline
frontend_conf: {fs: 16000, window: hamming, n_mels: 80, frame_length: 25, frame_shift: 10, lfr_m: 7, lfr_n: 6}
"""


def write_s3(path, state, stride=2):
    """The S3 tokenizer as its exporter names things: most tensors are told by their consumer only."""
    nodes, tensors = [], []
    for i, (name, value) in enumerate(state.items()):
        kept = "conv" in name or "positional" in name
        stored = name.replace("encoder.", "encoders.") if kept else f"onnx::MatMul_{i}"
        array = value.numpy() if kept or value.ndim < 2 else value.T.contiguous().numpy()
        tensors.append(numpy_helper.from_array(array, stored))
        if not kept:
            node = consumer(name)
            inputs = ["x", stored] if value.ndim > 1 else [stored, "x"]
            operation = node.rpartition("/")[2].split("_")[0]
            nodes.append(helper.make_node(operation, inputs, [f"y{i}"], name=node))
    for conv in ("conv1", "conv2"):
        inputs = ["x", f"encoders.{conv}.weight", f"encoders.{conv}.bias"]
        strides = [stride if conv == "conv1" else 2]
        nodes.insert(0, helper.make_node("Conv", inputs, [conv], name=f"/{conv}/Conv", strides=strides, pads=[1, 1]))
    tensors.append(numpy_helper.from_array(np.array([1, 2]), "onnx::Reshape_9"))
    codes = helper.make_tensor_value_info("indices", onnx.TensorProto.INT32, [1, None])
    graph = helper.make_graph(nodes, "s3", [floats("feats", 1, 128, None)], [codes], tensors)
    onnx.save(helper.make_model(graph), path)


def floats(name, *shape):
    return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)


# ---- language model ----


def write_backbone(folder, config, state):
    """Three shards and their index, pictures' tensors among them, as `mmgpt_step1_v2`."""
    state = {name: value.bfloat16() for name, value in state.items()}
    state |= {
        "vision_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(8, 8, dtype=torch.bfloat16),
        "vit_downsampler.weight": torch.zeros(8, 8, 2, 2, dtype=torch.bfloat16),
        "vit_large_projector.weight": torch.zeros(32, 8, dtype=torch.bfloat16),
    }
    names = sorted(state)
    files = {name: f"model-{i * 3 // len(names) + 1:05}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: state[name] for name in names if files[name] == file}, folder / file, {"format": "pt"})
    total = sum(value.nbytes for value in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    size = config.backbone
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["MMGPTStep1ForCausalLMV2"], "model_type": "mmgpt_step1_v2", "torch_dtype": "bfloat16",
        "vision_tower_config": {"hidden_size": 8, "num_hidden_layers": 1}, "image_token_id": 13,
        "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0, "rms_norm_eps": 1e-5,
        **{name: getattr(size, name) for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_attention_groups", "max_seq_len")},
    }), encoding="utf-8")  # fmt: skip
    (folder / "tokenizer.model").write_bytes(sentencepiece(config.backbone.vocab_size - AUDIO_SLOTS))


def sentencepiece(n_text):
    """Step-1's tokenizer.model with words that mean nothing: markers, bytes, n_text pieces in all, then audio."""
    fillers = ["▁", *"abcdefghijklmnopqrstuvwxyz'", "human", "assistant", *(f"▁w{i}" for i in range(n_text))]
    texts = [MARKERS.get(i, f"<user_defined_symbol_{i}>") for i in range(68)]
    texts += [f"<0x{byte:02X}>" for byte in range(256)]
    texts += fillers[: n_text - len(texts)]
    texts += [f"<audio_{k}>" for k in range(AUDIO_SLOTS)]
    score, pieces = field(2, -9.0), []
    for i, text in enumerate(texts):
        kind = 2 if i == 0 else 3 if i in CONTROL else 6 if 68 <= i < 324 else 1 if 324 <= i < n_text else 4
        body = field(1, text.encode()) + (score if kind == 1 else field(2, 0.0))
        pieces.append(field(1, body + (b"" if kind == 1 else field(3, kind))))
    return b"".join(pieces) + field(2, field(3, 1) + field(35, 1)) + field(3, field(3, 1))


# ---- vocoder ----


def normed(name):
    """torch's newer name of a factor of weight norm."""
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        name = name.replace(old, f"parametrizations.weight.{new}")
    return name


def write_vocoder(folder, config, parts):
    torch.save(parts["flow"], folder / "flow.pt")
    torch.save(parts["hift"], folder / "hift.pt")
    (folder / "cosyvoice.yaml").write_text(COSYVOICE_YAML, encoding="utf-8")
    (folder / "VERSION_Vq0206Vocoder_1202").write_text("", encoding="utf-8")
    write_campplus(folder / "campplus.onnx")


def write_campplus(path):
    """(1, T, 80) -> (1, 192): something that answers like CAM++."""
    weight = np.random.default_rng(1).normal(size=(80, 192)).astype(np.float32)
    nodes = [
        helper.make_node("Abs", ["input"], ["loud"]),
        helper.make_node("ReduceMean", ["loud"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["mean", "weight"], ["output"]),
    ]
    tensors = [numpy_helper.from_array(weight, "weight")]
    graph = helper.make_graph(nodes, "campplus", [floats("input", 1, None, 80)], [floats("output", 1, 192)], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)


COSYVOICE_YAML = """\
# tags name classes of another code base; a reader must take them as plain data
__set_seed1: !apply:random.seed [1986]
__set_seed2: !apply:torch.manual_seed [1986]

sample_rate: 22050
spk_embed_dim: 192

flow: !new:cosyvoice.flow.flow.MaskedDiffWithXvec
    input_size: 16
    output_size: 80
    spk_embed_dim: !ref <spk_embed_dim>
    vocab_size: 5121
    input_frame_rate: 41.67
    encoder: !new:cosyvoice.transformer.encoder.ConformerEncoder
        output_size: 16
        attention_heads: 2
        linear_units: 32
        num_blocks: 2
        use_cnn_module: False
    length_regulator: !new:cosyvoice.flow.length_regulator.InterpolateRegulator
        channels: 80
    decoder: !new:cosyvoice.flow.flow_matching.ConditionalCFM
        cfm_params: !new:omegaconf.DictConfig
            content:
                sigma_min: 1e-06
                solver: 'euler'
                training_cfg_rate: 0.2
                inference_cfg_rate: 0.7
        estimator: !new:cosyvoice.flow.decoder.ConditionalDecoder
            channels: [16, 16]
            attention_head_dim: 8
            n_blocks: 1
            num_mid_blocks: 2
            num_heads: 2

hift: !new:cosyvoice.hifigan.generator.HiFTGenerator
    in_channels: 80
    base_channels: 16
    nb_harmonics: 8
    sampling_rate: !ref <sample_rate>
    nsf_alpha: 0.1
    nsf_sigma: 0.003
    nsf_voiced_threshold: 10
    upsample_rates: [8, 8]
    upsample_kernel_sizes: [16, 16]
    istft_params:
        n_fft: 16
        hop_len: 4
    resblock_kernel_sizes: [3, 7, 11]
    resblock_dilation_sizes: [[1, 3, 5], [1, 3, 5], [1, 3, 5]]
    source_resblock_kernel_sizes: [7, 11]
    source_resblock_dilation_sizes: [[1, 3, 5], [1, 3, 5]]
    lrelu_slope: 0.1
    audio_limit: 0.99
    f0_predictor: !new:cosyvoice.hifigan.f0_predictor.ConvRNNF0Predictor
        in_channels: 80
        cond_channels: 16

feat_extractor: !name:matcha.utils.audio.mel_spectrogram
    n_fft: 1024
    num_mels: 80
    sampling_rate: !ref <sample_rate>
    hop_size: 256
    win_size: 1024
    fmin: 0
    fmax: 8000
    center: False
"""


if __name__ == "__main__":
    for role, place in write(sys.argv[1]).items():
        print(f"--{role} {place}")
