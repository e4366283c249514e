"""Many questions at once, for evaluation."""
import numpy as np

from aqaa.tokenizers.text import normalise

BATCH = 32  # questions tokenised and answered at once
MAX_ANSWER = 700  # ids: the longest answers of the curriculum have about 350


def ask_all(model, wavs, *, batch=BATCH, seed=0, speak=True, progress=None, **sampling):
    """Answer many questions fast: a generator of (index, text, wav (N,) float32 or None), in no particular order.

    wavs: list of (N,) float at 16 kHz, as are the answers. Questions of similar length are tokenised and generated
    together; the vocoder takes answers one by one. speak=False leaves the sound out. sampling goes to the generator
    (temperature, top_p).
    """
    from tqdm import tqdm

    order = sorted(range(len(wavs)), key=lambda i: len(wavs[i]))
    with tqdm(total=len(wavs), desc=progress, disable=not progress, unit="question", leave=False) as bar:
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            for i, (text, audio_ids) in zip(chosen, answer_batch(model, [wavs[i] for i in chosen], seed, **sampling)):
                yield i, text, speak_ids(model, audio_ids, seed) if speak else None
                bar.update()


def speak_ids(model, audio_ids, seed=0):
    """Audio ids of an answer -> (N,) float32 at 16 kHz; no ids, no samples."""
    from aqaa.audio import resample

    if not audio_ids:
        return np.zeros(0, np.float32)
    return resample(model.synthesize(audio_ids, seed=seed), model.config.hift.sampling_rate).numpy()


def answer_batch(model, wavs, seed=0, **sampling):
    """Questions (N,) float at 16 kHz -> [(text, audio ids of whole groups)], tokenised and generated together."""
    import torch

    from aqaa.backbone.generation import generate_batch
    from aqaa.pipeline import MIN_AUDIO
    from aqaa.tokenizers import interleave

    sounds = [torch.as_tensor(np.asarray(wav, dtype=np.float32)).to(model.device) for wav in wavs]
    pairs = zip(model.linguistic.encode_batch(sounds), model.semantic.encode_batch(sounds), strict=True)
    prompts = [model.prompt(interleave.merge(first.cpu(), second.cpu(), model.ids)) for first, second in pairs]
    settings = {"max_tokens": MAX_ANSWER, **own_sampling(model), **sampling}
    answers = []
    for steps in generate_batch(
        model.backbone, prompts, model.ids, model.layout, seed=seed, min_audio=MIN_AUDIO, **settings
    ):
        text, audio = model.layout.parse([step.id for step in steps], model.ids)
        answers.append((normalise(model.text.decode(text)), interleave.groups(audio, model.ids).reshape(-1).tolist()))
    return answers


def own_sampling(model):
    """How the model samples when it is not told: the defaults of its `generate`."""
    from aqaa.pipeline import SAMPLING

    return {name: SAMPLING[name] for name in ("temperature", "top_p")}
