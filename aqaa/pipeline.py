"""The whole way from a question to an answer, and the time each step of it takes.

`ask` answers at once, `stream` hands out sound while the rest is still being generated, `chat` keeps a history as text
(AQAA paper 2.4: audio would cost fourteen times the tokens). Every step can be called by itself.
"""

import time
from functools import cached_property
from math import exp

import torch

from aqaa import audio
from aqaa.answer import Answer, Ledger, Piece
from aqaa.audio import TOO_SHORT
from aqaa.config import ASR_MARKER, GROUP_SIZE, TOKENS_PER_SECOND
from aqaa.processor import suited, suited_to
from aqaa.tokenizers import dialogue, interleave
from aqaa.tokenizers.dialogue import TextOnly
from aqaa.vocoder.streaming import Vocoder

MIN_AUDIO = 3 * GROUP_SIZE  # ids: an answer is never silent
MAX_ANSWER = 1500  # ids, text and audio: about half a minute
SAMPLING = {"temperature": 0.3, "top_p": 0.9, "seed": 0, "max_tokens": MAX_ANSWER}
SPOKEN = ("linguistic", "semantic")  # kinds of ids that are sound


class AQAA:
    """Question in, answer out.

    Parts are `text`, `linguistic`, `semantic`, `backbone`, `flow`, `hift`; each is fetched by part(name) when first
    used, so a dict's `__getitem__` will do. config: AQAAConfig; layout: a name of Table 1 or a Layout; voice: a
    function of this object that returns options of the Vocoder; notes: sentences on what was left out in loading.
    engine: None, or what generates in place of the backbone: its generate(prompt, ids, layout, **sampling) gives Steps.
    """

    engine = None

    def __init__(self, config, part, *, device="cpu", layout="ratio_10_15", voice=None, notes=()):
        self.config, self.ids, self.device = config, config.ids, torch.device(device)
        self.layout = dialogue.layout(layout) if isinstance(layout, str) else layout
        self._part, self._voice, self.notes = part, voice or (lambda model: {}), notes

    text = cached_property(lambda self: self._part("text"))
    linguistic = cached_property(lambda self: self._part("linguistic"))
    semantic = cached_property(lambda self: self._part("semantic"))
    flow = cached_property(lambda self: self._part("flow"))
    hift = cached_property(lambda self: self._part("hift"))
    vocoder = cached_property(lambda self: Vocoder(self.flow, self.hift, **self._voice(self)))

    _decoder = cached_property(lambda self: self._part("backbone"))

    @property
    def decoder(self):
        """What generates: the backbone as it was loaded, for which transformers need not be imported."""
        return self.backbone if "backbone" in self.__dict__ else self._decoder

    @cached_property
    def backbone(self):
        """The language model as transformers knows it: the very layers of `decoder`, with `generate`,
        `save_pretrained` (which writes the tokenizer beside the weights), PEFT and all the rest."""
        from aqaa.backbone.step1 import from_plain

        backbone = from_plain(self._decoder)
        backbone.tokenizer = self.text
        return backbone

    # ---- single steps ----

    def listen(self, question, ledger=None):
        """Sound (a path, or (samples, rate)) -> merged audio ids, 5 for each 120 ms. Raises AudioError.

        Silence and faint noise of more than 0.75 s at either end are not heard, see audio.endpoints.
        """
        ledger = ledger or Ledger()
        with ledger.step("read"):
            wav = audio.load_question(question)
            wav = wav[slice(*audio.endpoints(wav))].to(self.device)
        with ledger.step("linguistic"), suited_to(self.linguistic):
            linguistic = self.linguistic.encode(wav)
        with ledger.step("semantic"), suited_to(self.semantic):
            semantic = self.semantic.encode(wav)
        ids = interleave.merge(linguistic.cpu(), semantic.cpu(), self.ids)
        if not ids:
            raise audio.AudioError(TOO_SHORT)
        return ids

    def listener(self, *, every=0.24, history=(), prefill=True):
        """A listening.Listener for a question that is still being spoken; prefill: read the prompt as it grows."""
        from aqaa.backbone.generation import Prefill
        from aqaa.listening import Listener

        room = len(self.prompt([], history)) + int(audio.MAX_SECONDS * TOKENS_PER_SECOND) + MAX_ANSWER
        prefill = Prefill(self.decoder, room) if prefill and self.engine is None else None
        return Listener(self, every=every, history=history, prefill=prefill)

    def heard(self, question, ledger=None):
        """A question as audio ids; ids that are already there pass through."""
        if isinstance(question, list) and question and isinstance(question[0], int):
            return question
        return self.listen(question, ledger)

    def prompt(self, question, history=(), marker=None):
        """Ids of a dialogue: history ((role, text) pairs), the question (audio ids or text), and an open turn.

        marker: one of Step-1's control tokens after bos, as ASR_MARKER, which asks for another kind of answer.
        """
        return dialogue.prompt([*history, ("user", question)], self.text, self.ids, marker=marker)

    def generate(self, prompt, *, layout=None, **sampling):
        """Ids of a dialogue -> Steps (id, kind, logprob), one by one, as the layout allows.

        sampling: temperature, top_p, seed, max_tokens, repetition (see backbone.generation), by default SAMPLING.
        """
        layout, sampling = layout or self.layout, {**SAMPLING, "min_audio": MIN_AUDIO, **sampling}
        if self.engine is not None:
            return self.engine.generate(prompt, self.ids, layout, **sampling)
        from aqaa.backbone.generation import generate

        return suited(generate(self.decoder, prompt, self.ids, layout, **sampling), self.decoder)

    def transcribe(self, question):
        """The words of a question, as the backbone understands them; question: a sound, or audio ids."""
        ids = self.heard(question)
        prompt = self.prompt(ids, marker=ASR_MARKER)
        steps = self.generate(prompt, layout=TextOnly(), temperature=0, max_tokens=len(ids) + 8)
        return self.text.decode([step.id for step in steps if step.kind == "text"])

    def synthesize(self, audio_ids, seed=0):
        """Merged audio ids of an answer -> (N,) samples on the CPU at vocoder.sample_rate, in one go."""
        with suited_to(self.flow, self.hift):
            return self.vocoder.synthesize(self.codes(audio_ids), seed).float().cpu()

    def codes(self, audio_ids):
        """Audio ids as the vocoder counts them: from the first linguistic code."""
        return [token - self.ids.n_text for token in audio_ids]

    # ---- whole ways ----

    def ask(self, question, *, history=(), **sampling):
        """One question (a path, (samples, rate), or what `listen` gave) -> Answer. Raises AudioError.

        sampling: temperature, top_p, seed, max_tokens … as in `generate`. The same seed gives the same answer.
        """
        return Talk(self, question, history, sampling, live=False).answer

    def stream(self, question, *, history=(), **sampling):
        """As `ask`, but an iterator of Pieces, each given out as soon as its sound is ready; `.answer` is the whole."""
        return Talk(self, question, history, sampling, live=True)

    def chat(self, **sampling):
        """A Chat with an empty history."""
        return Chat(self, **sampling)


class Talk:
    """One answer being made: iterate to get its Pieces; `answer` finishes it."""

    def __init__(self, model, question, history, sampling, live):
        self.model, self.ledger, self.sampling = model, Ledger(), sampling
        self.seed = sampling.get("seed", 0)
        self.prompt = model.prompt(model.heard(question, self.ledger), history)
        self.stream = model.vocoder.stream(self.seed) if live else None
        self.steps, self.sound, self._known, self._answer = [], [], 0, None
        self._said, self._waiting = "", []  # words given out; audio ids not yet spoken
        self._source = model.generate(self.prompt, **sampling)
        self._pieces = self._run()

    def __iter__(self):
        return self._pieces

    @property
    def answer(self):
        """The Answer; what has not been generated yet is generated now."""
        for _ in self._pieces:
            pass
        return self._answer

    def resume(self):
        """Go on after the engine failed in mid-answer (EngineError), from the ids that are here; returns this Talk.

        What was said stays as it is and is not said again. Drawn ids are not those of an unbroken answer.
        """
        said = tuple(step.id for step in self.steps)
        layout = dialogue.Resumed(self.sampling.get("layout") or self.model.layout, said)
        left = self.sampling.get("max_tokens", SAMPLING["max_tokens"]) - len(said)
        options = {**self.sampling, "layout": layout, "max_tokens": left}
        ended = said[-1:] == (self.model.ids.eot,)
        self._source = iter(()) if ended else self.model.generate([*self.prompt, *said], **options)
        self._pieces = self._run()
        return self

    def _run(self):
        for step in self._generated():
            self._waiting += [step.id] if step.kind in SPOKEN else []
            if self.stream and len(self._waiting) == GROUP_SIZE:
                wave, self._waiting = self._sound(self.stream.push, self._waiting), []
                if len(wave):
                    yield self._piece(wave)
        n = len(self._waiting)
        whole = self._waiting[: n - n % GROUP_SIZE]  # max_tokens may have cut the last group
        if self.stream:
            wave = self._sound(lambda _: self.stream.finish(), [])
        else:
            wave = self._sound(lambda ids: self.model.vocoder.synthesize(ids, self.seed), whole)
        yield self._piece(wave)
        self._answer = self._finish()

    def _piece(self, wave):
        words = self._words()
        piece, self._said = Piece(words[len(self._said):], wave), words
        return piece

    def _generated(self):
        while True:
            with self.ledger.step("generate"):
                step = next(self._source, None)
            if step is None:
                return
            self.ledger.mark("first_token")
            self.steps.append(step)
            yield step

    def _sound(self, make, audio_ids):
        """Samples that make(0-based audio ids) gives, kept and timed."""
        with self.ledger.step("vocode"), suited_to(self.model.flow, self.model.hift):
            wave = make(self.model.codes(audio_ids)).float().cpu()
        if len(wave) and not self._known:
            self.ledger.mark("first_audio")
            self._known = len(self.steps)
        if len(wave):
            ready = time.perf_counter() - self.ledger.began
            self.ledger.pieces.append((ready, len(wave) / self.model.vocoder.sample_rate))
        self.sound.append(wave)
        return wave

    def _words(self):
        return self.model.text.decode([step.id for step in self.steps if step.kind == "text"])

    def _finish(self):
        ids = [step.id for step in self.steps]
        linguistic, semantic = interleave.split(ids, self.model.ids)
        chances = [step.logprob for step in self.steps if step.kind == "text"]
        self.ledger.mark("total")
        self.ledger.times["first_audio_share"] = self._known / len(ids)
        return Answer(
            text=self._words().strip(),
            audio=torch.cat(self.sound),
            sample_rate=self.model.vocoder.sample_rate,
            tokens={
                "prompt": self.prompt,
                "answer": ids,
                "text": [step.id for step in self.steps if step.kind == "text"],
                "linguistic": linguistic,
                "semantic": semantic,
            },
            timings=self.ledger.times,
            confidence=exp(sum(chances) / len(chances)) if chances else 0.0,
            pieces=tuple(self.ledger.pieces),
        )


class Chat:
    """Several turns. The history holds (role, text) pairs: questions as transcribed, answers as written.

    The oldest turns are left out once the prompt would not leave room for an answer.
    """

    def __init__(self, model, **sampling):
        self.model, self.sampling, self.history = model, sampling, []

    def ask(self, question):
        """The next question (a path, or (samples, rate)) -> Answer."""
        heard = self.model.heard(question)
        answer = self.model.ask(heard, history=self._recent(heard), **self.sampling)
        self._remember(heard, answer)
        return answer

    def stream(self, question):
        """As `ask`, but Pieces as they become ready; the turn enters the history after the last one."""
        heard = self.model.heard(question)
        talk = self.model.stream(heard, history=self._recent(heard), **self.sampling)
        yield from talk
        self._remember(heard, talk.answer)

    def _recent(self, heard):
        room = self.model.config.backbone.max_seq_len - MAX_ANSWER
        for first in range(0, len(self.history), 2):
            if len(self.model.prompt(heard, self.history[first:])) <= room:
                return self.history[first:]
        return []

    def _remember(self, heard, answer):
        self.history += [("user", self.model.transcribe(heard)), ("assistant", answer.text)]
