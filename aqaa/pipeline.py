"""The whole way from a question to an answer, and the time each step of it takes.

`ask` answers at once, `stream` hands out sound while the rest is still being generated, `chat`
keeps a history as text (AQAA paper 2.4: audio would cost fourteen times the tokens).
"""

import time
from functools import cached_property

import torch

from aqaa import audio
from aqaa.answer import Answer, Ledger, Piece, confidence
from aqaa.backbone import generation, vision
from aqaa.config import ASR_MARKER, GROUP_SIZE, TOKENS_PER_SECOND
from aqaa.files import ModelError
from aqaa.hearings import Heard, Prompt, surely
from aqaa.listening import Listener
from aqaa.processor import suited, suited_to
from aqaa.tokenizers import dialogue, interleave
from aqaa.tokenizers.dialogue import TextOnly
from aqaa.vocoder.streaming import Vocoder

MIN_AUDIO = 3 * GROUP_SIZE  # ids: an answer is never silent
MAX_ANSWER = 1500  # ids, text and audio: about half a minute
SAMPLING = {"temperature": 0.3, "top_p": 0.9, "seed": 0, "max_tokens": MAX_ANSWER}
SPOKEN = ("linguistic", "semantic")  # kinds of ids that are sound
NO_HEADS = (
    "these weights have no phone heads: run the stages corpus, features, heads and export of "
    "`aqaa train`, each with --init and the folder of the weights."
)
NO_VISION = (
    "these weights see no pictures: ask without one, or run the stages vision, sight and export of "
    "`aqaa train`, each with --init and the folder of the weights."
)


class AQAA:
    """Question in, answer out.

    Parts are `text`, `linguistic`, `semantic`, `backbone`, `flow`, `hift`, and perhaps `heads`,
    `vision` and `turns`; part(name) fetches each when it is first used, as a dict's `__getitem__`.
    config: AQAAConfig; layout: a name of Table 1 or a Layout; voice: a function of this object that
    returns options of the Vocoder; notes: sentences on what was left out in loading. engine: None,
    or what generates in place of the backbone: its generate(prompt, ids, layout, **sampling) gives
    Steps.
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
        """What generates: the backbone as loaded; transformers is not imported for it."""
        return self.backbone if "backbone" in self.__dict__ else self._decoder

    @cached_property
    def backbone(self):
        """The layers of `decoder` as a transformers model, with `generate`, PEFT and all the rest.

        Its `save_pretrained` writes the tokenizer beside the weights.
        """
        from aqaa.backbone.step1 import from_plain  # transformers takes seconds to import

        backbone = from_plain(self._decoder)
        backbone.tokenizer = self.text
        return backbone

    heads = cached_property(lambda self: self._extra("heads"))  # PhoneHeads of both tokenizers
    vision = cached_property(lambda self: self._extra("vision"))  # Vision
    seeing = cached_property(lambda self: self.vision.adapted(self.decoder))  # with a picture
    turns = cached_property(lambda self: self._extra("turns"))  # Turns
    remembering = cached_property(lambda self: self.turns.added(self.decoder))  # after a turn

    def _extra(self, name):
        """A part that weights need not bring; None where they do not."""
        try:
            return self._part(name)
        except KeyError:
            return None

    def decoder_for(self, prompt):
        """What answers a prompt (ids): `decoder`, or what learnt turns where some came before."""
        later = prompt.count(self.ids.bot) > 2  # the question's own turn, and the open one
        return self.remembering if later and self.turns is not None else self.decoder

    # ---- single steps ----

    def listen(self, question, ledger=None):
        """Sound (a path, or (samples, rate)) -> merged audio ids, 5 per 120 ms. Raises AudioError.

        Silence and faint noise beyond 0.75 s at either end are left out, see audio.endpoints.
        A list of audio ids comes back as it is.
        """
        if isinstance(question, list) and question and isinstance(question[0], int):
            return question
        ledger = ledger or Ledger()
        with ledger.step("read"):
            wav = audio.load_question(question)  # (N,) at 16 kHz
            start, end = audio.endpoints(wav)
            wav = wav[start:end].to(self.device)
        # Two tokenizers read the same wave: one keeps the words, the other how they sound.
        with ledger.step("linguistic"), suited_to(self.linguistic):
            linguistic = self.linguistic.encode(wav)  # 16.7 codes a second
        with ledger.step("semantic"), suited_to(self.semantic):
            semantic = self.semantic.encode(wav)  # 25 codes a second
        # Both cover the same time at 2 : 3, so the backbone reads them in groups of 2 + 3.
        ids = interleave.merge(linguistic.cpu(), semantic.cpu(), self.ids)
        if not ids:
            raise audio.AudioError(audio.TOO_SHORT)
        return Heard(ids, wav)

    def encode(self, wavs):
        """Waves (N,) at 16 kHz -> the merged ids of each, as of `listen`; both ends stay."""
        with suited_to(self.linguistic, self.semantic):
            both = [part.encode_batch(wavs) for part in (self.linguistic, self.semantic)]
        return [interleave.merge(one.cpu(), two.cpu(), self.ids) for one, two in zip(*both)]

    def phones(self, question):
        """Sound -> {"linguistic": Phones, "semantic": Phones}: what each tokenizer heard, and when.

        Raises AudioError, and ModelError for weights without phone heads.
        """
        if self.heads is None:
            raise ModelError(NO_HEADS)
        wav = audio.load_question(question)
        start, end = audio.endpoints(wav)
        with suited_to(self.linguistic, self.semantic):
            wav = wav[start:end].to(self.device)
            return self.heads.heard(wav, self.linguistic, self.semantic, start)

    def listener(self, *, every=0.24, history=(), prefill=True):
        """A Listener for a question still being spoken; prefill: read the prompt as it grows."""
        # The cache is made once, for the longest question and answer.
        longest = int(audio.MAX_SECONDS * TOKENS_PER_SECOND) + MAX_ANSWER
        room = len(self.prompt([], history)) + longest
        own = prefill and self.engine is None  # an engine keeps its own prefixes
        prefill = generation.Prefill(self.decoder, room) if own else None
        return Listener(self, every=every, history=history, prefill=prefill)

    def look(self, image):
        """A picture (a path, an image of PIL, or uint8 (H, W, 3)) -> (3, S, S) in -1..1.

        A tensor comes back as it is. Raises PictureError, and ModelError for weights without eyes.
        """
        if torch.is_tensor(image):
            return image
        if self.engine is not None:
            raise ModelError("a picture needs the model in this process: leave out --engine.")
        if self.vision is None:
            raise ModelError(NO_VISION)
        return vision.pixels(image, self.config.vision.image_size).to(self.device)

    def prompt(self, question, history=(), marker=None, image=None):
        """Ids of a dialogue: history ((role, text) pairs), question (audio ids or text), open turn.

        marker: a control token of Step-1 after bos, as ASR_MARKER, for another kind of answer.
        image: anything but None leaves room for a picture, behind the question in its turn.
        """
        if image is not None:
            question = [question, vision.patches(self.config)]

        def made(ids):
            turns = [*history, ("user", ids)]
            return dialogue.prompt(turns, self.text, self.ids, marker=marker)

        return Prompt(question, made) if isinstance(question, Heard) else made(question)

    def generate(self, prompt, *, layout=None, image=None, **sampling):
        """Ids of a dialogue -> Steps (id, kind, logprob), one by one, as the layout allows.

        image: as `look` gives it, for a prompt with room for it. sampling: temperature,
        top_p, seed, max_tokens, repetition, see SAMPLING and generation.
        """
        layout = layout or self.layout
        sampling = {**SAMPLING, "min_audio": MIN_AUDIO, **sampling}
        if self.engine is not None:
            return self.engine.generate(list(prompt), self.ids, layout, **sampling)
        decoder = self.decoder_for(prompt) if image is None else self.seeing
        if prefill := sampling.get("prefill"):
            prefill.suit(decoder)
        if image is not None:  # its rows take the places that the prompt keeps for them
            with torch.inference_mode():
                rows = generation.embed(decoder, [prompt])
                ids = torch.tensor([prompt], device=rows.device)
                sampling["prompt_embeds"] = self.vision.embedded(rows, ids, image[None])
        return suited(surely(self, decoder, prompt, layout, sampling), decoder)

    def transcribe(self, question):
        """The words of a question (a sound, or audio ids), as the backbone understands them."""
        ids = self.listen(question)
        prompt = self.prompt(ids, marker=ASR_MARKER)
        limit = len(ids) + 8  # speech has far fewer words than audio ids: this only ends a loop
        steps = self.generate(prompt, layout=TextOnly(), temperature=0, max_tokens=limit)
        return self.text.decode(text_ids(steps))

    def synthesize(self, audio_ids, seed=0):
        """Merged audio ids of an answer -> (N,) samples on the CPU at vocoder.sample_rate."""
        with suited_to(self.flow, self.hift):
            return self.vocoder.synthesize(self.codes(audio_ids), seed).float().cpu()

    def codes(self, audio_ids):
        """Audio ids as the vocoder counts them: from the first linguistic code."""
        return [token - self.ids.n_text for token in audio_ids]

    # ---- whole ways ----

    def ask(self, question, *, history=(), image=None, **sampling):
        """A question (a path, (samples, rate), or ids of `listen`) -> Answer. Raises AudioError.

        image: a picture that it is about, see `look`. sampling: as in `generate`. The same seed
        gives the same answer.
        """
        return Talk(self, question, history, sampling, live=False, image=image).answer

    def stream(self, question, *, history=(), marker=None, image=None, **sampling):
        """As `ask`, but an iterator of Pieces as they become ready; `.answer` is the whole.

        marker: as of `prompt`.
        """
        return Talk(self, question, history, sampling, live=True, marker=marker, image=image)

    def chat(self, **sampling):
        """A Chat with an empty history."""
        return Chat(self, **sampling)


class Talk:
    """One answer being made: iterate to get its Pieces; `answer` finishes it."""

    def __init__(self, model, question, history, sampling, live, marker=None, image=None):
        self.ledger = Ledger()
        if image is not None:
            with self.ledger.step("look"):
                image = model.look(image)
            sampling = {**sampling, "image": image}
        self.model, self.sampling = model, sampling
        self.seed = sampling.get("seed", 0)
        question = model.listen(question, self.ledger)
        self.prompt = model.prompt(question, history, marker, image)
        self.stream = model.vocoder.stream(self.seed) if live else None
        self.steps = []  # all Steps so far
        self.sound = []  # waves so far
        self._waiting = []  # audio ids that the vocoder has not taken
        self._n_first = 0  # Steps known when the first sound came
        self._text = ""  # words of the Pieces so far
        self._answer = None
        self._source = model.generate(self.prompt, **sampling)
        self._pieces = self._run()

    def __iter__(self):
        return self._pieces

    def close(self):
        """Make no more of it; a generator that waits for the next piece holds its memory."""
        self._pieces.close()
        if hasattr(self._source, "close"):
            self._source.close()

    @property
    def answer(self):
        """The Answer; what has not been generated yet is generated now."""
        for _ in self._pieces:
            pass
        return self._answer

    def resume(self):
        """Go on after an EngineError in mid-answer, from the ids so far; returns this Talk.

        Pieces so far stay and do not come again. Drawn ids are not those of an unbroken answer.
        """
        done = tuple(step.id for step in self.steps)
        # The prompt gets the ids so far, and the layout goes on from where they stopped.
        layout = dialogue.Resumed(self.sampling.get("layout") or self.model.layout, done)
        left = self.sampling.get("max_tokens", SAMPLING["max_tokens"]) - len(done)
        options = {**self.sampling, "layout": layout, "max_tokens": left}
        if done[-1:] == (self.model.ids.eot,):  # only the vocoder was interrupted
            self._source = iter(())
        else:
            self._source = self.model.generate([*self.prompt, *done], **options)
        self._pieces = self._run()
        return self

    def _run(self):
        """Generate, vocode, and give out Pieces."""
        while True:
            with self.ledger.step("generate"):
                step = next(self._source, None)
            if step is None:
                break
            self.ledger.mark("first_token")
            self.steps.append(step)
            if step.kind in SPOKEN:
                self._waiting.append(step.id)
            # Live, each group of 2 linguistic and 3 semantic ids goes on at once; the flow looks
            # ahead, so the sound of a group comes some groups later.
            if self.stream and len(self._waiting) == GROUP_SIZE:
                wave = self._vocode(self.stream.push, self.model.codes(self._waiting))
                self._waiting = []
                if len(wave):
                    yield self._piece(wave)
        if self.stream:
            wave = self._vocode(self.stream.finish)
        else:
            whole = len(self._waiting) // GROUP_SIZE * GROUP_SIZE  # max_tokens may cut a group
            codes = self.model.codes(self._waiting[:whole])
            wave = self._vocode(self.model.vocoder.synthesize, codes, self.seed)
        yield self._piece(wave)
        self._answer = self._finish()

    def _vocode(self, make, *args):
        """The (N,) samples that make(*args) gives, on the CPU, timed and kept."""
        with self.ledger.step("vocode"), suited_to(self.model.flow, self.model.hift):
            wave = make(*args).float().cpu()
        if len(wave):
            self.ledger.mark("first_audio")
            self._n_first = self._n_first or len(self.steps)
            ready = time.perf_counter() - self.ledger.began
            self.ledger.pieces.append((ready, len(wave) / self.model.vocoder.sample_rate))
        self.sound.append(wave)
        return wave

    def _piece(self, wave):
        """A Piece of this sound and of the words since the last one."""
        text = self.model.text.decode(text_ids(self.steps))
        piece = Piece(text[len(self._text) :], wave)
        self._text = text
        return piece

    def _finish(self):
        """The Answer of all steps."""
        ids = [step.id for step in self.steps]
        tokens = {"prompt": self.prompt, "answer": ids, "text": text_ids(self.steps)}
        tokens["linguistic"], tokens["semantic"] = interleave.split(ids, self.model.ids)
        self.ledger.mark("total")
        self.ledger.times["first_audio_share"] = self._n_first / len(ids)
        return Answer(
            self._text.strip(), torch.cat(self.sound), self.model.vocoder.sample_rate, tokens,
            self.ledger.times, confidence(self.steps, self.model.config.confidence),
            tuple(self.ledger.pieces),
        )  # fmt: skip


def text_ids(steps):
    """Ids of the text among the Steps of an answer."""
    return [step.id for step in steps if step.kind == "text"]


class Chat:
    """Several turns. history: (role, text) pairs, questions as transcribed, answers as written.

    The oldest turns are left out once the prompt would not leave room for an answer.
    """

    def __init__(self, model, **sampling):
        self.model, self.sampling, self.history = model, sampling, []

    def ask(self, question, image=None):
        """The next question (a path, or (samples, rate)), perhaps about a picture -> Answer."""
        ids = self.model.listen(question)
        answer = self.model.ask(ids, history=self._recent(ids), image=image, **self.sampling)
        self._remember(ids, answer)
        return answer

    def stream(self, question):
        """As `ask`, but Pieces as they become ready; the turn enters the history at the end."""
        ids = self.model.listen(question)
        talk = self.model.stream(ids, history=self._recent(ids), **self.sampling)
        yield from talk
        self._remember(ids, talk.answer)

    def _recent(self, ids):
        """The latest turns that fit the context with this question and a long answer."""
        room = self.model.config.backbone.max_seq_len - MAX_ANSWER
        for first in range(0, len(self.history), 2):  # a turn is two entries
            if len(self.model.prompt(ids, self.history[first:])) <= room:
                return self.history[first:]
        return []

    def _remember(self, ids, answer):
        question = self.model.transcribe(ids)
        self.history += [("user", question), ("assistant", answer.text)]
