"""The published sizes, on the meta device: parameter counts, and every listed key and shape mapped, none left over."""

import lzma
from pathlib import Path

import pytest
import torch

from aqaa.backbone import step1
from aqaa.config import AQAAConfig, BackboneConfig
from aqaa.files import ModelError
from aqaa.tokenizers import s3_onnx
from aqaa.weights import model_folder, readers, shards
from tests.release import normed
from tests.test_semantic import consumer

SMALL = BackboneConfig(  # Step-Audio-TTS-3B and EditX
    hidden_size=3072, intermediate_size=8192, num_hidden_layers=32, num_attention_heads=48, num_attention_groups=4
)
COUNTS = {"linguistic": 157_975_648, "semantic": 130_629_120, "flow": 105_399_552, "hift": 20_460_591}
TENSORS = {"linguistic": 652, "semantic": 96, "flow": 1185, "hift": 227}


def published():
    """{part: {key: meta tensor}} as the released files hold them."""
    parts, keys = {}, None
    text = lzma.decompress((Path(__file__).parent / "data" / "published_keys.txt.xz").read_bytes()).decode()
    for name, *shape in map(str.split, text.splitlines()):
        if name == "#":
            keys = parts.setdefault(shape[0], {})
        else:
            keys[name] = torch.empty([int(n) for n in shape], device="meta")
    return parts


KEYS = published()


def built(name):
    with torch.device("meta"):
        return model_folder.build(name, AQAAConfig())


def shapes(state):
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


@pytest.mark.parametrize("name", COUNTS)
def test_our_networks_have_the_published_keys_and_shapes(name):
    state = built(name).state_dict()
    if name == "linguistic":  # centroids and normalisation come from files of their own
        extra = {key: tuple(state.pop(key).shape) for key in ("centroids", "add_shift", "rescale")}
        assert extra == {"centroids": (1024, 512), "add_shift": (560,), "rescale": (560,)}
    assert shapes(state) == shapes(KEYS[name])
    assert (len(state), sum(t.numel() for t in state.values())) == (TENSORS[name], COUNTS[name])


@pytest.mark.parametrize("config, tensors, count", [
    (BackboneConfig(), 795, 131_946_590_208), (SMALL, 291, 3_529_706_496),
])  # fmt: skip
def test_language_models_have_the_published_size(config, tensors, count):
    with torch.device("meta"):
        state = step1.build(config).state_dict()
    assert (len(state), sum(t.numel() for t in state.values())) == (tensors, count)
    assert shapes(state) == shapes(step1_keys(config))


def step1_keys(config, prefix="model.", head="lm_head.weight"):
    """Keys and shapes as the index of Step-Audio-Chat lists them."""
    d, units, groups = config.hidden_size, config.intermediate_size, config.num_attention_groups
    shared = groups * d // config.num_attention_heads
    layer = {
        "self_attn.q_proj": (d, d), "self_attn.k_proj": (shared, d), "self_attn.v_proj": (shared, d),
        "self_attn.o_proj": (d, d), "mlp.gate_proj": (units, d), "mlp.up_proj": (units, d), "mlp.down_proj": (d, units),
        "input_layernorm": (d,), "post_attention_layernorm": (d,),
    }  # fmt: skip
    keys = {f"{prefix}embed_tokens.weight": (config.vocab_size, d), f"{prefix}norm.weight": (d,)}
    keys |= {head: (config.vocab_size, d)}
    for i in range(config.num_hidden_layers):
        keys |= {f"{prefix}layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return {key: torch.empty(shape, device="meta") for key, shape in keys.items()}


VISION = (
    "vision_model.encoder.layers.0.self_attn.q_proj.weight", "vision_model.encoder.layers.0.mlp.fc1.weight",
    "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight", "sam_model.blocks.0.mlp.lin1.weight",
    "vit_downsampler.weight", "vit_large_projector.bias",
)  # fmt: skip


def entries(listed):
    return {name: shards.Entry(Path("x"), "BF16", shape, 0) for name, shape in listed.items()}


@pytest.mark.parametrize("prefix, head", [
    ("model.", "lm_head.weight"), ("language_model.model.", "language_model.lm_head.weight"),
    ("model.language_model.", "lm_head.weight"), ("", "lm_head.weight"),
])  # fmt: skip
def test_every_key_of_a_language_model_is_mapped_and_the_others_are_dropped(prefix, head):
    keys = step1_keys(BackboneConfig(), prefix, head)
    tensors = entries(shapes(keys) | dict.fromkeys(VISION, (8, 8)))
    names, others = shards.language_model(tensors, "folder")
    assert sorted(others) == sorted(VISION) and sorted(names.values()) == sorted(keys)
    with torch.device("meta"):
        model = step1.build(BackboneConfig())
    shards.check(model, tensors, names, "folder")


@pytest.mark.parametrize("vision", [VISION[:1], ()])
def test_a_folder_without_a_language_model_is_named(vision):
    with pytest.raises(ModelError, match="no language models"):
        shards.language_model(entries(dict.fromkeys(vision, (8, 8))), "folder")


@pytest.mark.parametrize("outer, prefix", [("", ""), ("state_dict", ""), ("state_dict", "module."), ("model", "")])
def test_the_linguistic_loader_takes_every_wrapping(monkeypatch, outer, prefix, tmp_path):
    state = {prefix + name: tensor for name, tensor in KEYS["linguistic"].items()}
    monkeypatch.setattr("torch.load", lambda *_, **__: {outer: state} if outer else state)
    (tmp_path / "model.pt").write_bytes(b"PK\3\4")
    assert shapes(readers.pickled(tmp_path / "model.pt")) == shapes(KEYS["linguistic"])


@pytest.mark.parametrize("rename", [str, normed, "generator.{}".format, lambda name: "generator." + normed(name)])
def test_the_hift_loader_takes_every_naming(rename):
    state = {rename(name): tensor for name, tensor in KEYS["hift"].items()}
    model_folder.fit(built("hift"), state, "hift.pt")
    fewer, more = dict(list(state.items())[1:]), state | {"more": torch.empty(1, device="meta")}
    for other, fault in ((fewer, "lacks"), (more, "no place for")):
        with pytest.raises(ModelError, match=fault):
            model_folder.fit(built("hift"), other, "hift.pt")


def test_the_flow_loader_takes_the_published_keys():
    model_folder.fit(built("flow"), KEYS["flow"], "flow.pt")


def test_the_onnx_reader_names_every_tensor():
    """The initializers as the exporter names them, each with the node that consumes it."""
    tensors, nodes = {}, []
    for i, (name, value) in enumerate(KEYS["semantic"].items()):
        if "conv" in name or "positional" in name:
            tensors[name.replace("encoder.", "encoders.")] = value
        else:
            tensors[f"onnx::MatMul_{1100 + i}"] = value.T if value.ndim == 2 else value
            nodes.append((consumer(name), ["x", f"onnx::MatMul_{1100 + i}"]))
    state = s3_onnx._state(tensors, nodes)
    assert shapes(state) == shapes(KEYS["semantic"])
    model_folder.fit(built("semantic"), state, "speech_tokenizer_v1.onnx")
