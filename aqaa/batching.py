"""Many questions at once, for evaluation."""

import numpy as np
import torch
from tqdm import tqdm

from aqaa.answer import confidence
from aqaa.audio import resample
from aqaa.backbone.generation import generate_batch
from aqaa.hearings import Heard, first_words, unsure
from aqaa.pipeline import MIN_AUDIO, SAMPLING
from aqaa.tokenizers import interleave
from aqaa.tokenizers.text import normalise

BATCH = 32  # questions tokenised and answered at once
MAX_ANSWER = 700  # ids: the longest answers of the curriculum have about 350


def ask_all(model, wavs, *, histories=None, batch=BATCH, seed=0, speak=True, progress=None,
            **sampling):  # fmt: skip
    """A generator of (index, text, wav (N,) float32 or None, confidence), in no particular order.

    wavs: list of (N,) float at 16 kHz, as are the answers. Questions of similar length are
    tokenised and generated together; the vocoder takes answers one by one, and speak=False leaves
    it out. histories: of each question what was said before, (role, text) pairs. sampling goes to
    the generator (temperature, top_p)."""
    order = sorted(range(len(wavs)), key=lambda i: len(wavs[i]))  # little padding in a batch
    bar = {"desc": progress, "disable": not progress, "unit": "question", "leave": False}
    with tqdm(total=len(wavs), **bar) as bar:
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            before = histories and [histories[i] for i in chosen]
            answers = answer_batch(model, [wavs[i] for i in chosen], seed, before, **sampling)
            for i, (text, audio_ids, sure) in zip(chosen, answers):
                yield i, text, speak_ids(model, audio_ids, seed) if speak else None, sure
                bar.update()


def speak_ids(model, audio_ids, seed=0):
    """Audio ids of an answer -> (N,) float32 at 16 kHz; no ids, no samples."""
    if not audio_ids:
        return np.zeros(0, np.float32)
    return resample(model.synthesize(audio_ids, seed), model.config.hift.sampling_rate).numpy()


def answer_batch(model, wavs, seed=0, histories=None, **sampling):
    """Questions (N,) at 16 kHz -> [(text, audio ids of groups, confidence)]; see `ask_all`."""
    sounds = [torch.as_tensor(np.asarray(wav, np.float32)).to(model.device) for wav in wavs]
    heard = map(Heard, model.encode(sounds), sounds)
    prompts = list(map(model.prompt, heard, histories or [()] * len(sounds)))
    return answer_prompts(model, prompts, seed, **sampling)


def answer_prompts(model, prompts, seed=0, **sampling):
    """The same of prompts, lists of ids."""
    settings = {"max_tokens": MAX_ANSWER, "min_audio": MIN_AUDIO, **own_sampling(), **sampling}
    answers = [None] * len(prompts)
    groups = {}  # {decoder: places of its prompts}: turns before a question ask for another one
    for i, prompt in enumerate(prompts):
        groups.setdefault(model.decoder_for(prompt), []).append(i)
    for decoder, chosen in groups.items():
        asked = [prompts[i] for i in chosen]
        made = generate_batch(decoder, asked, model.ids, model.layout, seed=seed, **settings)
        for i, steps in zip(chosen, made, strict=True):
            if unsure(model, prompts[i], first_words(steps)):  # few: each is asked again, alone
                steps = list(model.generate(prompts[i], seed=seed, **settings))
            text, audio = model.layout.parse([step.id for step in steps], model.ids)
            whole = interleave.groups(audio, model.ids).reshape(-1).tolist()
            sure = confidence(steps, model.config.confidence)
            answers[i] = normalise(model.text.decode(text)), whole, sure
    return answers


def own_sampling():
    """The temperature and top_p of an AQAA's `generate` by default."""
    return {name: SAMPLING[name] for name in ("temperature", "top_p")}
