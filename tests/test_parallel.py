"""Two processes are one model: tensor parallelism over gloo on the CPU, and the sums of what goes where."""

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aqaa.backbone.generation import generate
from aqaa.backbone.quantized_linear import Fp8Linear, Int4Linear
from aqaa.backbone.step1 import Step1Config, Step1ForCausalLM
from aqaa.config import BackboneConfig, IdsConfig
from aqaa.files import ModelError
from aqaa.scale import parallel
from aqaa.scale.quantize import quantize_
from aqaa.tokenizers.dialogue import LAYOUTS
from tests.conftest import sharp_step1

IDS = IdsConfig(n_text=100, n_linguistic=20, n_semantic=30)
LAYOUT = LAYOUTS["ratio_10_15"]
PROMPT = torch.randint(68, IDS.end, (21,), generator=torch.Generator().manual_seed(0)).tolist()
GROUP = 32


def model():
    """96 heads over 8 groups, as in the published model, of width 8."""
    return sharp_step1(
        3, vocab_size=IDS.end, hidden_size=768, intermediate_size=128, num_hidden_layers=2, num_attention_heads=96,
        num_attention_groups=8, max_seq_len=100,
    )  # fmt: skip


def greedy(model, ids):
    return model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[0].tolist()


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def test_two_processes_equal_one(tmp_path):
    whole, ids = model(), torch.tensor([PROMPT])
    whole.save_pretrained(tmp_path)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.two_processes", str(tmp_path)]
    root = Path(__file__).resolve().parent.parent
    started = [
        subprocess.Popen(
            command, cwd=root, env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(errors)
    found = torch.load(tmp_path / "found.pt")
    quantised = quantize_(copy.deepcopy(whole), "int4", GROUP)
    with torch.inference_mode():
        answers = {"transformers": greedy(whole, ids)}
        for name, one in (("ours", whole), ("int4", quantised)):
            answers[name] = [step.id for step in generate(one, PROMPT, IDS, LAYOUT, temperature=0.0, max_tokens=20)]
        for name, (logits, answer) in found.items():
            wanted = (quantised if name == "int4" else whole)(ids).logits
            assert wanted.std() > 0.5 and (logits - wanted).abs().max() < 1e-4, name
            assert answer == answers[name], name


@pytest.mark.parametrize("ranks", [2, 4])
def test_shares_of_a_layer_make_up_the_whole(ranks):
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    plain = torch.nn.Linear(256, 64, bias=False)
    with torch.inference_mode():
        for layer in (plain, Int4Linear.from_linear(plain, 64), Fp8Linear.from_linear(plain)):
            by_output = torch.cat([parallel.cut(layer, 0, rank, ranks)(x) for rank in range(ranks)], 1)
            parts = [parallel.cut(layer, 1, rank, ranks)(part) for rank, part in enumerate(x.chunk(ranks, 1))]
            assert (by_output - layer(x)).abs().max() < 1e-5 and (sum(parts) - layer(x)).abs().max() < 1e-5


def test_a_model_is_cut_before_it_has_weights():
    from aqaa.backbone.quantized_linear import empty_linears

    with torch.device("meta"):
        whole = model()
    parallel.shard(empty_linears(whole, "int4", GROUP), 1, 2)
    sizes = {name: tuple(part.qweight.shape) for name, part in whole.model.layers[1].named_modules() if "_" in name
             and hasattr(part, "qweight")}  # fmt: skip
    assert sizes["self_attn.q_proj"] == (384, 384) and sizes["self_attn.k_proj"] == (32, 384)
    assert sizes["self_attn.o_proj"] == (768, 192) and sizes["mlp.down_proj"] == (768, 32)


def test_what_does_not_divide_is_refused():
    full = BackboneConfig()
    parallel.check(full, 4, 128)
    parallel.check(full, 8, 64)
    with pytest.raises(ValueError, match="groups of 128 do not divide down_proj of 31232.*8 GPUs.*64"):
        parallel.check(full, 8, 128)
    with pytest.raises(ValueError, match="3 GPUs cannot share 96 attention heads"):
        parallel.check(full, 3)
    with pytest.raises(ValueError, match="groups of 32 do not divide"):
        parallel.shard(quantize_(model(), "int4", GROUP), 0, 8)


def test_gpus_of_several_kinds_and_lonely_processes_are_refused(monkeypatch):
    parallel.check_alike(["NVIDIA H200"] * 4)
    with pytest.raises(ModelError, match="needs GPUs of one kind, here are A100 and NVIDIA H200"):
        parallel.check_alike(["NVIDIA H200", "A100"])
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ModelError, match="torchrun"):
        parallel.join()
    monkeypatch.setenv("RANK", "0")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="process 0 has no GPU"):
            parallel.join()


def test_layers_one_gpu_after_another():
    full = BackboneConfig()
    where = parallel.place(full, [78, 78, 78, 78])  # bf16
    with torch.device("meta"):
        names = dict(Step1ForCausalLM(Step1Config(num_hidden_layers=88)).named_parameters())
    assert all(sum(name.startswith(f"{part}.") for part in where) == 1 for name in names)
    gpus = [where[f"model.layers.{i}"] for i in range(88)]
    assert gpus == sorted(gpus) and set(gpus) == {0, 1, 2, 3} and where["lm_head"] == 3
    uneven = parallel.place(full, [139, 78, 78])
    assert [list(uneven.values()).count(i) for i in range(3)][0] > 40
    assert set(parallel.place(full, [139], "int4", 128).values()) == {0}
    with pytest.raises(ModelError, match="bf16 weights and a context of 2048 ids need 2.. GiB on 3 GPUs, 234 GiB"):
        parallel.place(full, [78, 78, 78])
