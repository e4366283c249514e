"""The plain decoder and transformers' form of it: the same modules, and no transformers where nobody asks for it."""

import subprocess
import sys
from pathlib import Path

import torch

from aqaa.backbone.layers import PlainStep1
from aqaa.backbone.step1 import Step1ForCausalLM, from_plain
from aqaa.weights.model_folder import build
from tests.conftest import tiny_config

ROOT = Path(__file__).resolve().parent.parent


def plain(seed=0):
    torch.manual_seed(seed)
    return PlainStep1(tiny_config().backbone).eval()


def test_both_forms_are_the_same_modules():
    one = plain()
    other = from_plain(one)
    assert isinstance(other, Step1ForCausalLM) and not other.training and from_plain(other) is other
    assert other.state_dict().keys() == one.state_dict().keys() == build("backbone", tiny_config()).state_dict().keys()
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert mine is theirs
    assert other.model.layers is one.model.layers and from_plain(one.train()).training


def test_both_forms_compute_the_same():
    one = plain()
    ids = torch.arange(20, 35)[None]
    with torch.no_grad():
        hidden = one.model.run(one.model.embed_tokens(ids), one.model.bias(15, 15))
        assert torch.equal(one.logits(hidden), from_plain(one)(ids, use_cache=False).logits)


def test_what_is_changed_in_one_is_changed_in_the_other(tiny):
    one = plain()
    other = from_plain(one)
    other.set_attn_implementation("eager")
    assert one.model.layers[0].self_attn.config._attn_implementation == "eager"
    one.model.layers[1].mlp.down_proj = torch.nn.Identity()
    assert isinstance(other.model.layers[1].mlp.down_proj, torch.nn.Identity)


def test_gradients_through_checkpoints_are_the_same():
    ids, grads = torch.arange(20, 35)[None], []
    for checkpointing in (False, True):
        model = from_plain(plain()).train()
        if checkpointing:
            newer = hasattr(model, "activation_checkpointing_enable")  # the older name warns since transformers 5.2x
            getattr(model, f"{'activation' if newer else 'gradient'}_checkpointing_enable")()
            assert model.model.gradient_checkpointing
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append([x.grad for x in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_an_answer_needs_no_transformers():
    """It would take longer to import than all the rest; the language model becomes one of its models when asked for."""
    code = """
import sys, aqaa
model = aqaa.load("mini")
answer = model.ask("data/questions/sum_q001813.wav", max_tokens=40)
list(model.stream("data/questions/sum_q001813.wav", max_tokens=40))
heavy = {"transformers", "scipy", "torch._dynamo", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
again = model.backbone.generate  # now it is there
assert "transformers" in sys.modules and model.decoder is model.backbone
assert model.ask("data/questions/sum_q001813.wav", max_tokens=40).tokens == answer.tokens
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_nor_does_the_command_line(tmp_path):
    """`-X importtime` names on stderr whatever a process imports."""
    command = [sys.executable, "-X", "importtime", "-m", "aqaa", "ask", "data/questions/sum_q001813.wav", "--json"]
    done = subprocess.run([*command, "-o", tmp_path / "a.wav"], capture_output=True, encoding="utf-8", cwd=ROOT)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and {"torch", "aqaa.backbone.layers", "soundfile"} <= imported
    assert not {"transformers", "scipy", "torch._dynamo", "matplotlib", "aqaa.backbone.step1"} & imported
