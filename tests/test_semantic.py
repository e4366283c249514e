"""Masked batches, pieces of 30 s, the nearest entry, and the reader of the released ONNX file."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from aqaa import audio
from aqaa.config import SemanticConfig
from aqaa.tokenizers.protobuf import fields
from aqaa.tokenizers.semantic import SemanticTokenizer, sinusoids
from tests.test_text import field, varint

SMALL = SemanticConfig(
    n_codebook_size=48, n_mels=128, n_audio_ctx=800, n_audio_state=32, n_audio_head=2, n_audio_layer=2
)


def build(config=SMALL):
    torch.manual_seed(0)
    model = SemanticTokenizer(config).eval()
    model.quantizer._codebook.embed.copy_(F.normalize(torch.randn(config.n_codebook_size, config.n_audio_state), dim=1))
    return model


MODEL = build()


def sound(n, seed=0):
    return 0.2 * torch.randn(n, generator=torch.Generator().manual_seed(seed))


@given(lengths=st.lists(st.integers(1, 90), min_size=2, max_size=4))
@settings(max_examples=15, deadline=None)
def test_padding_changes_no_valid_row(lengths):
    mels = [torch.randn(128, n) for n in lengths]
    padded = torch.nn.utils.rnn.pad_sequence([m.T for m in mels], batch_first=True, padding_value=float("nan"))
    with torch.no_grad():
        together, rows = MODEL.hidden(padded.transpose(1, 2), lengths)
        assert rows.tolist() == [-(-n // 4) for n in lengths]
        for hidden, n, m in zip(together, rows, mels, strict=True):
            assert (hidden[:n] - MODEL.hidden(m[None])[0][0]).abs().max() < 1e-5


@pytest.mark.parametrize(("n", "codes"), [(0, 0), (479, 0), (480, 1), (799, 1), (800, 2), (16_000, 25), (7777, 12)])
def test_one_code_every_forty_milliseconds(n, codes):
    got = MODEL.encode(sound(n))
    assert got.shape == (codes,) and got.dtype == torch.int64


def test_a_batch_gives_the_codes_of_each():
    wavs = [sound(9000), sound(100), sound(16_000, 1).numpy(), sound(0)]
    for wav, codes in zip(wavs, MODEL.encode_batch(wavs), strict=True):
        assert torch.equal(codes, MODEL.encode(wav))
    assert MODEL.encode_batch([]) == []


def test_pieces_of_thirty_seconds_are_heard_one_by_one():
    loud, quiet = sound(480_000), 1e-3 * sound(20_000, 1)
    codes = MODEL.encode(torch.cat([loud, quiet]), energy_norm=False)
    assert torch.equal(codes[:750], MODEL.encode(loud, energy_norm=False))
    assert torch.equal(codes[750:], MODEL.encode(quiet, energy_norm=False))  # log-mel floor of its own
    assert len(MODEL.encode(sound(480_300))) == 750  # the last 300 samples are dropped


def test_more_rows_than_positions_are_refused():
    with pytest.raises(ValueError, match="800 positions"):
        MODEL.hidden(torch.zeros(1, 128, 3300))


def test_the_nearest_entry_on_the_sphere_wins_at_any_length_and_under_autocast():
    entries = MODEL.quantizer._codebook.embed
    with torch.autocast("cpu", torch.bfloat16):
        assert MODEL.quantize(7 * entries).tolist() == list(range(48))
    assert MODEL.quantize(0.1 * entries[None]).shape == (1, 48)


def test_loudness_is_evened_out_unless_told():
    wav = sound(8000)
    assert torch.equal(MODEL.encode(wav), MODEL.encode(0.25 * wav))
    assert torch.equal(MODEL.encode(audio.energy_norm(wav), energy_norm=False), MODEL.encode(wav))


def test_it_trains_in_bfloat16_with_finite_gradients():
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        hidden, _ = model.hidden(torch.randn(2, 128, 60), torch.tensor([60, 13]))
    hidden.float()[:, :3].square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_parameters_have_the_published_names_and_sizes():
    with torch.device("meta"):
        state = SemanticTokenizer().state_dict()
    assert len(state) == 96
    assert sum(v.numel() for v in state.values()) == 130_629_120
    assert state["encoder.conv1.weight"].shape == (1280, 128, 3)
    assert state["quantizer._codebook.embed"].shape == (4096, 1280)
    assert sinusoids(3, 4)[0].tolist() == [0, 0, 1, 1]


# ---- ONNX ----


def consumer(name):
    """The graph node that the exporter feeds with the tensor `name`."""
    if name == "quantizer._codebook.embed":
        return "/quantizer/rq/model/layers.0/_codebook/Pow_1"
    *path, last = name.split(".")
    if path[-1].endswith("_ln"):
        operation = {"weight": "Mul", "bias": "Add_1"}[last]
    else:
        operation = {"weight": "MatMul", "bias": "Add"}[last] if last in ("weight", "bias") else last
    where = "/".join(path[3:]).replace("mlp/", "mlp/mlp.")
    return f"/blocks.{path[2]}/{where}/{operation}" if len(path) > 2 else name


def onnx_file(state):
    """A model file with the tensors of `state`, named and consumed as the exporter does it."""
    nodes, tensors = b"", b""
    for i, (name, value) in enumerate(state.items()):
        stored = f"onnx::MatMul_{i}"
        if "conv" in name or "positional" in name:
            stored = name.replace("encoder.", "encoders.")
        elif value.ndim == 2:
            value = value.T
        node = consumer(name)
        inputs = ["x", stored] if value.ndim == 2 else [stored, "x"]  # a bias is the first input of its Add
        nodes += field(1, b"".join(field(1, x) for x in inputs) + field(3, node) + field(4, "Op"))
        raw = value.contiguous().numpy().tobytes()
        dims = field(1, b"".join(map(varint, value.shape))) if i % 2 else b"".join(field(1, d) for d in value.shape)
        tensors += field(5, dims + field(2, 1) + field(8, stored) + field(9, raw))
    tensors += field(5, field(1, 1) + field(2, 7) + field(8, "shape") + field(9, bytes(8)))  # an int64 is no weight
    return field(1, 8) + field(7, nodes + tensors)


def test_onnx_gives_back_every_tensor(tmp_path):
    (tmp_path / "s3.onnx").write_bytes(onnx_file(MODEL.state_dict()))
    model = SemanticTokenizer.from_onnx(tmp_path / "s3.onnx", n_audio_head=2)
    assert model.config == SMALL
    assert all(torch.equal(v, MODEL.state_dict()[k]) for k, v in model.state_dict().items())
    assert torch.equal(model.encode(sound(9000)), MODEL.encode(sound(9000)))


def test_onnx_heads_are_64_wide_unless_told(tmp_path):
    config = SemanticConfig(8, 4, 10, 192, 3, 1)
    (tmp_path / "s3.onnx").write_bytes(onnx_file(build(config).state_dict()))
    assert SemanticTokenizer.from_onnx(tmp_path / "s3.onnx").config == config


@pytest.mark.parametrize("content", [
    b"", b"version https://git-lfs.github.com/spec/v1", bytes(range(256)), field(7, b""), field(7, bytes(100)),
])
def test_files_that_are_no_such_network_are_refused(tmp_path, content):
    (tmp_path / "s3.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=r"s3\.onnx is no "):
        SemanticTokenizer.from_onnx(tmp_path / "s3.onnx")


def test_a_cut_file_and_a_missing_one_are_refused(tmp_path):
    content = onnx_file(MODEL.state_dict())
    for size in (10, 1000, len(content) - 1):
        (tmp_path / "s3.onnx").write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"s3\.onnx is no"):
            SemanticTokenizer.from_onnx(tmp_path / "s3.onnx")
    with pytest.raises(FileNotFoundError, match="none.onnx"):
        SemanticTokenizer.from_onnx(tmp_path / "none.onnx")


@given(st.lists(st.tuples(st.integers(1, 500), st.one_of(st.integers(0, 2**60), st.binary(max_size=300)))))
def test_protobuf_fields_read_back(pairs):
    data = b"".join(field(n, v) for n, v in pairs)
    read = [(n, v if isinstance(v, int) else bytes(v)) for n, v in fields(memoryview(data))]
    assert read == pairs
