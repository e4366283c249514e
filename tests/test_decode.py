"""The decode engine: the same answers as the plain loop, its int4 step against the modules, memory said beforehand."""

import copy
import gc
import weakref

import pytest
import torch

import tests.interpreter  # noqa: F401  first: it sets the interpreter up
from aqaa import files, loading
from aqaa.backbone.generation import generate
from aqaa.backbone.memory import check_room
from aqaa.backbone.quantized_linear import Int4Linear, linears
from aqaa.backbone.step1 import Step1Config, Step1ForCausalLM
from aqaa.config import BackboneConfig
from aqaa.fast import graph_decoder, triton_kernels
from aqaa.fast.graph_decoder import Engine
from aqaa.tokenizers.dialogue import LAYOUTS

LAYOUT = LAYOUTS["ratio_10_15"]


@pytest.fixture(scope="module")
def mini():
    return loading.load("mini")


@pytest.fixture(scope="module")
def engine(mini):
    return Engine(mini.backbone, 700)


def prompt(mini, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sound = torch.randint(mini.ids.n_text, mini.ids.semantic_start, (length,), generator=generator)
    return mini.prompt(sound.tolist())


@pytest.mark.parametrize("options", [
    {"temperature": 0.0}, {"temperature": 0.3}, {"temperature": 1.0, "top_p": 0.95, "seed": 3},
])  # fmt: skip
def test_answers_are_those_of_the_plain_loop(mini, engine, options):
    for length in (40, 15, 90):
        ids, options = prompt(mini, length, length), {"max_tokens": 60, **options}
        wanted = list(generate(mini.backbone, ids, mini.ids, LAYOUT, **options))
        found = list(engine.generate(ids, mini.ids, LAYOUT, **options))
        assert [step[:2] for step in found] == [step[:2] for step in wanted]
        assert [step.logprob for step in found] == pytest.approx([step.logprob for step in wanted], abs=1e-4)


def test_the_pipeline_takes_an_engine(mini, engine):
    question = prompt(mini, 40)[5:30]
    wanted = mini.ask(question, max_tokens=40)
    found = mini.ask(question, max_tokens=40, prefill=engine.reader())
    assert found.tokens == wanted.tokens and torch.equal(found.audio, wanted.audio)


def test_a_prompt_that_grows_is_read_once_and_a_new_one_afresh(mini, engine, monkeypatch):
    ids, rows, run, reader = prompt(mini, 50), [], engine.run, engine.reader()
    monkeypatch.setattr(engine, "run", lambda x: rows.extend([len(x)] * (len(x) > 1)) or run(x))
    options = {"max_tokens": 20, "temperature": 0.0}
    wanted = list(generate(mini.backbone, ids, mini.ids, LAYOUT, **options))
    reader.read(ids[:20])
    reader.read(ids[:40])
    found = list(generate(mini.backbone, ids, mini.ids, LAYOUT, prefill=reader, **options))
    assert rows == [20, 20, len(ids) - 40] and [s.id for s in found] == [s.id for s in wanted]
    rows.clear()
    again = [list(engine.generate(ids, mini.ids, LAYOUT, **options)) for _ in range(2)]
    assert again[0] == again[1] and rows == [len(ids)] * 2  # the same to the last bit


@torch.inference_mode()
def test_long_prompts_are_read_in_parts_of_about_one_size_and_room_is_kept(mini, engine, monkeypatch):
    rows, run = [], engine.run
    monkeypatch.setattr(graph_decoder, "CHUNK", 200)
    monkeypatch.setattr(engine, "run", lambda x: rows.append(len(x)) or run(x))
    ids = torch.tensor([prompt(mini, 500)])
    wanted = mini.backbone.model(ids).last_hidden_state[:, -1]
    engine.cache.length = 0
    assert (engine.feed(mini.backbone.model.embed_tokens(ids)) - wanted).abs().max() < 1e-3
    assert len(rows) == 3 and max(rows) - min(rows) <= 2
    with pytest.raises(ValueError, match="do not fit the 700 slots"):
        engine.feed(mini.backbone.model.embed_tokens(ids))
    with pytest.raises(ValueError, match="takes 1 to 699"):
        next(engine.generate(prompt(mini, 800), mini.ids, LAYOUT))
    assert len(list(engine.generate(prompt(mini, 660), mini.ids, LAYOUT, min_audio=600))) < 40


@pytest.fixture(scope="module")
def narrow():
    """int4 weights, 12 heads a group as in the published model; sharp enough that mistakes show."""
    torch.manual_seed(0)
    model = Step1ForCausalLM(Step1Config(
        vocab_size=90, hidden_size=384, intermediate_size=512, num_hidden_layers=2, num_attention_heads=24,
        num_attention_groups=2, max_seq_len=64,
    )).eval()  # fmt: skip
    for name, part in list(linears(model, skip=("lm_head",))):
        model.set_submodule(name, Int4Linear.from_weights(part.weight.detach() * 4, 64))
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.data.uniform_(0.5, 1.5)
    return model


@torch.inference_mode()
def test_the_step_of_ten_kernels_equals_the_modules(narrow, monkeypatch):
    monkeypatch.setattr(triton_kernels, "TILE", (128, 32, 1, 1))  # few large programs for the interpreter
    monkeypatch.setattr(triton_kernels, "SUMS", 1024)
    ids = torch.randint(90, (1, 6), generator=torch.Generator().manual_seed(1))
    embeddings = narrow.model.embed_tokens(ids)
    wanted = narrow.model(ids).last_hidden_state[0]
    for fast in (False, True):
        engine = Engine(copy.deepcopy(narrow), 20, fast=fast)
        assert (engine.step == engine.run) is not fast
        found = [engine.feed(part) for part in embeddings.split([4, 1, 1], 1)]
        assert (torch.cat(found) - wanted[3:]).abs().max() < 1e-3 * wanted.abs().max()


@torch.inference_mode()
def test_kernels_come_and_go_with_the_engine(narrow, monkeypatch):
    x = torch.randn(1, 384, generator=torch.Generator().manual_seed(0))
    layer = narrow.model.layers[0].self_attn.o_proj
    wanted, calls = layer(x), []
    Engine(narrow, 8, fast=True)
    multiply = triton_kernels.Rows.multiply
    monkeypatch.setattr(triton_kernels.Rows, "multiply", lambda *args: calls.append(1) or multiply(*args))
    assert (layer(x) - wanted).abs().max() < 1e-4 and calls == [1]
    Engine(narrow, 8, fast=False)
    assert torch.equal(layer(x), wanted) and calls == [1]


@pytest.mark.parametrize("fast", [False, True])
def test_an_engine_and_its_weights_go_with_the_last_name(narrow, fast):
    """At once, not when the garbage collector finds them: on a GPU there is no room for two."""
    model = copy.deepcopy(narrow)
    engine = Engine(model, 8, fast)
    alive = [weakref.ref(x) for x in (engine, engine.cache, model, model.model.layers[0].mlp.up_proj)]
    gc.disable()
    try:
        del engine
        assert [ref() is None for ref in alive] == [True, True, False, False]
        del model
        assert [ref() for ref in alive] == [None] * 4
    finally:
        gc.enable()


def test_too_little_memory_is_said_with_what_would_fit():
    full, gib = BackboneConfig(), 2**30
    check_room(full, 8192, 80 * gib, "int4", 128)
    with pytest.raises(files.ModelError, match="fp8 weights and a cache of 2048 ids need 12.*int4 would fit"):
        check_room(full, 2048, 80 * gib, "fp8")
    with pytest.raises(files.ModelError, match=r"30.0 GiB are free: see `aqaa plan`"):
        check_room(full, 2048, 30 * gib, "int4", 128)
    with pytest.raises(files.ModelError, match=r"a cache of 32768 ids needs 11.* a context of \d+ ids would fit"):
        check_room(full, 32_768, 9 * gib)
