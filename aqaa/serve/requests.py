"""/v1/audio/speech and /v1/chat/completions: a request is checked whole, then waits for the model.

Whatever is wrong with a request is a Fault, which `app` writes in the interface's shape."""

import asyncio
import io
import re
import textwrap
import time
import uuid
from collections import OrderedDict
from contextlib import aclosing

import torch

from aqaa import audio
from aqaa.config import AQTA, TQAA, TTS
from aqaa.files import parse_json
from aqaa.pipeline import SAMPLING
from aqaa.serve import sound
from aqaa.serve.worker import Reply, Waiting
from aqaa.tokenizers.dialogue import TextOnly, layout
from aqaa.tokenizers.text import normalise

MODEL = "aqaa"
LONGEST_TEXT = 4096  # letters of a text to be spoken
LONGEST_WRITTEN = 200  # ids of an answer without sound, where a request says nothing else
LONGEST_SENTENCE = 200  # letters that one answer can hold
REMEMBERED = 1000  # answers that a later request may name by their id
SENTENCE = re.compile(r"(?<=[.!?;])\s+")
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
NUMBERS = {  # field: the option of `generate`, its kind, least, most
    "temperature": ("temperature", float, 0, 2), "top_p": ("top_p", float, 1e-3, 1),
    "seed": ("seed", int, 0, 2**63 - 1), "max_tokens": ("max_tokens", int, 1, 1500),
    "max_completion_tokens": ("max_tokens", int, 1, 1500),
}  # fmt: skip


class Fault(ValueError):
    """A request that cannot be answered: one sentence, and where it is wrong."""

    def __init__(self, message, param=None, code=None, status=400):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status

    @property
    def body(self):
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"message": str(self), "type": kind, "param": self.param, "code": self.code}


def fault_of(error):
    if isinstance(error, Fault):
        return error
    if isinstance(error, ValueError):  # ours: one sentence on what was sent
        return Fault(" ".join(str(error).split())[:500])
    return Fault(f"the server could not answer ({type(error).__name__}): try again.", status=500)


def object_of(text, what):
    """The object of JSON in str, or in bytes of UTF-8, that a client sent. Raises Fault."""
    try:
        value = parse_json(text if isinstance(text, str) else text.decode("utf-8"))
    except ValueError as fault:
        raise Fault(f"{what} is no JSON ({fault}): send an object.") from None
    if not isinstance(value, dict):
        raise Fault(f"{what} is no object of JSON: send one.")
    return value


def take(body, name, kind, default=None, one_of=()):
    """A field of a request. Raises Fault."""
    value = body.get(name)
    if value is None:
        if default is None:
            raise Fault(f"{name} is missing: send it.", name, "missing_required_parameter")
        return default
    if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
        wanted = getattr(kind, "__name__", kind)  # a union has none
        raise Fault(f"{name} is not of the type {wanted}: send such a value.", name)
    if one_of and value not in one_of:
        raise Fault(f"{name} is {value!r}: choose one of {', '.join(one_of)}.", name)
    return value


def sampling(body):
    """The options of `generate` that a request names. Raises Fault."""
    chosen = {}
    for name, (option, kind, least, most) in NUMBERS.items():
        value = body.get(name)
        if value is None:
            continue
        numeric = isinstance(value, int | kind) and not isinstance(value, bool)
        if not numeric or not least <= value <= most:
            raise Fault(f"{name} is {value!r}: send a number from {least} to {most}.", name)
        chosen[option] = max(value, 1e-4) if option == "temperature" and value else value
    return chosen


# ---- /v1/audio/speech ----------------------------------------------------------------------------


def speech(model, body, sampling):
    """A request to speak a text -> (format, generator function of (n,) samples at sound.RATE)."""
    text = " ".join(take(body, "input", str).split())
    form = take(body, "response_format", str, "mp3", tuple(sound.FORMATS))
    take(body, "voice", str | dict, MODEL)  # there is one
    if body.get("speed") not in (None, 1, 1.0):
        raise Fault("this voice has one speed: leave `speed` out, or send 1.", "speed")
    if body.get("stream_format") not in (None, "audio"):
        raise Fault("only the stream_format `audio` is known: leave it out.", "stream_format")
    if not text or len(text) > LONGEST_TEXT:
        raise Fault(f"input has {len(text)} letters: send 1 to {LONGEST_TEXT}.", "input")
    pieces = [piece for sentence in SENTENCE.split(text) for piece in cut(sentence)]
    pieces = [words for piece in pieces if (words := plain(model, piece))]
    if not pieces:
        raise Fault("input holds no words: send some.", "input")

    def make():
        for piece in pieces:
            yield from spoken(model, piece, sampling)

    return form, make


def cut(sentence):
    """A sentence in pieces of LONGEST_SENTENCE letters at most, between words where there are."""
    return textwrap.wrap(sentence, LONGEST_SENTENCE, break_on_hyphens=False)


def spoken(model, text, sampling):
    """Samples at sound.RATE of a text that is read aloud, as they become ready."""
    words = model.text.encode(text, prefix=False, specials=False)
    talk = model.stream(words, marker=TTS, layout=layout("audio_only"), **sampling)
    yield from (wave for _, wave in resampled(model, talk))


def plain(model, text):
    """A text as the model learnt to read: the mini knows lower case and no punctuation."""
    return text if model.config.name == "full" else normalise(text)


def resampled(model, talk):
    """(text, samples at sound.RATE) of each Piece of a Talk."""
    rate = audio.Resampled(model.vocoder.sample_rate, sound.RATE)
    for piece in talk:
        yield piece.text, rate.push(piece.audio)
    yield "", rate.finish()


# ---- /v1/chat/completions ------------------------------------------------------------------------


class Chats:
    """What /v1/chat/completions knows: the model, and the words of the answers that it gave."""

    def __init__(self, model, worker, sampling):
        self.model, self.worker, self.sampling = model, worker, sampling
        self.said = OrderedDict()

    def asked(self, body):
        """A request, checked -> Asked. Raises Fault, AudioError."""
        messages = take(body, "messages", list)
        modalities = take(body, "modalities", list, ["text"])
        if body.get("n") not in (None, 1):
            raise Fault("one answer at a time is made: leave `n` out, or send 1.", "n")
        if not modalities or not set(map(str, modalities)) <= {"text", "audio"}:
            raise Fault("modalities holds `text`, or `text` and `audio`.", "modalities")
        stream, form = take(body, "stream", bool, False), None
        if "audio" in modalities:
            wanted = take(body, "audio", dict)
            form = take(wanted, "format", str, one_of=tuple(sound.FORMATS))
            if stream and form != "pcm16":
                raise Fault("streamed sound is pcm16: send that format.", "audio.format")
        turns = [self._turn(message, f"messages[{i}]") for i, message in enumerate(messages)]
        if not turns or turns[-1][0] != "user":
            raise Fault("the last message is not the user's: end with a question.", "messages")
        return Asked(turns, form, stream, {**self.sampling, **sampling(body)}, body)

    def _turn(self, message, place):
        """(role, parts): each part a text, (N,) samples at 16 kHz, or bytes of a picture."""
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise Fault(f"{place} has no role of {', '.join(ROLES)}.", place)
        content, heard = message.get("content"), message.get("audio")
        if isinstance(heard, dict) and heard.get("id"):
            if heard["id"] not in self.said:
                raise Fault(f"{place} names an answer that is not known: send its text.", place)
            content = self.said[heard["id"]]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        return ROLES[message["role"]], [self._part(part, place) for part in parts]

    def _part(self, part, place):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            return part["text"]
        if kind == "input_audio" and isinstance(part.get("input_audio"), dict):
            given = part["input_audio"]
            form = take(given, "format", str, one_of=("wav", "mp3", "flac", "opus", "pcm16"))
            return sound.question(sound.unpacked(given.get("data")), form)
        if kind == "image_url" and isinstance(part.get("image_url"), dict):
            head, _, data = str(part["image_url"].get("url")).partition(";base64,")
            if not head.startswith("data:image/"):  # nothing is fetched from elsewhere
                raise Fault(f"{place} has no picture in it: send a data:image/…;base64 URL.", place)
            return io.BytesIO(sound.unpacked(data, "picture"))
        raise Fault(f"{place} has no text, input_audio or image_url: send one of them.", place)

    def answer(self, asked):
        """A generator of (text, samples at sound.RATE), last a dict: transcript and usage."""
        model = self.model
        *before, (_, parts) = asked.turns
        history = [(role, " ".join(map(self._words, parts))) for role, parts in before]
        question, image = [], None
        written = not any(torch.is_tensor(part) for part in parts)
        for part in parts:
            if isinstance(part, io.BytesIO):  # the last one, if there are several
                image = model.look(part)
            elif isinstance(part, str):
                words = plain(model, part)
                question += model.text.encode(words, prefix=False, specials=False)
            else:
                question += model.listen((part, audio.SAMPLE_RATE))
        if not question:
            raise Fault("the question is empty: send sound or text.", "messages")
        most = LONGEST_WRITTEN if asked.form is None else SAMPLING["max_tokens"]
        options = {"max_tokens": most, **asked.sampling}
        if asked.form is None:
            marker = None if written else AQTA
            prompt = model.prompt(question, history, marker=marker, image=image)
            steps = list(model.generate(prompt, layout=TextOnly(), image=image, **options))
            ids = [step.id for step in steps if step.kind == "text"]
            text, n_ids = model.text.decode(ids).strip(), len(steps)
            yield text, torch.zeros(0)
        else:
            marker = TQAA if written else None
            talk = model.stream(question, history=history, marker=marker, image=image, **options)
            yield from resampled(model, talk)
            text, n_ids, prompt = talk.answer.text, len(talk.steps), talk.prompt
        n_prompt = len(prompt)
        yield {"transcript": text, "usage": {
            "prompt_tokens": n_prompt, "completion_tokens": n_ids, "total_tokens": n_prompt + n_ids,
        }, "finish_reason": "length" if n_ids >= options["max_tokens"] else "stop"}  # fmt: skip

    def _words(self, part):
        if isinstance(part, str):
            return plain(self.model, part)
        if isinstance(part, io.BytesIO):  # earlier turns are words
            return ""
        return self.model.transcribe((part, audio.SAMPLE_RATE))

    def remember(self, name, text):
        self.said[name] = text
        while len(self.said) > REMEMBERED:
            self.said.popitem(last=False)

    async def whole(self, asked):
        """The object chat.completion."""
        waves, end = [], None
        async for item in Reply(lambda: self.answer(asked)).items(self.worker):
            if isinstance(item, dict):
                end = item
            elif not isinstance(item, Waiting):
                waves.append(item[1])
        message = {"role": "assistant", "content": end["transcript"], "refusal": None}
        if asked.form:
            self.remember(asked.audio_id, end["transcript"])
            data = await asyncio.to_thread(sound.encoded, torch.cat(waves), asked.form)
            message |= {"content": None, "audio": {
                "id": asked.audio_id, "data": sound.packed(data), "transcript": end["transcript"],
                "expires_at": asked.expires}}  # fmt: skip
        choice = {"index": 0, "message": message, "logprobs": None}
        choice["finish_reason"] = end["finish_reason"]
        return asked.object("chat.completion", [choice], usage=end["usage"])

    async def chunks(self, asked):
        """Objects chat.completion.chunk, and Waiting notices."""
        yield asked.chunk({"role": "assistant"})
        async with aclosing(Reply(lambda: self.answer(asked)).items(self.worker)) as items:
            async for item in items:
                for chunk in self._told(asked, item):
                    yield chunk

    def _told(self, asked, item):
        """Chunks of one item of `answer`; a Waiting stays one."""
        if isinstance(item, Waiting):
            yield item
        elif isinstance(item, dict):
            if asked.form:
                self.remember(asked.audio_id, item["transcript"])
                yield asked.chunk({"audio": {"id": asked.audio_id, "expires_at": asked.expires}})
            yield asked.chunk({}, item["finish_reason"])
            if asked.usage:
                yield asked.object("chat.completion.chunk", [], usage=item["usage"])
        elif asked.form is None:
            yield asked.chunk({"content": item[0]})
        else:
            part = {"transcript": item[0]} if item[0] else {}
            part |= {"data": sound.packed(sound.pcm(item[1]))} if len(item[1]) else {}
            if part:
                yield asked.chunk({"audio": {"id": asked.audio_id, **part}})


class Asked:
    """A checked request. turns: (role, parts); form: of the sound, None: text alone."""

    def __init__(self, turns, form, stream, sampling, body):
        self.turns, self.form, self.stream, self.sampling = turns, form, stream, sampling
        self.model = str(body.get("model") or MODEL)
        options = body.get("stream_options")
        self.usage = isinstance(options, dict) and bool(options.get("include_usage"))
        self.id, self.audio_id = f"chatcmpl-{uuid.uuid4().hex}", f"audio_{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.expires = self.created + 3600

    def chunk(self, delta, reason=None):
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return self.object("chat.completion.chunk", [choice])

    def object(self, kind, choices, **more):
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model,
                "choices": choices, **more}  # fmt: skip
