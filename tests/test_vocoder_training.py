"""Training of the vocoder: the pitch tracker is right, batches fit together, and a few steps already help."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from aqaa.config import preset
from aqaa.pitch import f0
from aqaa.training.flow_and_hift import FlowTask, HiftTask
from tests.conftest import losses_of

RATE = 16_000
MINI = preset("mini")
TINY = replace(
    MINI,
    flow=replace(MINI.flow, input_size=16, encoder_size=16, encoder_heads=2, encoder_units=16, encoder_blocks=1,
                 channels=(16, 16), attention_head_dim=8, num_mid_blocks=1),
    hift=replace(MINI.hift, base_channels=16, f0_channels=16),
)


def tone(pitch, seconds=0.5):
    """A buzz of 20 harmonics with a little noise; pitch in Hz, a number or one value per sample."""
    phase = 2 * np.pi * np.cumsum(np.broadcast_to(pitch, int(seconds * RATE)) / RATE)
    rng = np.random.default_rng(0)
    wave = sum(np.cos(h * phase + h) / h * (h * np.max(pitch) < RATE / 2) for h in range(1, 21))
    return (0.1 * wave + 0.002 * rng.standard_normal(len(phase))).astype(np.float32)


@pytest.mark.parametrize("pitch", [62, 75, 110, 160, 233, 340, 480])
def test_pitch_of_a_buzz(pitch):
    inside = f0(tone(pitch))[4:-4]
    assert np.abs(12 * np.log2(inside / pitch)).max() < 0.1


def test_pitch_of_a_glide_is_read_at_the_frame_centre():
    pitch = 100 * 2 ** np.linspace(0, 1, RATE)
    inside = f0(tone(pitch, 1.0))[4:-4]
    assert np.abs(12 * np.log2(inside / pitch[80::160][4:-4])).max() < 0.1


def test_noise_and_silence_have_no_pitch():
    noise = np.random.default_rng(0).standard_normal(RATE) * 0.1
    assert (f0(noise) > 0).mean() < 0.02
    assert not f0(np.zeros(1600)).any()
    assert f0(np.zeros(100)).shape == (0,)


def test_pitch_takes_int16_tensors_and_any_loudness():
    wave = tone(150)
    loud = f0(wave)
    quiet = f0(torch.from_numpy((wave * 3276.8).astype(np.int16)))
    assert np.abs(loud - quiet)[4:-4].max() < 1


def test_pitch_refuses_stereo():
    with pytest.raises(ValueError, match="mono"):
        f0(np.zeros((2, 1000)))


@pytest.fixture(scope="module")
def waves():
    return [(32767 * tone(p, s)).astype(np.int16) for p, s in ((120, 1.0), (180, 0.3), (240, 1.3))]


def test_hift_batch_fits_together(waves):
    task = HiftTask(TINY, waves, batch_size=4, frames=24)
    batch = task.batch(np.random.default_rng(0))
    assert batch["wav"].shape == (4, 24 * 160)
    assert batch["mel"].shape == (4, 80, 24)
    assert batch["f0"].shape == (4, 24)
    again = task.batch(np.random.default_rng(0))
    assert all(torch.equal(batch[k], again[k]) for k in batch)


def test_hift_learns_with_and_without_adversaries(waves):
    torch.manual_seed(0)
    task, rng = HiftTask(TINY, waves, batch_size=2, frames=16), np.random.default_rng(0)
    logs = [task.train_step(task.batch(rng), 100 + i, 0.3) for i in range(12)]
    assert logs[-1]["mel"] < logs[0]["mel"]
    assert "adversary" not in logs[0]
    before = [p.clone() for p in task.adversaries.parameters()]
    assert np.isfinite(list(task.train_step(task.batch(rng), 200, 0.9).values())).all()
    assert any(not torch.equal(a, b) for a, b in zip(before, task.adversaries.parameters(), strict=True))


def test_flow_batch_aligns_ids_and_mel(waves):
    """Each id says where in the utterance it belongs, each mel frame too: cuts must agree."""
    wave = waves[2]
    n = len(wave) // 1920 * 5
    task = FlowTask(TINY, [(wave, np.arange(n))], batch_size=6, max_groups=4)
    mel = task.items[0][1]
    for seed in range(3):
        batch = task.batch(np.random.default_rng(seed))
        assert batch["token"].shape == (6, 20)
        for token, cut in zip(batch["token"], batch["mel"], strict=True):
            first = int(token[0]) // 5 * 12
            assert torch.equal(cut, mel[:, first : first + 48])


def test_flow_learns(waves):
    torch.manual_seed(0)
    pairs = [(w, np.arange(len(w) // 1920 * 5) % 50) for w in waves]
    task = FlowTask(TINY, pairs, batch_size=4, max_groups=4)
    losses, _ = losses_of(task, task.modules["flow"].parameters(), 1e-2, 20)
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
