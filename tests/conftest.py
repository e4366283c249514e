"""What several test files share: a whole system of tiny random weights, and questions that are only tones."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: more threads only get in each other's way
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; Triton asks once, when it is first imported

import shutil
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from aqaa.files import ModelError

RATE = 16_000
SENTENCES = [
    "what is seven plus five", "seven plus five is twelve", "is this a man or a woman", "this is a high voice",
    "say good morning slowly", "the opposite of hot is cold", "count from one to nine", "the plural of mouse is mice",
]  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tests run side by side; each keeps to one core."""
    import torch

    torch.set_num_threads(1)


def losses_of(task, parameters, lr, steps):
    """Losses of a task over some steps of AdamW, its batches drawn with seed 0; the last log."""
    import torch

    optimizer, rng, losses, logs = torch.optim.AdamW(parameters, lr), np.random.default_rng(0), [], {}
    for step in range(steps):
        loss, logs = task.loss(task.batch(rng), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, logs


def tiny_config():
    """The mini's networks with hardly any width: built, saved and run in moments."""
    from aqaa.config import BackboneConfig, ConfidenceConfig, IdsConfig, LinguisticConfig, SemanticConfig, preset

    mini = preset("mini")
    ids = IdsConfig(first_text=42, n_text=128, n_linguistic=16, n_semantic=32)
    return replace(
        mini,
        name="tiny",
        ids=ids,
        linguistic=LinguisticConfig(16, 16, attention_heads=2, linear_units=16, num_blocks=2),
        semantic=SemanticConfig(32, n_audio_state=16, n_audio_head=2, n_audio_layer=1),
        backbone=BackboneConfig(
            vocab_size=ids.end, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_attention_groups=2, max_seq_len=4096,
        ),
        flow=replace(
            mini.flow, vocab_size=ids.n_audio, input_size=16, spk_embed_dim=4, encoder_size=16, encoder_heads=2,
            encoder_units=16, encoder_blocks=1, channels=(16, 16), attention_head_dim=8, num_heads=2, num_mid_blocks=1,
            n_timesteps=2,
        ),
        hift=replace(mini.hift, base_channels=16, f0_channels=16),
        confidence=ConfidenceConfig(),  # random weights are never sure: they would hear everything again
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_text():
    """A text tokenizer that has read a few lines."""
    from aqaa.tokenizers.text import TextTokenizer

    return TextTokenizer.train(SENTENCES, n_text=128)


@pytest.fixture(scope="session")
def tiny(tiny_text):
    """An AQAA of random weights; its answers are noise, but whole and well formed."""
    import torch

    from aqaa.pipeline import AQAA
    from aqaa.weights import model_folder

    config = tiny_config()
    parts = {"text": tiny_text}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name in model_folder.PARTS:
            parts[name] = model_folder.build(name, config).eval()
        for codebook in (parts["linguistic"].centroids, parts["semantic"].quantizer._codebook.embed):
            codebook.normal_()
    return AQAA(config, parts.__getitem__)


@pytest.fixture(scope="session")
def tiny_folder(tiny, tmp_path_factory):
    """The same on disk, as `aqaa.load` reads it. Copy it before breaking it."""
    from aqaa.weights import model_folder

    folder = tmp_path_factory.mktemp("weights") / "tiny"
    model_folder.save(tiny, folder)
    return folder


@pytest.fixture
def copy(tiny_folder, tmp_path):
    """A folder of weights that a test may break."""
    return shutil.copytree(tiny_folder, tmp_path / "copy")


@contextmanager
def fails(*words, error=ModelError):
    """Within it an error is raised whose message is one sentence that holds all the words."""
    with pytest.raises(error) as fault:
        yield
    text = str(fault.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 500, text
    assert all(word in text for word in words), text


def sharp_step1(gain, seed=0, double=False, **sizes):
    """A Step1ForCausalLM whose random matrices are `gain` times the usual ones, so that mistakes show."""
    import torch

    from aqaa.backbone.step1 import Step1Config, Step1ForCausalLM

    torch.manual_seed(seed)
    model = Step1ForCausalLM(Step1Config(**sizes)).eval()
    model = model.double() if double else model
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(gain if weight.dim() == 2 else 1)
    return model


def tone(seconds=0.6, rate=RATE, pitch=150.0):
    """A buzzing vowel-like sound: (N,) float32."""
    time = np.arange(int(seconds * rate)) / rate
    wave = sum(np.sin(2 * np.pi * pitch * k * time) / k for k in range(1, 20))
    return (0.2 * wave * (1 + 0.5 * np.sin(2 * np.pi * 3 * time))).astype(np.float32)


@pytest.fixture
def question(tmp_path):
    """Path of a question that can be read."""
    path = tmp_path / "question.wav"
    soundfile.write(path, tone(), RATE)
    return path
