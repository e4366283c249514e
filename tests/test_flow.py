"""The flow: published names, masks, guidance, frame arithmetic, and that it can learn."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from aqaa.config import FlowConfig, MelConfig
from aqaa.fast import mish
from aqaa.vocoder.conformer import RelativeAttention, relative_positions
from aqaa.vocoder.flow import Flow, stretch
from aqaa.vocoder.unet import MaskedGroupNorm

TINY = FlowConfig(vocab_size=40, input_size=16, output_size=8, spk_embed_dim=4, encoder_size=16, encoder_heads=2,
                  encoder_units=16, encoder_blocks=2, channels=(16, 16), attention_head_dim=8, num_heads=2, n_blocks=1,
                  num_mid_blocks=1, n_timesteps=3)
MEL = MelConfig(n_fft=640, sampling_rate=16_000, hop_size=160, win_size=640, num_mels=8)


def build(mel=MEL, **changes):
    torch.manual_seed(0)
    return Flow(replace(TINY, **changes), mel).eval()


def test_every_norm_has_the_published_eps():
    norms = [m for m in build().modules() if isinstance(m, (nn.LayerNorm, nn.GroupNorm))]
    assert len(norms) > 10 and {m.eps for m in norms} == {1e-5}


def test_padding_changes_nothing():
    flow, lengths = build(), torch.tensor([15, 5, 10])
    token = torch.randint(0, 40, (3, 15))
    noise = torch.randn(3, 8, 36)
    together = flow.inference(token, lengths, noise=noise, cfg_rate=0.7)
    for i, n in enumerate(lengths.tolist()):
        alone = flow.inference(token[i : i + 1, :n], noise=noise[i : i + 1, :, : flow.frames(n)], cfg_rate=0.7)
        torch.testing.assert_close(together[i : i + 1, :, : flow.frames(n)], alone, atol=2e-5, rtol=1e-4)
        assert not together[i, :, flow.frames(n) :].any()


def test_padding_with_a_prompt():
    flow, lengths = build(), torch.tensor([10, 5])
    token, prompt, feat = torch.randint(0, 40, (2, 10)), torch.randint(0, 40, (2, 5)), torch.randn(2, 12, 8)
    noise = torch.randn(2, 8, 36)
    together = flow.inference(token, lengths, prompt_token=prompt, prompt_feat=feat, noise=noise)
    alone = flow.inference(token[1:, :5], prompt_token=prompt[1:], prompt_feat=feat[1:], noise=noise[1:, :, :24])
    torch.testing.assert_close(together[1:, :, :12], alone, atol=2e-5, rtol=1e-4)


def test_loss_ignores_what_is_padded():
    flow, token, mel = build(), torch.randint(0, 40, (2, 10)), torch.randn(2, 8, 24)

    def loss(token, mel):
        torch.manual_seed(1)
        return flow.compute_loss(token, torch.tensor([10, 5]), mel, torch.tensor([24, 12]), mu_weight=1.0)[0]

    other_token, other_mel = token.clone(), mel.clone()
    other_token[1, 5:], other_mel[1, :, 12:] = 7, 100.0
    torch.testing.assert_close(loss(token, mel), loss(other_token, other_mel))


def test_masked_norm_is_the_plain_one_when_nothing_is_masked():
    norm, x = MaskedGroupNorm(4, 16), torch.randn(2, 16, 9)
    torch.testing.assert_close(norm(x, torch.ones(2, 1, 9)), norm(x))


def test_the_mish_with_one_exponential_is_mish():
    x = torch.cat([torch.linspace(-120, 120, 4801), torch.tensor([-1e30, 1e30])]).requires_grad_()
    plain, twin = nn.Mish(), nn.Sequential(nn.Mish(), build())
    mish.use(twin)
    kinds = {name: type(layer) for name, layer in twin.named_modules() if isinstance(layer, nn.Mish)}
    assert {mish.OneExponentialMish} == {kind for name, kind in kinds.items() if "estimator" in name}
    assert {nn.Mish} == {kind for name, kind in kinds.items() if "estimator" not in name}
    fast = mish.OneExponentialMish()
    torch.testing.assert_close(fast(x), plain(x))
    torch.testing.assert_close(*(torch.autograd.grad(f(x).sum(), x)[0] for f in (fast, plain)))
    assert torch.equal(fast(x.bfloat16()), plain(x.bfloat16()))


def test_ids_outside_the_vocabulary():
    flow, noise = build(), torch.randn(1, 8, 12)
    low, zero = (flow.inference(torch.tensor([[k, 1, 2, 3, 4]]), noise=noise) for k in (-1, 0))
    torch.testing.assert_close(low, zero)
    with pytest.raises(ValueError, match="vocabulary"):
        flow.inference(torch.tensor([[40, 1, 2, 3, 4]]))


@pytest.mark.parametrize("mel", [MEL, MelConfig(num_mels=8)])
def test_chunks_have_the_frames_of_the_whole(mel):
    flow = build(mel)
    ends = [0, 10, 15, 40, 45, 125]
    made = [flow.inference(torch.zeros(1, b - a, dtype=torch.long), first=a).shape[2] for a, b in pairwise(ends)]
    assert sum(made) == flow.frames(125) == int(3 * mel.sampling_rate / mel.hop_size)


def test_mini_has_twelve_frames_a_group():
    flow = build()
    assert [flow.frames(5 * g) for g in range(200)] == [12 * g for g in range(200)]


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_any_number_of_tokens(n):
    flow = build()
    assert flow.inference(torch.zeros(1, n, dtype=torch.long)).shape == (1, 8, flow.frames(n))


def test_guidance_is_an_extrapolation_and_free_when_off():
    flow, calls = build(), []
    flow.decoder.estimator.register_forward_hook(lambda m, args, out: calls.append(len(args[0])))
    (x, mu, cond), speaker = torch.randn(3, 1, 8, 10), torch.randn(1, 8)
    t, zero = torch.tensor(0.3), torch.zeros_like
    guided = flow.decoder.velocity(x, None, mu, t, speaker, cond, 0.7)
    told = flow.decoder.velocity(x, None, mu, t, speaker, cond, 0)
    free = flow.decoder.velocity(x, None, zero(mu), t, zero(speaker), zero(cond), 0)
    torch.testing.assert_close(guided, 1.7 * told - 0.7 * free, atol=1e-5, rtol=1e-5)
    assert calls == [2, 1, 1]


def test_time_grid_is_made_in_the_dtype_of_the_model():
    steps = build().decoder.time_steps(10, torch.zeros(1, dtype=torch.bfloat16))
    assert steps.dtype == torch.bfloat16 and (steps[0], steps[-1]) == (0, 1) and (steps.diff() > 0).all()


def test_relative_scores_by_hand():
    torch.manual_seed(0)
    attention, x = RelativeAttention(8, 1), torch.randn(1, 4, 8)
    table = relative_positions(4, 8, x)  # row r stands for i - j = 3 - r
    q, k = attention.linear_q(x)[0], attention.linear_k(x)[0]
    p, u, v = attention.linear_pos(table), attention.pos_bias_u[0], attention.pos_bias_v[0]
    score = torch.stack([torch.stack([(q[i] + u) @ k[j] + (q[i] + v) @ p[3 - i + j] for j in range(4)])
                         for i in range(4)])
    expected = attention.linear_out((score / 8**0.5).softmax(-1) @ attention.linear_v(x)[0])
    torch.testing.assert_close(attention(x, table, None)[0], expected)


def test_stretch_keeps_empty_parts_empty():
    assert stretch(torch.zeros(1, 0, 8), 0).shape == (1, 8, 0)
    assert stretch(torch.ones(1, 3, 8), 7).eq(1).all()


def test_scale_of_the_mel_is_inside_the_flow():
    noise, feat = torch.randn(1, 8, 24), torch.randn(1, 12, 8)
    token = torch.arange(5)[None]
    plain = build().inference(token, prompt_token=token, prompt_feat=feat, noise=noise)
    scaled = build(mel_mean=-6.0, mel_std=2.0).inference(
        token, prompt_token=token, prompt_feat=feat * 2 - 6, noise=noise)
    torch.testing.assert_close(scaled, plain * 2 - 6, atol=1e-5, rtol=1e-5)


def test_it_learns():
    flow = build().train()
    optimizer = torch.optim.AdamW(flow.parameters(), 1e-2)
    token = torch.randint(0, 40, (8, 10))
    mel = nn.functional.interpolate(torch.randn(40, 8)[token].mT, size=24)
    lengths = torch.full((8,), 10), torch.full((8,), 24)
    losses = []
    for _ in range(25):
        loss, logs = flow.compute_loss(token, lengths[0], mel, lengths[1], mu_weight=1.0, token_noise=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(logs["matching"] + logs["mu"])
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
