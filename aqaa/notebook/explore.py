"""Widgets to look into a sound and its making: tokens, blocks, the flow's steps, manners."""

import threading
from itertools import groupby

import matplotlib
import numpy as np
import torch

from aqaa import audio, config
from aqaa.config import GROUP_SECONDS, GROUP_SIZE, SAMPLE_RATE
from aqaa.evaluation.controls import measure
from aqaa.notebook import show
from aqaa.notebook.base import Widget, pcm16
from aqaa.notebook.figures import array
from aqaa.pipeline import SAMPLING, SPOKEN
from aqaa.tokenizers import dialogue, interleave
from aqaa.tokenizers.text import MANNERS, tagged

FIRST = 3 * GROUP_SIZE  # audio tokens before the first sound: two groups, and one looked ahead
STEPS = {"linguistic": GROUP_SECONDS / config.LINGUISTIC_PER_GROUP,  # s a code
         "semantic": GROUP_SECONDS / config.SEMANTIC_PER_GROUP}  # fmt: skip


class Tokens(Widget):
    """Both streams of tokens of a sound: point at one, hear its 60 or 40 ms, see its neighbours.
    audio_ids: merged ids, or (linguistic codes, semantic codes); wav (N,) at `rate` Hz."""

    script = "tokens"

    def __init__(self, model, audio_ids, wav, interactive=False, rate=SAMPLE_RATE):
        pair = len(audio_ids) == 2 and all(hasattr(codes, "__len__") for codes in audio_ids)
        streams = audio_ids if pair else interleave.split(audio_ids, model.ids)
        self.codes = {kind: [int(code) for code in codes] for kind, codes in zip(STEPS, streams)}
        if not all(self.codes.values()):
            raise ValueError("the inspector needs tokens of both kinds: pass merged ids or "
                             "(linguistic, semantic).")
        self.wav, self.rate = array(wav, 1, "the sound"), rate
        tables = (model.linguistic.centroids, model.semantic.quantizer._codebook.embed)
        self.near = dict(zip(STEPS, map(neighbours, self.codes.values(), tables)))
        super().__init__(interactive)
        if interactive:
            rows = [{"kind": kind, "step": STEPS[kind], "codes": codes,
                     "near": {str(code): others for code, others in self.near[kind].items()}}
                    for kind, codes in self.codes.items()]  # fmt: skip
            self._open(wav=pcm16(self.wav), rate=rate, rows=rows)

    def __repr__(self):
        counts = ", ".join(f"{len(codes)} {kind}" for kind, codes in self.codes.items())
        return f"<tokens: {counts}, {len(self.wav) / self.rate:.2f} s>"

    def _static(self):
        rows = []
        for kind, codes in self.codes.items():
            for code in list(dict.fromkeys(codes))[:6]:
                times = [f"{i * STEPS[kind]:.2f}" for i, other in enumerate(codes) if other == code]
                near = [f"{other} ({distance:.2f})" for other, distance in self.near[kind][code]]
                rows.append([kind, str(code), ", ".join(times), ", ".join(near)])
        head = ["kind", "code", "heard at, s", "nearest codes (distance; the usual one is 1)"]
        streams = show.streams(*self.codes.values(), self.wav, self.rate)
        return [streams, show.table(rows, head, "The first codes")]


def neighbours(codes, table, count=4):
    """Nearest entries of a codebook (K, D) for each distinct code: {code: [(other, distance)]}.
    Distances are shares of the usual one: the median from that code to all the others."""
    codes, table = sorted(set(codes)), table.detach().float().cpu()
    distances = torch.cdist(table[codes], table)  # (codes, K)
    usual = distances.median(1).values.clamp(min=1e-9)
    distances[torch.arange(len(codes)), codes] = float("inf")  # none is its own neighbour
    best = distances.topk(min(count, len(table) - 1), largest=False)  # (codes, count)
    near = {}
    for code, scale, values, others in zip(codes, usual, best.values, best.indices):
        near[code] = [(int(k), round(float(d / scale), 3)) for d, k in zip(values, others)]
    return near


class Interleave(Widget):
    """Drag the ratio of text to audio tokens: the blocks of an answer, and when each sound starts.
    n_text, n_audio: tokens of the whole answer (audio: cut to groups of 5); first: audio tokens
    that the vocoder needs before it speaks. Its own work is not counted."""

    script = "interleave"
    SPEED = 100  # tokens a second, to begin with
    SETTING = ("text_block", "audio_block", "tokens_per_second")

    def __init__(self, n_text, n_audio, interactive=False, first=FIRST):
        if n_text < 1 or n_audio < GROUP_SIZE:
            raise ValueError(f"an answer needs text and at least one group of {GROUP_SIZE} audio "
                             "tokens.")
        self.n_text, self.n_audio = int(n_text), int(n_audio) // GROUP_SIZE * GROUP_SIZE
        self.first = first
        self.layouts = {name: [layout.text_block, layout.audio_block]
                        for name, layout in dialogue.LAYOUTS.items()}  # fmt: skip
        for sizes in self.layouts.values():
            if sizes[0] is None:  # all text first
                sizes[0] = self.n_text + 1
        super().__init__(interactive, blocks=[])
        self.plan()
        if interactive:
            self._open(layouts=self.layouts, n_text=self.n_text, n_audio=self.n_audio)

    def plan(self, text_block=10, audio_block=15, tokens_per_second=SPEED):
        """The blocks in order, see `schedule`; the page shows them. text_block 0: no text."""
        setting = dict(zip(self.SETTING, (text_block, audio_block, tokens_per_second)))
        blocks = schedule(self.n_text, self.n_audio, *setting.values(), self.first)
        sounds = [block for block in blocks if block["kind"] == "audio"]
        waits = [block["wait"] for block in sounds if block["wait"] > 1e-6]
        silence = f"{len(waits)} waits, {sum(waits):.2f} s of silence in all."
        words = f"First sound after {sounds[0]['plays']:.2f} s; "
        self._set(blocks=blocks, message=words + (silence if waits else "then no wait."), **setting)
        return blocks

    def _on_set(self, message, _):
        self.plan(**{name: int(message.get(name, self._state[name])) for name in self.SETTING})

    def __repr__(self):
        ratio = f"{self._state['text_block']}:{self._state['audio_block']}"
        return f"<interleave: {self.n_text} text and {self.n_audio} audio tokens, {ratio}>"

    def _static(self):
        state, rows = self._state, []
        speed = state["tokens_per_second"]
        for name, sizes in self.layouts.items():
            blocks = schedule(self.n_text, self.n_audio, *sizes, speed, self.first)
            sounds = [block for block in blocks if block["kind"] == "audio"]
            times = sounds[0]["plays"], sum(b["wait"] for b in sounds), blocks[-1]["ready"]
            rows.append([name, *(f"{time:.2f}" for time in times)])
        generated = [(b["start"], b["ready"], f"{b['kind'][0].upper()}{b['count']}")
                     for b in state["blocks"]]  # fmt: skip
        voiced = [b for b in state["blocks"] if b["kind"] == "audio"]
        heard = [(b["plays"], b["plays"] + b["seconds"], f"sound {number}")
                 for number, b in enumerate(voiced, 1)]  # fmt: skip
        title = (f"{state['text_block']} text, {state['audio_block']} audio tokens, "
                 f"{speed} tokens a second")  # fmt: skip
        words = f"{title}. {state['message']}"
        drawn = show.alignment(generated, heard, ("generated", "heard"), title, words)
        head = ["layout", "first sound, s", "silence later, s", "all generated, s"]
        caption = f"The layouts of the paper's Table 1 at {speed} tokens a second"
        return [drawn, show.table(rows, head, caption)]


def schedule(n_text, n_audio, text_block, audio_block, tokens_per_second, first=FIRST):
    """Blocks of an answer as they are generated: dicts of kind, count, start and ready (s).

    Those of audio also have plays (s, when its sound starts), seconds of sound, and wait (s of
    silence before or in it, once the voice has begun). The voice begins with `first` audio tokens,
    in whatever block they end; then each group of five plays when it is ready and the one before is
    over. The order of the tokens is that of dialogue.Layout; once there is no more text the audio
    still counts in blocks. Raises ValueError for a rate of 0 or below."""
    if tokens_per_second <= 0:
        raise ValueError(f"{tokens_per_second} tokens a second never make an answer: "
                         "pass a number above 0.")
    ids, groups = config.IdsConfig(), n_audio // GROUP_SIZE
    text_ids = [ids.first_text] * n_text if text_block else []
    audio_ids = interleave.merge([0, 0] * groups, [0, 0, 0] * groups, ids)
    layout = dialogue.Layout("yours", text_block, audio_block)
    answer = layout.arrange(text_ids, audio_ids, ids)[:-1]  # without eot
    # how many ids are known with each audio token, then when each group is ready
    places = [place for place, token in enumerate(answer, 1) if token >= ids.n_text]
    ready = iter(place / tokens_per_second for place in places[GROUP_SIZE - 1 :: GROUP_SIZE])
    end = places[min(first, len(places)) - 1] / tokens_per_second
    blocks, done = [], 0
    for spoken, run in groupby(answer, lambda token: token >= ids.n_text):
        count = len(list(run))
        while count:
            size = min(count, audio_block) if spoken else count
            kind, start = "audio" if spoken else "text", done / tokens_per_second
            count -= size
            done += size
            block = {"kind": kind, "count": size, "start": start, "ready": done / tokens_per_second}
            if spoken:
                n_groups = size // GROUP_SIZE
                block |= {"plays": None, "wait": 0.0, "seconds": n_groups * GROUP_SECONDS}
                for group in range(n_groups):
                    plays = max(end, next(ready))
                    block["plays"] = block["plays"] if group else plays
                    block["wait"] += plays - end
                    end = plays + GROUP_SECONDS
            blocks.append(block)
    return blocks


class Ode(Widget):
    """The flow's way from noise to a mel: drag the step, see the mel, hear it through the vocoder.
    states: (bins, frames) at each of `times`; synth(state) gives (N,) samples at `rate` Hz, called
    once for each state when it is first needed; hop_seconds: of a frame."""

    script = "ode"

    def __init__(self, states, times, synth, interactive=False, rate=SAMPLE_RATE,
                 hop_seconds=0.010):  # fmt: skip
        self.states = [array(torch.as_tensor(state).squeeze(), 2, "a state") for state in states]
        self.times = [float(time) for time in times]
        self.rate, self.hop_seconds = rate, hop_seconds
        if len(self.states) < 2 or len(self.states) != len(self.times):
            raise ValueError("the stepper needs two states or more and one time for each of them.")
        self._synth, self._given, self._sounds = synth, list(states), {}
        super().__init__(interactive)
        if interactive:
            last = self.states[-1]  # its scale serves all: noise is wider than any mel
            low, high = float(last.min()), float(last.max())
            scaled = [255 * (state - low) / max(high - low, 1e-6) for state in self.states]
            palette = (255 * matplotlib.colormaps["viridis"](np.arange(256))[:, :3]).round()
            pictures = [state.clip(0, 255).astype(np.uint8).tobytes() for state in scaled]
            sounds = [pcm16(self.sound(k)) for k in range(len(states))]
            self._open(pictures=pictures, bins=last.shape[0], frames=last.shape[1],
                       times=self.times, rate=rate, sounds=sounds, hop=hop_seconds, low=low,
                       high=high, palette=palette.astype(np.uint8).tobytes())  # fmt: skip

    def sound(self, step):
        """(N,) samples of what the vocoder makes of the state after `step` steps."""
        if step not in self._sounds:
            wav = torch.as_tensor(self._synth(self._given[step]))
            self._sounds[step] = wav.detach().float().cpu().flatten()
        return self._sounds[step]

    def __repr__(self):
        bins, frames = self.states[-1].shape
        return f"<ode: {len(self.states) - 1} steps, mel ({bins} bins, {frames} frames)>"

    def _static(self):
        last = len(self.states) - 1
        chosen = sorted({0, (last + 1) // 2, last})
        title = f"From noise to mel in {last} steps"
        sounds = [(f"step {k}, t = {self.times[k]:.2f}", self.sound(k)) for k in chosen]
        return [show.trajectory(self.states, self.times, title, hop_seconds=self.hop_seconds),
                show.compare(*sounds, rate=self.rate)]  # fmt: skip


class VoiceControl(Widget):
    """Say a sentence in a manner: choose it and the temperature, press Speak, compare measures.

    The backbone is asked as in its training for synthesis: the TTS marker after bos, the sentence
    with its manner as a tag ("(slow) the river runs") as the user's turn, and an answer of audio
    tokens alone. It knows the sentences of the curriculum best; one manner at a time. takes: newest
    first, dicts with manner, temperature, seed, seconds, f0 in Hz, energy in dB, wav. manners:
    those of the static view, said when it is first shown."""

    script = "voice"
    GROUPS = {"Plain": ("normal",), "Rate": ("slow", "fast"), "Pitch": ("high", "low"),
              "Loudness": ("loud", "soft"), "Mood": ("happy", "sad", "angry", "calm")}  # fmt: skip
    KEPT = 8  # takes
    LONGEST = 500  # audio ids: 12 s

    def __init__(self, model, sentence="the river runs down to the ocean", interactive=False,
                 manners=("normal", "slow", "high")):  # fmt: skip
        super().__init__(interactive, phase="idle", sentence=sentence, takes=[], said=0)
        self.model, self.sentence, self.manners = model, sentence, manners
        self.takes, self._thread = [], None
        if interactive:
            self._open(groups={name: list(group) for name, group in self.GROUPS.items()})

    def speak(self, manner="normal", temperature=SAMPLING["temperature"], seed=0, sentence=None):
        """(N,) samples at model.vocoder.sample_rate. ValueError: unknown manner, empty sentence."""
        sentence = self.sentence if sentence is None else sentence.strip().lower()
        if manner not in (known := ("normal", *MANNERS)):
            raise ValueError(f"unknown manner {manner!r}: choose one of {', '.join(known)}.")
        if not sentence:
            raise ValueError("there is nothing to say: type a sentence.")
        model = self.model
        prompt = model.prompt(model.text.encode(tagged(sentence, manner)), marker=config.TTS)
        steps = model.generate(prompt, layout=dialogue.layout("audio_only"), seed=seed,
                               temperature=temperature, max_tokens=self.LONGEST)  # fmt: skip
        ids = [step.id for step in steps if step.kind in SPOKEN]
        wav = model.synthesize(ids[: len(ids) // GROUP_SIZE * GROUP_SIZE], seed)
        voice = measure(audio.resample(wav, model.vocoder.sample_rate), sentence)
        take = {"manner": manner, "temperature": temperature, "seed": seed, "wav": wav,
                "seconds": voice.seconds, "f0": voice.f0, "energy": voice.energy}  # fmt: skip
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
            temperature, seed = float(message["temperature"]), int(message["seed"])
            self.speak(message["manner"], temperature, seed, message["sentence"])
            rate = self.model.vocoder.sample_rate
            takes = [{**take, "sound": pcm16(take["wav"]), "rate": rate} for take in self.takes]
            for take in takes:
                del take["wav"]  # a page takes bytes
            seconds = len(self.takes[0]["wav"]) / rate
            self._set(phase="idle", takes=takes, said=self._state["said"] + 1,
                      message=f"Said it: {seconds:.2f} s.")  # fmt: skip
            self._tell({"type": "play"})
        except Exception as fault:  # the thread has nobody above it
            self._set(phase="idle", message="", error=str(fault) or type(fault).__name__)

    def __repr__(self):
        return f'<voice control: "{self.sentence}", {len(self.takes)} takes>'

    def _static(self):
        for manner in self.manners:
            if not any(take["manner"] == manner for take in self.takes):
                self.speak(manner)
        rate, takes = self.model.vocoder.sample_rate, self.takes[::-1]
        sounds = [show.sound(take["wav"], rate, take["manner"], self.sentence, level=False)
                  for take in takes]  # fmt: skip
        rows = [[take["manner"], take["temperature"], take["seconds"], round(take["f0"]),
                 take["energy"]] for take in takes]  # fmt: skip
        head = ["manner", "temperature", "speech, s", "pitch, Hz", "level, dB"]
        return [show.compare(*sounds), show.table(rows, head, "Measured")]
