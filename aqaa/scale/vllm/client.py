"""vLLM in place of our own backbone: ids in, ids out, under the layout's rules, from a server or in this process.

vLLM pins a torch of its own, so it lives in another environment, where this package is installed without its
dependencies (`pip install --no-deps`); `serve_command` gives the line that starts it there. Its tokenizer is never
used: transformers 5 rebuilds Step-1's wrongly. The rules travel with each request and are kept to by
vllm_plugin.Layouts; ids that come back are checked here as well, since a server without the plug-in answers too.
"""

import asyncio
import io
import json
import shlex
import threading
import time
import uuid
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from importlib import metadata
from math import inf
from pathlib import Path

from aqaa.backbone.generation import Step, check_sampling, room_for
from aqaa.files import parse_json, read_json, server_address
from aqaa.scale.plan import Setup, check_ranks
from aqaa.scale.plan_table import parse_gpus, read_model
from aqaa.scale.vllm.rules import KEY, Rules
from aqaa.weights import verify

TESTED = "0.33.0"  # the vLLM whose classes and flags this was written against
PROCESSOR = "aqaa.scale.vllm.plugin:Layouts"
MODEL_CLASS = "Step1AQAAForCausalLM"  # ours: takes the language model out of AQAA's checkpoint
ATTENTION = "TRITON_ATTN"  # the one backend with square-root ALiBi; automatic choice does not look for it
FORMATS = {"bf16": None, "fp8": "fp8_per_channel", "int8": "int8_per_channel_weight_only"}  # made while loading
PACKED = ("compressed-tensors", "gptq", "awq")  # 4-bit checkpoints that vLLM reads
ANSWER_TIME, CONNECT_TIME = 120.0, 10.0  # s without an id, or until a server says what it serves
TOTAL_TIME = 900.0  # s of a whole answer
REPLY_BYTES = 4_000_000  # of a line or a body: the first chunk repeats the prompt, up to 32,768 ids
EMPTY_LINES = 1000  # in a row, without an id among them
LIKELIEST = 1e-3  # log-probability that rounding may leave above 0
SHOWN = 200  # characters of what a server says that are passed on


class EngineError(OSError):
    """An engine that is not there, was lost, or says what it should not; its one sentence tells which."""


class Engine:
    """What AQAA.engine may be. Subclasses draw ids: _draw(prompt, settings, rules) yields (id, logprob)."""

    name = "the engine"
    limit = None  # ids of the longest prompt and its answer

    def generate(
        self, prompt, ids, layout, *, temperature=0.7, top_p=0.9, seed=0, max_tokens=1024, repetition=None, min_audio=0,
        prefill=None,
    ):  # fmt: skip
        """Steps, as backbone.generation.generate gives them; prefill is not needed: the engine keeps prefixes itself.

        logprob is taken over the engine's whole vocabulary, so it is a little lower than ours. Raises ValueError for
        settings out of range or a prompt too long, and EngineError.
        """
        check_sampling(temperature, top_p, max_tokens)
        n_prompt = len(prompt)
        left = room_for(self.limit or n_prompt + max_tokens + 1, n_prompt, max_tokens)
        settings = {
            "temperature": float(temperature), "top_p": float(top_p), "top_k": 0, "seed": int(seed), "logprobs": 0,
            "max_tokens": left, "stop_token_ids": [ids.eot],
        }  # fmt: skip
        rules, machine = Rules.of(layout, ids, min_audio, repetition), layout.machine(ids, min_audio)
        return self._follow([int(i) for i in prompt], settings, rules, machine)

    def _follow(self, prompt, settings, rules, machine):
        count, left = 0, settings["max_tokens"]
        if not left or machine.finished:
            return
        for token, logprob in self._draw(prompt, settings, rules):
            if type(token) is not int or type(logprob) not in (int, float) or not -inf < logprob <= LIKELIEST:
                raise EngineError(f"{self.name} sent id {verify.shown(token)} with the log-probability "
                                  f"{verify.shown(logprob)}: both must be numbers, as vLLM {TESTED} sends them.")
            may, count = machine.allowed(), count + 1
            if not (may.start <= token < may.stop or token in may.markers):
                raise EngineError(
                    f"{self.name} sent id {token} where the layout allows {may.kind} {may.start}..{may.stop - 1} or "
                    f"{may.markers}: it lacks aqaa's plug-in (--logits-processors {PROCESSOR}), or its model has "
                    "other ids."
                )
            machine.advance(token)
            yield Step(token, "marker" if token in may.markers else may.kind, logprob)
            if machine.finished:
                return
        if count < left:
            raise EngineError(f"{self.name} ended the answer after {count} ids, in the middle: ask it again.")


# ---- over HTTP ------------------------------------------------------------------------------------------------------


class _Timed(io.RawIOBase):
    """What a socket receives, until time.monotonic() is `end`: a byte now and then never lets a socket time out."""

    def __init__(self, sock, end):
        self.sock, self.end, self.raw = sock, end, sock.makefile("rb", buffering=0)

    def makefile(self, _):  # as HTTPResponse asks for what it reads from
        return io.BufferedReader(self)

    def readable(self):
        return True

    def readinto(self, buffer):
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.sock.settimeout(left)
        return self.raw.readinto(buffer)

    def close(self):
        self.raw.close()
        super().close()


class Server(Engine):
    """A running `vllm serve`, by its OpenAI-style completions with token ids. Raises EngineError if none answers.

    connect_time: s in which it must say what it serves; answer_time: the longest wait for the next id; total_time: for
    a whole answer.
    """

    def __init__(self, url, *, answer_time=ANSWER_TIME, connect_time=CONNECT_TIME, total_time=TOTAL_TIME):
        parts = server_address(url)
        self.kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self.place, self.path = parts.netloc.rpartition("@")[2], parts.path.rstrip("/").removesuffix("/v1")
        self.name = f"the server at {parts.scheme}://{self.place}{self.path}"
        self.answer_time, self.connect_time, self.total_time = answer_time, connect_time, total_time
        with self._ask("GET", "/v1/models", connect_time) as (reply, _):
            try:
                data = reply.read(REPLY_BYTES)
            except (OSError, HTTPException) as fault:
                raise EngineError(f"{self.name} does not answer ({_reason(fault)}): is it running there?") from None
        served = _json(data, self.name)
        try:
            self.model, self.limit = served["data"][0]["id"], served["data"][0].get("max_model_len")
            usable = type(self.model) is str and (self.limit is None or type(self.limit) is int and self.limit > 0)
        except (LookupError, TypeError, AttributeError):
            usable = False
        if not usable:
            raise EngineError(f"{self.name} serves no model as vLLM does: is it a `vllm serve`?")

    @contextmanager
    def _ask(self, method, path, patience, body=None):
        """(reply to a request, its clock), open for the block: the server stops working when it is left.

        Raises EngineError, also if the head of the reply is not there within `patience` seconds.
        """
        connection, header = self.kind(self.place, timeout=self.connect_time), {"Content-Type": "application/json"}
        with closing(connection):
            try:
                connection.connect()
                connection.sock.settimeout(patience)
                clock = _Timed(connection.sock, time.monotonic() + patience)
                connection.response_class = lambda _, **options: HTTPResponse(clock, **options)
                connection.request(method, self.path + path, body and json.dumps(body), header)
                reply = connection.getresponse()
                refusal = None if reply.status == 200 else _message(reply.read(REPLY_BYTES))
            except (OSError, HTTPException) as fault:
                raise EngineError(f"{self.name} does not answer ({_reason(fault)}): is it running there?") from None
            if 300 <= reply.status < 400:
                refusal = "it sends us elsewhere, where nobody is asked; give the address itself"
            if refusal is not None:
                raise EngineError(f"{self.name} refuses ({reply.status}): {refusal}.")
            with reply:
                yield reply, clock

    def _draw(self, prompt, settings, rules):
        body = {
            **settings, "model": self.model, "prompt": prompt, "stream": True, "add_special_tokens": False,
            "return_token_ids": True, "return_tokens_as_token_ids": True, "vllm_xargs": {KEY: rules.to_json()},
        }  # fmt: skip
        end = time.monotonic() + self.total_time
        with self._ask("POST", "/v1/completions", min(self.answer_time, self.total_time), body) as (reply, clock):
            count = empty = 0
            clock.end = min(end, time.monotonic() + self.answer_time)
            while True:
                try:
                    line, reason = reply.readline(REPLY_BYTES), "the connection ended"
                except (OSError, HTTPException) as fault:
                    line, reason = b"", _reason(fault)
                if not line:
                    raise EngineError(f"{self.name} was lost after {count} ids of the answer ({reason}): ask it again.")
                if len(line) >= REPLY_BYTES or empty > EMPTY_LINES:
                    what = f"{empty:,} lines without an id" if empty > EMPTY_LINES else "a line without an end"
                    raise EngineError(f"{self.name} sent {what} after {count} ids: something else answers there.")
                empty += 1
                if not (data := _event(line, self.name)):
                    continue
                if data == b"[DONE]":
                    return
                for pair in _tokens(_json(data, self.name), self.name):
                    count, empty = count + 1, 0
                    yield pair
                    clock.end = min(end, time.monotonic() + self.answer_time)  # after what the caller took its time for


def _event(line, name):
    """The data of a line of server-sent events; nothing for a blank line or a comment. Raises EngineError."""
    field, _, data = line.strip().partition(b":")
    if field not in (b"", b"data"):
        raise EngineError(f"{name} sent {line[:60]!r} in place of an event: something else answers there.")
    return data.strip() if field else b""


def _tokens(chunk, name):
    """(id, logprob) pairs of one chunk of a completion. Raises EngineError."""
    if not isinstance(chunk, dict) or "error" in chunk:
        raise EngineError(f"{name} gave up: {_message(chunk)}.")
    try:
        lists = [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in chunk.get("choices") or ()]
        whole = all(type(ids) is type(logprobs) is list and len(ids) == len(logprobs) for ids, logprobs in lists)
    except (LookupError, TypeError):
        whole = False
    if not whole:
        raise EngineError(f"{name} sends no token ids with their logprobs: vLLM {TESTED} does.")
    for ids, logprobs in lists:
        yield from zip(ids, logprobs, strict=True)


def _json(data, name):
    try:
        return parse_json(data)
    except ValueError:
        raise EngineError(f"{name} sent {data[:60]!r}, which is no JSON: something else answers there.") from None


def _message(body):
    """What an error says, as bytes or as read from JSON: vLLM's message, or the beginning of whatever it is."""
    try:
        fault = parse_json(body) if isinstance(body, bytes) else body
        fault = fault.get("error", fault)
        said = str(fault["message"] if "message" in fault else fault["detail"])
    except (ValueError, LookupError, TypeError, AttributeError):
        said = body[:SHOWN].decode("utf-8", "replace") if isinstance(body, bytes) else verify.shown(body)
    return _harmless(said).strip(" .") or "without a reason"


def _harmless(text):
    """A line of it without what a terminal would obey (escapes, bells, letters that turn the direction)."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:SHOWN]).split())


def _reason(fault):
    return "no word in time" if isinstance(fault, TimeoutError) else _harmless(str(fault)) or type(fault).__name__


# ---- in this process ------------------------------------------------------------------------------------------------


def version():
    """The version of vLLM that is installed here. Raises EngineError if there is none."""
    try:
        return metadata.version("vllm")
    except metadata.PackageNotFoundError:
        raise EngineError(
            "vLLM is not installed in this environment: it has one of its own, so start it there and give --engine URL."
        ) from None


class InProcess(Engine):
    """vLLM's asynchronous engine beside us, in an environment that has both.

    folder: a language model; options: of AsyncEngineArgs. Raises EngineError if vLLM is missing.
    """

    name = "vLLM"

    def __init__(self, folder, *, answer_time=ANSWER_TIME, **options):
        found = version()
        try:
            from vllm import SamplingParams
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.sampling_params import RequestOutputKind
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as fault:
            raise EngineError(f"vLLM {found} lacks what {TESTED} has ({fault}): install that version.") from None
        wanted = {"hf_overrides": {"tie_word_embeddings": False}, "attention_backend": ATTENTION,
                  "logits_processors": [PROCESSOR], "skip_tokenizer_init": True}  # fmt: skip
        self.params = lambda **given: SamplingParams(detokenize=False, output_kind=RequestOutputKind.DELTA, **given)
        self.loop, self.answer_time = asyncio.new_event_loop(), answer_time
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

        async def start():
            return AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(folder), **{**wanted, **options}))

        self.engine = asyncio.run_coroutine_threadsafe(start(), self.loop).result()
        self.limit = self.engine.model_config.max_model_len

    def _draw(self, prompt, settings, rules):
        params = self.params(**settings, extra_args={KEY: rules.to_json()})
        outputs = self.engine.generate({"prompt_token_ids": prompt}, params, uuid.uuid4().hex)
        try:
            while (output := self._wait(anext(outputs, None))) is not None:
                for token, logprobs in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True):
                    yield token, logprobs[token].logprob
        finally:
            self._wait(outputs.aclose())

    def _wait(self, step):
        async def run():
            return await step

        try:
            return asyncio.run_coroutine_threadsafe(run(), self.loop).result(self.answer_time)
        except Exception as fault:  # the engine has died, or refuses the request
            raise EngineError(f"vLLM failed ({_reason(fault)}): try again, or start it anew.") from fault


# ---- starting one ---------------------------------------------------------------------------------------------------


def serve_command(folder, gpus=1, weights="bf16", *, port=8000, max_len=8192):
    """The line that serves a released language model, to be run in vLLM's own environment.

    weights: bf16, fp8, int8 (made while loading) or int4 (the folder must be so). Raises ValueError for what vLLM
    cannot do: heads or 4-bit groups that the GPUs cannot share, or a folder of another format.
    """
    name, backbone, ours = read_model(str(folder))
    if name in ("130b", "3b", "mini") and str(folder) == name or ours:
        what = f"{folder} is in aqaa's own format" if ours else f"{folder!r} is no folder"
        raise ValueError(f"{what}: name that of a released language model, 16 bits or packed ({', '.join(PACKED)}).")
    config = read_json(Path(folder) / "config.json")
    if "backbone" in config:
        raise ValueError(f"{folder} is a whole system of aqaa: save its backbone alone, with save_pretrained.")
    group = _group(config, folder) if weights == "int4" else None
    if weights not in (*FORMATS, "int4"):
        raise ValueError(f"weights cannot be {weights!r} in vLLM: choose bf16, fp8, int8 or int4.")
    check_ranks(Setup(name, backbone, parse_gpus("H100-80")[0], gpus, weights, group))
    overrides = {"tie_word_embeddings": False}  # vLLM ties what does not say so, and loses lm_head
    if config.get("model_type") != "step1":
        overrides["architectures"] = [MODEL_CLASS]
    flags = {
        "port": port, "tensor-parallel-size": gpus, "dtype": "bfloat16", "quantization": FORMATS.get(weights),
        "max-model-len": min(max_len, backbone.max_seq_len), "attention-backend": ATTENTION,
        "hf-overrides": json.dumps(overrides), "generation-config": "vllm", "logits-processors": PROCESSOR,
    }  # fmt: skip
    words = [word for flag, value in flags.items() if value is not None for word in (f"--{flag}", str(value))]
    return shlex.join(["vllm", "serve", str(folder), *words, "--skip-tokenizer-init"])


def _group(config, folder):
    """The group size of a 4-bit checkpoint. Raises ValueError if it is none that vLLM reads."""
    packed = config.get("quantization_config")
    packed = packed if isinstance(packed, dict) else {}
    if packed.get("quant_method") not in PACKED:
        raise ValueError(f"{folder} is not a 4-bit checkpoint ({', '.join(PACKED)}): vLLM makes fp8 and int8 itself.")
    try:
        groups = packed.get("config_groups") or {}
        found = [part["weights"]["group_size"] for part in groups.values() if part.get("weights")]
        size = found[0] if found else packed.get("group_size")
        return size if size and size > 0 else None  # -1: a scale for each output
    except (LookupError, TypeError, AttributeError):
        raise ValueError(f"{folder} does not say how its weights are packed: get its config.json again.") from None
