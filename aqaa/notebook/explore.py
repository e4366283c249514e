"""Widgets to look into a sound and the way it is made: tokens, interleaving, the flow's steps, and a listening test."""

import threading
from itertools import groupby

import matplotlib
import numpy as np
import torch

from aqaa import audio
from aqaa.config import GROUP_SECONDS, GROUP_SIZE, LINGUISTIC_PER_GROUP, SAMPLE_RATE, SEMANTIC_PER_GROUP, TTS, IdsConfig
from aqaa.evaluation.controls import measure
from aqaa.notebook import show
from aqaa.notebook.base import Widget, pcm16
from aqaa.notebook.figures import array
from aqaa.pipeline import SAMPLING, SPOKEN
from aqaa.tokenizers import dialogue, interleave
from aqaa.tokenizers.text import MANNERS, tagged

FIRST = 3 * GROUP_SIZE  # audio tokens before the first sound: the vocoder speaks two groups and looks one ahead
STEPS = {"linguistic": GROUP_SECONDS / LINGUISTIC_PER_GROUP, "semantic": GROUP_SECONDS / SEMANTIC_PER_GROUP}  # s a code


class Tokens(Widget):
    """Both streams of tokens of a sound: point at one, hear its 60 or 40 ms, see its neighbours in the codebook.

    audio_ids: merged ids, or (linguistic codes, semantic codes); wav (N,) at `rate` Hz.
    """

    script = "tokens"

    def __init__(self, model, audio_ids, wav, interactive=False, rate=SAMPLE_RATE):
        pair = len(audio_ids) == 2 and all(hasattr(codes, "__len__") for codes in audio_ids)
        streams = audio_ids if pair else interleave.split(audio_ids, model.ids)
        self.codes = {kind: [int(code) for code in codes] for kind, codes in zip(STEPS, streams)}
        if not all(self.codes.values()):
            raise ValueError("the inspector needs tokens of both kinds: pass merged ids or (linguistic, semantic).")
        self.wav, self.rate = array(wav, 1, "the sound"), rate
        tables = (model.linguistic.centroids, model.semantic.quantizer._codebook.embed)
        self.near = {kind: neighbours(self.codes[kind], table) for kind, table in zip(STEPS, tables)}
        super().__init__(interactive)
        if interactive:
            rows = [{"kind": kind, "step": STEPS[kind], "codes": codes,
                     "near": {str(code): near for code, near in self.near[kind].items()}}
                    for kind, codes in self.codes.items()]  # fmt: skip
            self._open(wav=pcm16(self.wav), rate=rate, rows=rows)

    def __repr__(self):
        linguistic, semantic = map(len, self.codes.values())
        return f"<tokens: {linguistic} linguistic, {semantic} semantic, {len(self.wav) / self.rate:.2f} s>"

    def _static(self):
        rows = []
        for kind, codes in self.codes.items():
            for code in list(dict.fromkeys(codes))[:6]:
                times = ", ".join(f"{i * STEPS[kind]:.2f}" for i, other in enumerate(codes) if other == code)
                near = ", ".join(f"{other} ({distance:.2f})" for other, distance in self.near[kind][code])
                rows.append([kind, str(code), times, near])
        head = ["kind", "code", "heard at, s", "nearest codes (distance; the usual one is 1)"]
        return [show.streams(*self.codes.values(), self.wav, self.rate), show.table(rows, head, "The first codes")]


def neighbours(codes, table, count=4):
    """The nearest other entries of a codebook (K, D) for each distinct code: {code: [(other, distance)]}.

    Distances are shares of the usual one: the median from that code to all the others.
    """
    codes, table = sorted(set(codes)), table.detach().float().cpu()
    distances = torch.cdist(table[codes], table)
    usual = distances.median(1).values.clamp(min=1e-9)
    distances[torch.arange(len(codes)), codes] = float("inf")
    best = distances.topk(min(count, len(table) - 1), largest=False)
    return {code: [(int(other), round(float(d / scale), 3)) for d, other in zip(values, others)]
            for code, scale, values, others in zip(codes, usual, best.values, best.indices)}  # fmt: skip


class Interleave(Widget):
    """Drag the ratio of text to audio tokens: the blocks of an answer, and when each sound could start.

    n_text, n_audio: tokens of the whole answer (audio: cut to groups of 5); first: audio tokens that the vocoder must
    have before it speaks. Time is counted in tokens alone: a vocoder adds its own work.
    """

    script = "interleave"
    SPEED = 100  # tokens a second, to begin with

    def __init__(self, n_text, n_audio, interactive=False, first=FIRST):
        if n_text < 1 or n_audio < GROUP_SIZE:
            raise ValueError(f"an answer needs text and at least one group of {GROUP_SIZE} audio tokens.")
        self.n_text, self.n_audio, self.first = int(n_text), int(n_audio) // GROUP_SIZE * GROUP_SIZE, first
        super().__init__(interactive, blocks=[])
        self.plan()
        if interactive:
            layouts = {name: [self._text_block(made), made.audio_block] for name, made in dialogue.LAYOUTS.items()}
            self._open(layouts=layouts, n_text=self.n_text, n_audio=self.n_audio)

    def _text_block(self, layout):
        return self.n_text + 1 if layout.text_block is None else layout.text_block

    def plan(self, text_block=10, audio_block=15, tokens_per_second=SPEED):
        """The blocks in order, see `schedule`; what the page shows from now on. text_block 0: no text at all."""
        blocks = schedule(self.n_text, self.n_audio, text_block, audio_block, tokens_per_second, self.first)
        sounds = [block for block in blocks if block["kind"] == "audio"]
        waits = [block["wait"] for block in sounds if block["wait"] > 1e-6]
        words = f"First sound after {sounds[0]['plays']:.2f} s; " + (
            f"{len(waits)} waits, {sum(waits):.2f} s of silence in all." if waits else "then no wait."
        )
        self._set(
            blocks=blocks,
            message=words,
            text_block=text_block,
            audio_block=audio_block,
            tokens_per_second=tokens_per_second,
        )
        return blocks

    def _on_set(self, message, _):
        names = ("text_block", "audio_block", "tokens_per_second")
        self.plan(**{name: int(message.get(name, self._state[name])) for name in names})

    def __repr__(self):
        ratio = f"{self._state['text_block']}:{self._state['audio_block']}"
        return f"<interleave: {self.n_text} text and {self.n_audio} audio tokens, {ratio}>"

    def _static(self):
        speed, rows = self._state["tokens_per_second"], []
        for name, layout in dialogue.LAYOUTS.items():
            sizes = self._text_block(layout), layout.audio_block
            blocks = schedule(self.n_text, self.n_audio, *sizes, speed, self.first)
            sounds = [block for block in blocks if block["kind"] == "audio"]
            silence = sum(block["wait"] for block in sounds)
            rows.append([name, f"{sounds[0]['plays']:.2f}", f"{silence:.2f}", f"{blocks[-1]['ready']:.2f}"])
        generated = [(b["start"], b["ready"], f"{b['kind'][0].upper()}{b['count']}") for b in self._state["blocks"]]
        heard = [(b["plays"], b["plays"] + b["seconds"], f"sound {k + 1}") for k, b in
                 enumerate(b for b in self._state["blocks"] if b["kind"] == "audio")]  # fmt: skip
        title = f"{self._state['text_block']} text, {self._state['audio_block']} audio tokens, {speed} tokens a second"
        head = ["layout", "first sound, s", "silence later, s", "all generated, s"]
        return [
            show.alignment(generated, heard, ("generated", "heard"), title, f"{title}. {self._state['message']}"),
            show.table(rows, head, f"The layouts of the paper's Table 1 at {speed} tokens a second"),
        ]


def schedule(n_text, n_audio, text_block, audio_block, tokens_per_second, first=FIRST):
    """Blocks of an answer as they are generated: dicts kind, count (tokens), start and ready (s); for audio also plays
    (s, when its sound starts), seconds of sound, and wait (s of silence before or in it, once the voice has begun).

    The voice begins with `first` audio tokens, in whatever block they end; then each group of five plays when it is
    ready and the one before is over. The order of the tokens is that of dialogue.Layout; once there is no more text
    the audio still counts in blocks.
    """
    if tokens_per_second <= 0:
        raise ValueError(f"{tokens_per_second} tokens a second never make an answer: pass a number above 0.")
    ids, groups = IdsConfig(), n_audio // GROUP_SIZE
    audio_ids = interleave.merge([0] * LINGUISTIC_PER_GROUP * groups, [0] * SEMANTIC_PER_GROUP * groups, ids)
    layout = dialogue.Layout("yours", text_block, audio_block)
    answer = layout.arrange([ids.first_text] * n_text if text_block else [], audio_ids, ids)[:-1]  # without eot
    places = [place for place, token in enumerate(answer, 1) if token >= ids.n_text]  # how many are known with each
    end = places[min(first, len(places)) - 1] / tokens_per_second
    ready = iter(place / tokens_per_second for place in places[GROUP_SIZE - 1 :: GROUP_SIZE])  # of each group
    blocks, done = [], 0
    for spoken, run in groupby(answer, lambda token: token >= ids.n_text):
        count = len(list(run))
        while count:
            size = min(count, audio_block) if spoken else count
            block = {"kind": "audio" if spoken else "text", "count": size, "start": done / tokens_per_second}
            count, done = count - size, done + size
            block["ready"] = done / tokens_per_second
            if spoken:
                block |= {"plays": None, "wait": 0.0, "seconds": size // GROUP_SIZE * GROUP_SECONDS}
                for _ in range(size // GROUP_SIZE):
                    plays = max(end, next(ready))
                    block["plays"] = plays if block["plays"] is None else block["plays"]
                    block["wait"] += plays - end
                    end = plays + GROUP_SECONDS
            blocks.append(block)
    return blocks


class Ode(Widget):
    """The flow's way from noise to a mel: drag the step, see the mel, hear it through the vocoder.

    states: (bins, frames) at each of `times`; synth(state) gives (N,) samples at `rate` Hz, called once for each state
    when it is first needed; hop_seconds: of a frame.
    """

    script = "ode"

    def __init__(self, states, times, synth, interactive=False, rate=SAMPLE_RATE, hop_seconds=0.010):
        self.states = [array(torch.as_tensor(state).squeeze(), 2, "a state") for state in states]
        self.times, self.rate, self.hop_seconds = [float(time) for time in times], rate, hop_seconds
        if len(self.states) < 2 or len(self.states) != len(self.times):
            raise ValueError("the stepper needs two states or more and one time for each of them.")
        self._synth, self._given, self._sounds = synth, list(states), {}
        super().__init__(interactive)
        if interactive:
            low, high = float(self.states[-1].min()), float(self.states[-1].max())  # noise is wider than any mel
            scaled = [(255 * (state - low) / max(high - low, 1e-6)).clip(0, 255) for state in self.states]
            palette = (255 * matplotlib.colormaps["viridis"](np.arange(256))[:, :3]).round()
            bins, frames = self.states[-1].shape
            self._open(
                pictures=[picture.astype(np.uint8).tobytes() for picture in scaled],
                bins=bins,
                frames=frames,
                times=self.times,
                sounds=[pcm16(self.sound(k)) for k in range(len(states))],
                rate=rate,
                palette=palette.astype(np.uint8).tobytes(),
                hop=hop_seconds,
                low=low,
                high=high,
            )

    def sound(self, step):
        """(N,) samples of what the vocoder makes of the state after `step` steps."""
        if step not in self._sounds:
            self._sounds[step] = torch.as_tensor(self._synth(self._given[step])).detach().float().cpu().flatten()
        return self._sounds[step]

    def __repr__(self):
        bins, frames = self.states[-1].shape
        return f"<ode: {len(self.states) - 1} steps, mel ({bins} bins, {frames} frames)>"

    def _static(self):
        last = len(self.states) - 1
        chosen = sorted({0, (last + 1) // 2, last})
        title = f"From noise to mel in {last} steps"
        return [
            show.trajectory(self.states, self.times, title, hop_seconds=self.hop_seconds),
            show.compare(*((f"step {k}, t = {self.times[k]:.2f}", self.sound(k)) for k in chosen), rate=self.rate),
        ]


class VoiceControl(Widget):
    """Say a sentence in a manner: choose it and the temperature, press Speak, hear it, compare what was measured.

    The backbone is asked as in its training for synthesis: the TTS marker after bos, the sentence with its manner as a
    tag ("(slow) the river runs") as the user's turn, and an answer of audio tokens alone. It knows the sentences of the
    curriculum best; one manner at a time. takes: what was said, newest first (dicts with manner, temperature, seed,
    seconds, f0 in Hz, energy in dB, wav). manners: those of the static view, said when it is first shown.
    """

    script = "voice"
    GROUPS = {"Plain": ("normal",), "Rate": ("slow", "fast"), "Pitch": ("high", "low"), "Loudness": ("loud", "soft"),
              "Mood": ("happy", "sad", "angry", "calm")}  # fmt: skip
    KEPT = 8  # takes
    LONGEST = 500  # audio ids: 12 s

    def __init__(
        self, model, sentence="the river runs down to the ocean", interactive=False, manners=("normal", "slow", "high")
    ):
        super().__init__(interactive, phase="idle", sentence=sentence, takes=[], said=0)
        self.model, self.sentence, self.manners, self.takes, self._thread = model, sentence, manners, [], None
        if interactive:
            self._open(groups={name: list(group) for name, group in self.GROUPS.items()})

    def speak(self, manner="normal", temperature=SAMPLING["temperature"], seed=0, sentence=None):
        """(N,) samples at model.vocoder.sample_rate. ValueError for a manner that is not known or an empty sentence."""
        sentence = self.sentence if sentence is None else sentence.strip().lower()
        if manner != "normal" and manner not in MANNERS:
            raise ValueError(f"unknown manner {manner!r}: choose one of normal, {', '.join(MANNERS)}.")
        if not sentence:
            raise ValueError("there is nothing to say: type a sentence.")
        model = self.model
        prompt = model.prompt(model.text.encode(tagged(sentence, manner)), marker=TTS)
        steps = model.generate(
            prompt, layout=dialogue.layout("audio_only"), temperature=temperature, seed=seed, max_tokens=self.LONGEST
        )
        ids = [step.id for step in steps if step.kind in SPOKEN]
        wav = model.synthesize(ids[: len(ids) // GROUP_SIZE * GROUP_SIZE], seed)
        found = measure(audio.resample(wav, model.vocoder.sample_rate), sentence)
        take = {"manner": manner, "temperature": temperature, "seed": seed, "seconds": found.seconds, "f0": found.f0,
                "energy": found.energy, "wav": wav}  # fmt: skip
        self.takes = [take, *self.takes][: self.KEPT]
        return wav

    def _on_speak(self, message, _):
        if self._thread is None or not self._thread.is_alive():
            self._set(phase="speaking", message="speaking …")
            self._thread = threading.Thread(target=self._speak, args=(message,), daemon=True)
            self._thread.start()

    def _speak(self, message):
        """In a thread, so that cells can run meanwhile."""
        try:
            self.speak(message["manner"], float(message["temperature"]), int(message["seed"]), message["sentence"])
            rate = self.model.vocoder.sample_rate
            takes = [{**{k: v for k, v in take.items() if k != "wav"}, "sound": pcm16(take["wav"]), "rate": rate}
                     for take in self.takes]  # fmt: skip
            self._set(
                phase="idle",
                takes=takes,
                said=self._state["said"] + 1,
                message=f"Said it: {len(self.takes[0]['wav']) / rate:.2f} s.",
            )
            self._tell({"type": "play"})
        except Exception as fault:  # the thread has nobody above it
            self._set(phase="idle", message="", error=str(fault) or type(fault).__name__)

    def __repr__(self):
        return f'<voice control: "{self.sentence}", {len(self.takes)} takes>'

    def _static(self):
        for manner in self.manners:
            if not any(take["manner"] == manner for take in self.takes):
                self.speak(manner)
        takes = self.takes[::-1]
        rows = [[t["manner"], t["temperature"], t["seconds"], round(t["f0"]), t["energy"]] for t in takes]
        sounds = [show.sound(t["wav"], self.model.vocoder.sample_rate, t["manner"], self.sentence, level=False)
                  for t in takes]  # fmt: skip
        return [
            show.compare(*sounds),
            show.table(rows, ["manner", "temperature", "speech, s", "pitch, Hz", "level, dB"], "Measured"),
        ]
