"""What training needs: sums against PEFT, autograd and torch's own optimizer, verdicts, the command."""

import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aqaa import cli
from aqaa.backbone import layers, step1
from aqaa.config import BackboneConfig, preset
from aqaa.scale import plan as sums
from aqaa.scale import plan_table as words
from aqaa.scale import plan_train as train

SMALL = BackboneConfig(vocab_size=200, hidden_size=96, intermediate_size=256, num_hidden_layers=3,
                       num_attention_heads=6, num_attention_groups=2)  # fmt: skip


def training(method, gpus="8xH100-80", backbone=None, rows=1, rank=16, **options):
    gpu, count = words.parse_gpus(gpus)
    return train.Training(method, sums.Setup("130b", backbone or BackboneConfig(), gpu, count, **options), rows, rank)


def test_what_learns_is_what_peft_makes():
    peft = pytest.importorskip("peft")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for backbone, rank in ((SMALL, 4), (preset("mini").backbone, 16)):
        with torch.device("meta"):
            model = step1.build(backbone)
            assert train.learning(backbone, "full", rank) == sum(p.numel() for p in model.parameters())
            adapted = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=names))
        learn = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert learn == train.learning(backbone, "lora", rank) == train.learning(backbone, "qlora", rank)


def test_moments_are_those_that_adam_keeps():
    model = step1.build(SMALL)  # fp32: what learns in mixed precision
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(20)[None], labels=torch.arange(20)[None]).loss.backward()
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    planned = train.parts(training("full", "1xH200", SMALL, context=64))
    assert sum(value.nbytes for value in kept) == planned["moments"]
    assert sum(p.nbytes for p in model.parameters()) == planned["weights"] == planned["gradients"]
    whole = train.parts(training("full", "1xH200", context=64))
    assert sum(whole[name] for name in ("weights", "gradients", "moments")) == 16 * 131_946_590_208


@pytest.mark.parametrize("rows, ids", [(1, 64), (2, 200)])
def test_what_a_layer_keeps_is_what_autograd_keeps(rows, ids):
    layer = layers.Step1DecoderLayer(SMALL, 0).bfloat16()
    stream = torch.randn(rows, ids, SMALL.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(rows, SMALL.num_attention_heads, ids, ids, dtype=torch.bfloat16)
    own = {weight.untyped_storage().data_ptr() for weight in [*layer.parameters(), bias]}
    kept = {}

    def keep(value):
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        out = layer(stream, bias)
    measured = sum(size for where, size in kept.items() if where not in own)
    planned, shared = train.inside_layer(SMALL, rows, ids)
    assert out.requires_grad and measured <= planned <= 1.5 * measured
    assert shared == 3 * bias.nbytes  # in fp32 and in bf16


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(train.METHODS)), st.integers(1, 8), st.integers(1, 12), st.integers(1, 4))
def test_more_nodes_never_need_more_and_more_rows_never_less(method, count, nodes, rows):
    one = training(method, f"{count}xH200", rows=rows, nodes=nodes)
    need = sum(train.parts(one).values())
    more = sum(train.parts(replace(one, setup=replace(one.setup, nodes=nodes + 1))).values())
    assert more <= need or count * nodes == 1  # one GPU alone gathers nothing
    assert sum(train.parts(replace(one, rows=rows + 1)).values()) > need
    assert train.ids_per_second(one) == pytest.approx(count * nodes * train.ids_per_second(training(method, "1xH200")))


def test_what_would_fit_does_and_one_node_less_does_not():
    asked = training("full", nodes=1)
    nodes = int(re.search(r"on (\d+) nodes", train.what_would_fit(asked))[1])
    fits = [train.to_dict(replace(asked, setup=replace(asked.setup, nodes=n)))["fits"] for n in (nodes - 1, nodes)]
    assert fits == [False, True] and 32 < 8 * nodes <= 40
    never = train.what_would_fit(training("qlora", "1xRTX-4090"))
    assert never == "no number of 1xRTX-4090 is enough for qlora: take fewer ids in a row."


def test_the_command(capsys):
    assert cli.main(["plan", "--train", "all"]) == 0
    said = capsys.readouterr().out
    assert said.count("8xH100-80") >= 4 and "qlora" in said and "was not measured" in said
    assert cli.main(["plan", "--train", "lora", "--gpus", "8xH100-80", "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert one["fits"] and one["rate"] is None and one["learn"] == train.learning(BackboneConfig(), "lora", 16)
    assert one["total"] == pytest.approx(sum(one["memory"].values()), abs=0.01)
    assert cli.main(["plan", "--train", "full", "--gpus", "8xH100-80"]) == 1
    assert capsys.readouterr().err == "aqaa: full on 5 nodes of 8xH100-80 would fit.\n"


@pytest.mark.parametrize("arguments, said", [
    (["--train", "half"], "full, lora, qlora"), (["--train", "lora", "--context", "9000000"], "the model takes 1 to"),
    (["--train", "full", "--gpus", "8xAbacus"], "unknown GPUs"), (["nowhere", "--train", "full"], "neither 130b"),
])  # fmt: skip
def test_bad_input_is_one_sentence(arguments, said, capsys):
    try:
        code = cli.main(["plan", *arguments])
    except SystemExit as usage:  # a word that the parser does not know
        code = usage.code
    err = capsys.readouterr().err
    assert code and said in err and "Traceback" not in err
