import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from aqaa.backbone import attention
from aqaa.backbone.layers import Step1RMSNorm
from aqaa.backbone.step1 import Step1Config, build
from aqaa.config import AQAAConfig, preset
from aqaa.fast import norms, prepare_training
from tests.conftest import sharp_step1

SIZES = {
    "vocab_size": 60, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_attention_groups": 2, "max_seq_len": 128,
}  # fmt: skip


def tiny(seed=0, **options):
    return sharp_step1(4, seed, **SIZES, **options)


def tokens(batch, length, seed=1):
    return torch.randint(5, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(a, b, limit=1e-4):
    assert (a - b).abs().max() < limit


def test_slopes():
    assert attention.slopes(8).tolist() == [2.0**-k for k in range(1, 9)]
    for heads, n, last in ((96, 64, 0.065267), (48, 32, 0.068157), (6, 4, 2.0**-3)):
        found = attention.slopes(heads)
        assert len(found) == heads and torch.equal(found[:n], attention.slopes(n))  # the further ones stay behind
        assert found[-1].item() == pytest.approx(last, rel=1e-4)


def test_bias_falls_with_the_root_of_the_distance():
    bias = attention.sqrt_bias(attention.slopes(4), 3, 7, first=4)
    assert bias.shape == (1, 4, 3, 7) and bias.dtype == torch.float32
    assert bias[0, 0, 0, :5].tolist() == pytest.approx([-0.25 * d**0.5 for d in (4, 3, 2, 1, 0)])
    assert (bias[0, 0, 0, 5:] == -torch.inf).all()


def test_a_head_without_slope_sees_all_of_the_past_alike():
    bias = attention.sqrt_bias(torch.tensor([0.0, 1.0]), 3, 4, first=1)[0, 0]
    assert torch.equal(bias == 0, torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).bool())
    assert (bias[bias != 0] == -torch.inf).all()


def test_parameter_count_of_the_published_model():
    full = AQAAConfig().backbone
    with torch.device("meta"):
        models = [build(replace(full, num_hidden_layers=n)) for n in (1, 2)]
    one, two = (sum(p.numel() for p in model.parameters()) for model in models)
    assert one + 87 * (two - one) == 131_946_590_208


def test_eager_and_fused_attention_agree_and_show_weights():
    ids, fused, plain = tokens(2, 30), tiny(attn_implementation="sdpa"), tiny(attn_implementation="eager")
    out = plain(ids, output_attentions=True, output_hidden_states=True)
    close(fused(ids).logits, out.logits)
    assert len(out.hidden_states) == 3 and out.attentions[0].shape == (2, 6, 30, 30)
    close(out.attentions[1].sum(-1), torch.ones(2, 6, 30))
    assert out.attentions[0].triu(1).abs().max() == 0


@pytest.mark.parametrize("training", [False, True])
def test_examples_packed_in_a_row_do_not_see_each_other(training):
    model = tiny().train(training)
    parts = [tokens(1, n, seed=n) for n in (5, 11, 8, 13)]
    pad = torch.zeros(1, 6, dtype=torch.long)
    rows = torch.cat([torch.cat([*parts[:2], pad], 1), torch.cat([*parts[2:], pad[:, :1]], 1)])
    segment_ids = torch.tensor([[1] * 5 + [2] * 11 + [0] * 6, [1] * 8 + [2] * 13 + [0]])
    got = model(rows, segment_ids=segment_ids).logits
    want = torch.cat([model.eval()(part).logits[0] for part in parts])
    close(got[segment_ids > 0], want)
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    close(model(rows, attention_mask=same).logits[segment_ids > 0], want)


def test_gradients_of_the_training_path_are_those_of_the_plain_one():
    ids = tokens(2, 24)
    grads = []
    for training in (True, False):
        model = tiny().train(training)
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        close(a, b, 1e-4 * (1 + b.abs().max()))


def test_the_norm_of_training_has_the_same_value_and_gradients():
    torch.manual_seed(0)
    x, norm, seed = torch.randn(3, 5, 16), Step1RMSNorm(16, 1e-5), torch.randn(3, 5, 16).bfloat16()
    torch.nn.init.normal_(norm.weight)
    found = []
    assert type(prepare_training(norm)) is norms.TrainNorm
    for training in (True, False):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=training):
            out = norm(leaf)
        assert out.dtype == (torch.bfloat16 if training else torch.float32)
        out.bfloat16().backward(seed)
        found.append((out, leaf.grad, norm.weight.grad))
        norm.weight.grad = None
    assert torch.equal(found[0][0], found[1][0].bfloat16())
    close(found[0][1], found[1][1])
    close(found[0][2], found[1][2])


def test_trains_in_bf16():
    model, ids = tiny().train(), tokens(2, 16)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(30):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


@torch.no_grad()
def test_logits_only_where_asked():
    model, ids = tiny(), tokens(2, 10)
    hidden = model.model(ids).last_hidden_state
    full = model(ids).logits
    chosen = torch.rand(2, 10, generator=torch.Generator().manual_seed(0)) < 0.4
    close(model.logits(hidden), full)
    close(model.logits(hidden, chosen, slice(20, 35)), full[chosen][:, 20:35])
    close(model.logits(hidden, torch.tensor([3, 12])), full.flatten(0, 1)[[3, 12]])
    close(model.logits(hidden[:, -1], rows=torch.tensor([3, 34])), full[:, -1, [3, 34]])


def test_saved_with_official_keys_and_read_without_remote_code(tmp_path):
    model, ids = tiny(), tokens(1, 6)
    model.save_pretrained(tmp_path)
    wanted = {"lm_head.weight", "model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight"}
    assert wanted <= set(model.state_dict())
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    del config["tie_word_embeddings"]  # as in the published file
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.lm_head.weight is not again.model.embed_tokens.weight
    assert AutoConfig.from_pretrained(tmp_path).num_key_value_heads == 2


def test_impossible_sizes_and_inputs_are_refused():
    with pytest.raises(Exception, match="must divide hidden_size"):
        Step1Config(**{**SIZES, "hidden_size": 50})
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        tiny()()


def test_mini_preset_builds():
    model = build(preset("mini").backbone)
    assert 4e6 < sum(p.numel() for p in model.parameters()) < 8e6
    assert model.config.bos_token_id == 1 and model.config.eos_token_id == 3
