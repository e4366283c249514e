"""The tokenizers and the flow's decoder beside the packages they come from, at full size with random weights."""

import pytest
import torch
import torch.nn.functional as F

from aqaa.config import preset
from aqaa.evaluation import peers
from aqaa.fast import prepared
from aqaa.weights import model_folder
from tests.conftest import RATE

HIDDEN = 3e-5  # what rounding makes of a hidden row, whatever the order of the work
MARGIN = 1e-4  # a code may differ where the second nearest entry is this close
SEED = 5


def needs(package):
    why = f"{package} is not installed: pip install 'aqaa[peers]'"
    return pytest.mark.skipif(not peers.installed(package), reason=why)


def build(name):
    torch.manual_seed(SEED)
    model = model_folder.build(name, preset("full")).eval().requires_grad_(False)
    for key, value in model.named_parameters():  # norms that do something
        if "norm" in key or "_ln." in key:
            value.add_(0.1 * torch.randn(value.shape))
    return model


def sound(n):
    envelope = F.interpolate(torch.rand(1, 1, 40), size=n, mode="linear")[0, 0]
    return envelope * (0.3 * torch.sin(torch.arange(n) * 0.05) + 0.1 * torch.randn(n))


def check(hidden, wanted, entries, codes, wanted_codes, scale=lambda rows: rows):
    """Hidden rows agree; codes do wherever the nearest entry is clearly the nearest to scale(row)."""
    assert hidden.shape == wanted.shape
    assert (hidden - wanted).abs().max() < HIDDEN
    nearest = torch.cdist(scale(wanted), entries).topk(2, largest=False).values
    clear = nearest[:, 1] - nearest[:, 0] > MARGIN
    assert clear.float().mean() > 0.9
    assert torch.equal(codes[clear], wanted_codes[clear])


@needs("funasr")
@pytest.mark.parametrize("seconds", [2.4, 5.13])  # whole chunks, and a tail
def test_linguistic_is_funasr(seconds):
    model, wav = build("linguistic"), sound(int(seconds * RATE))
    model.add_shift.uniform_(-12, -8)
    model.rescale.uniform_(0.1, 0.3)
    wanted, _ = peers.funasr(model)(wav)
    model.centroids.copy_(wanted.mean(0) + wanted.std(0) * torch.randn(1024, 512))
    wanted_codes = model.quantize(wanted)
    with torch.inference_mode():
        for ready in (model, prepared.prepare(model)):
            hidden = ready(ready.features(wav)[None])[0]
            check(hidden, wanted, ready.centroids, ready.encode(wav, energy_norm=False), wanted_codes)


@needs("s3tokenizer")
@pytest.mark.parametrize("seconds", [0.5, 11.77])
def test_semantic_is_s3tokenizer(seconds):
    model, wav = build("semantic"), sound(int(seconds * RATE))
    model.quantizer._codebook.embed.copy_(F.normalize(torch.randn(4096, 1280), dim=1))
    wanted, wanted_codes = peers.s3tokenizer(model)(wav)
    with torch.inference_mode():
        for ready in (model, prepared.prepare(model)):
            hidden, codes = ready.hidden(ready.features(wav)[None])[0][0], ready.encode(wav, energy_norm=False)
            check(hidden, wanted, ready.quantizer._codebook.embed, codes, wanted_codes, F.normalize)


@needs("matcha-tts")
def test_the_estimator_is_matcha():
    flow, frames = build("flow"), 62  # matcha takes even numbers only
    noise, mu, cond = torch.randn(3, 1, 80, frames)
    told = mu, torch.randn(1, 80), cond
    wanted = peers.matcha(flow)(noise, None, *told, 3, 0.7)
    with torch.inference_mode():
        for ready in (flow, prepared.prepare(flow)):
            assert (ready.decoder(noise, None, *told, 3, 0.7) - wanted).abs().max() < HIDDEN
