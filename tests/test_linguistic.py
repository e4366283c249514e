"""The all-chunks pass against a chunk-by-chunk one written out here, streaming in any packets, batching, lengths."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from aqaa import audio
from aqaa.config import LinguisticConfig, preset
from aqaa.fast import fsmn
from aqaa.tokenizers.linguistic import EPS, STRIDE, LinguisticTokenizer, read_mvn, row_count

SMALL = LinguisticConfig(codebook_size=32, output_size=32, attention_heads=4, linear_units=48, num_blocks=3)


def build(config=SMALL, seed=0):
    torch.manual_seed(seed)
    model = LinguisticTokenizer(config).eval()
    for name, value in model.state_dict().items():
        if name.endswith("weight") and value.ndim > 1:
            torch.nn.init.normal_(value, std=0.15)
    model.centroids.normal_()
    model.add_shift.uniform_(-12, -8)
    model.rescale.uniform_(0.1, 0.3)
    return model


MODEL = build()


def sound(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.3 * torch.sin(torch.arange(n) * 0.03) * torch.rand(n, generator=generator)


# ---- features ----


def online_rows(wav):
    """Stacked rows as the official front end makes them: strides, a sample cache, a frame cache (no normalisation)."""
    rows, cache, frames = [], torch.zeros(0), None
    n_strides = len(wav) // STRIDE
    for i in range(n_strides + 1):
        piece, final = wav[i * STRIDE : (i + 1) * STRIDE], i == n_strides
        if not len(piece):
            break
        cache = torch.cat([cache, piece])
        fresh = audio.fbank(cache * 32768)
        cache = cache[160 * len(fresh) :]
        if frames is None:
            fresh = torch.cat([fresh[:1]] * 3 + [fresh])
        frames = fresh if frames is None else torch.cat([frames, fresh])
        made = 0
        if len(frames) >= 7:
            for k in range(math.ceil((len(frames) - 3) / 6)):
                window = frames[6 * k : 6 * k + 7]
                if len(window) < 7 and not final:
                    break
                rows.append(torch.cat([window, window[-1:].expand(7 - len(window), -1)]).flatten())
                made += 1
        frames = frames[6 * made :]
    return torch.stack(rows) if rows else torch.zeros(0, 560)


@given(n=st.one_of(st.integers(0, 9000), st.sampled_from([879, 880, 4720, STRIDE, 2 * STRIDE, 3 * STRIDE])))
@settings(max_examples=40, deadline=None)
def test_features_are_those_of_the_official_stride_by_stride_front_end(n):
    expected = online_rows(sound(n))
    got = MODEL.features(sound(n))
    assert got.shape == (row_count(n), 560) == tuple(expected.shape)
    assert torch.allclose(got, (expected + MODEL.add_shift) * MODEL.rescale, atol=1e-5)


@pytest.mark.parametrize(("n", "rows"), [(0, 0), (879, 0), (880, 1), (3840, 4), (4719, 4), (4720, 5), (16_000, 16)])
def test_row_count(n, rows):
    assert row_count(n) == rows


def test_dither_changes_features_and_none_is_the_default():
    for model, equal in ((build(replace(SMALL, dither=1.0)), False), (MODEL, True)):
        assert torch.equal(model.features(sound(4000)), model.features(sound(4000))) == equal


def test_read_mvn(tmp_path):
    rows = "<AddShift> 3 3\n<LearnRateCoef> 0 [ -1.5 2 3 ]\n<Rescale> 3 3\n<LearnRateCoef> 0 [ 4 5 6e-1 ]"
    (tmp_path / "am.mvn").write_text(f"<Nnet>\n{rows}\n</Nnet>", encoding="utf-8")
    shift, scale = read_mvn(tmp_path / "am.mvn")
    assert shift.tolist() == [-1.5, 2, 3] and scale.tolist() == pytest.approx([4, 5, 0.6])
    (tmp_path / "bad.mvn").write_text("version https://git-lfs", encoding="utf-8")
    with pytest.raises(ValueError, match="bad.mvn"):
        read_mvn(tmp_path / "bad.mvn")


# ---- encoder ----


def chunk_by_chunk(model, rows):
    """The official order of things: every chunk through all layers, caches carried along."""
    c, outputs = model.config, []
    half = c.input_size // 2
    rates = torch.exp(-torch.arange(half, dtype=rows.dtype) * math.log(10000) / (half - 1))
    angles = torch.arange(1, len(rows) + 1, dtype=rows.dtype)[:, None] * rates
    rows = rows * math.sqrt(c.output_size) + torch.cat([angles.sin(), angles.cos()], 1)
    recent = rows.new_zeros(5, c.input_size)
    layers = [*model.encoder.encoders0, *model.encoder.encoders]
    caches = [[rows.new_zeros(0, c.output_size)] * 2 for _ in layers]
    for chunk in rows.split(4):
        x = torch.cat([recent, chunk])
        recent = x[-5:]
        for layer, cache in zip(layers, caches, strict=True):
            attention = layer.self_attn
            q, k, v = attention.linear_q_k_v(layer.norm1(x)).chunk(3, 1)
            keys, values = torch.cat([cache[0], k]), torch.cat([cache[1], v])
            cache[:] = [torch.cat([old, new[:-5]])[-16:] for old, new in zip(cache, (k, v), strict=True)]
            size = c.output_size // c.attention_heads
            heads = [
                (q[:, s : s + size] @ keys[:, s : s + size].T * size**-0.5).softmax(-1) @ values[:, s : s + size]
                for s in range(0, c.output_size, size)
            ]
            memory = F.conv1d(v.T[None], attention.fsmn_block.weight, padding=5, groups=c.output_size)[0].T + v
            y = attention.linear_out(torch.cat(heads, 1)) + memory
            x = x + y if x.shape == y.shape else y
            ff = layer.feed_forward
            x = x + ff.w_2(F.relu(ff.w_1(layer.norm2(x))))
        outputs.append(model.encoder.after_norm(x)[5:])
    return torch.cat(outputs)


@pytest.mark.parametrize("n_rows", [1, 3, 4, 5, 16, 27])
def test_all_chunks_at_once_equal_one_after_another(n_rows):
    model = build().double()
    rows = torch.randn(n_rows, 560, dtype=torch.float64)
    past = model.encoder.start(1, "cpu")
    past.rows = past.rows.double()
    with torch.no_grad():
        got, _ = model.encoder(rows[None], torch.tensor([n_rows]), past)
        assert (got[0] - chunk_by_chunk(model, rows)).abs().max() < 1e-5  # positions are float32


@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_the_fast_memory_is_the_plain_one_with_its_gradients(dtype, error):
    plain, twin = build().to(dtype), fsmn.use(build().to(dtype))
    assert {type(layer.self_attn) for layer in twin.encoder.encoders} == {fsmn.ToeplitzSANM}
    assert plain.state_dict().keys() == twin.state_dict().keys()
    rows, lengths = torch.randn(2, 13, 560), torch.tensor([13, 6])
    results = []
    for model in (plain, twin):
        hidden = model.encoder(rows.to(dtype), lengths, model.encoder.start(2, "cpu"))[0]
        hidden[0].square().sum().backward()
        results.append([hidden.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() <= error * one.abs().max().clamp_min(1)
    assert fsmn.use(twin) is twin


@given(lengths=st.lists(st.integers(1, 23), min_size=2, max_size=4), seed=st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_padding_changes_no_valid_row(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    items = [torch.randn(n, 560, generator=generator) for n in lengths]
    batch = torch.nn.utils.rnn.pad_sequence(items, batch_first=True, padding_value=float("nan"))
    with torch.no_grad():
        together = MODEL(batch, torch.tensor(lengths))
        for row, item in zip(together, items, strict=True):
            assert (row[: len(item)] - MODEL(item[None])[0]).abs().max() < 1e-5


def test_it_trains_in_bfloat16_with_finite_gradients_for_every_parameter():
    model = build(replace(preset("mini").linguistic, num_blocks=2, output_size=32, linear_units=32))
    rows = torch.randn(3, 10, 560, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(rows, torch.tensor([10, 7, 1]))
    out.float()[0].square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert rows.grad[0].abs().sum() > 0 and not rows.grad[1].any()


def test_parameters_have_the_published_names_sizes_and_epsilon():
    with torch.device("meta"):
        model = LinguisticTokenizer()
    state = model.encoder.state_dict(prefix="encoder.")
    assert len(state) == 652 and sum(v.numel() for v in state.values()) == 157_975_648
    assert state["encoder.encoders0.0.self_attn.linear_q_k_v.weight"].shape == (1536, 560)
    assert state["encoder.encoders.48.self_attn.fsmn_block.weight"].shape == (512, 1, 11)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 101 and all(norm.eps == EPS == 1e-12 for norm in norms)


# ---- codes ----


def test_quantize_takes_the_nearest_centroid():
    hidden = MODEL.centroids[[3, 31, 0]] + 0.01
    assert MODEL.quantize(hidden).tolist() == [3, 31, 0]
    assert MODEL.quantize(hidden[None]).shape == (1, 3) and MODEL.quantize(hidden).dtype == torch.int64


@given(packets=st.lists(st.integers(0, 6000), min_size=1, max_size=6), seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_a_stream_in_any_packets_gives_the_codes_of_the_whole(packets, seed):
    wav = sound(sum(packets), seed)
    state, codes, rows = MODEL.start(), [], []
    for i, packet in enumerate(wav.split(packets) if len(wav) else [wav] * len(packets)):
        final = i == len(packets) - 1
        hidden, after = MODEL.push_hidden(state, packet, final)
        again, state = MODEL.push(state, packet, final)  # the old state still stands
        rows.append(hidden)
        codes.append(again)
        pushed = sum(packets[: i + 1])
        assert state.n_samples == after.n_samples == pushed
        assert sum(map(len, codes)) == (row_count(pushed) if final else pushed // STRIDE * 4)
    with torch.no_grad():
        whole = MODEL(MODEL.features(wav)[None])[0]
    assert whole.shape == torch.cat(rows).shape
    assert (whole - torch.cat(rows)).abs().max() < 1e-4 if len(whole) else True
    assert torch.equal(MODEL.quantize(whole), torch.cat(codes))
    with pytest.raises(ValueError, match="final packet"):
        MODEL.push(state, sound(10))


def test_a_batch_gives_the_codes_of_each_and_short_waves_none():
    wavs = [sound(5000, 1), sound(879), sound(20_000, 2), sound(0), sound(STRIDE, 3).numpy()]
    codes = MODEL.encode_batch(wavs)
    assert [len(c) for c in codes] == [row_count(len(w)) for w in wavs]
    for wav, got in zip(wavs, codes, strict=True):
        assert torch.equal(MODEL.encode(wav), got) and got.dtype == torch.int64
    assert [len(c) for c in MODEL.encode_batch(wavs[1:2])] == [0] and MODEL.encode_batch([]) == []


def test_loudness_is_evened_out_unless_told():
    wav = sound(8000)
    assert torch.equal(MODEL.encode(wav), MODEL.encode(0.25 * wav))
    assert torch.equal(MODEL.encode(audio.energy_norm(wav), energy_norm=False), MODEL.encode(wav))
