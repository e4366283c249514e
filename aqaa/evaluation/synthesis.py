"""`aqaa bench synthesis`: what the vocoder keeps of true codes of a teacher's recording.

The judge scores the words beside those of the teacher's own wav (its ceiling); timbre is scored by
mel-cepstral distance, melody by the f0 error, frame by frame: codes and mels run in step."""

from functools import partial

import numpy as np
import torch
from scipy.fft import dct

from aqaa.audio import mel
from aqaa.config import SAMPLE_RATE, MelConfig
from aqaa.corpus.plan import held_out
from aqaa.evaluation import accuracy
from aqaa.pitch import f0
from aqaa.tokenizers import interleave
from aqaa.tokenizers.text import normalise

CEPSTRA = 24  # coefficients compared; the zeroth, loudness, is left out
FLOOR = 30  # dB: frames of the reference quieter than this under its loudest are not compared
FRAME = MelConfig(n_fft=640, sampling_rate=SAMPLE_RATE, hop_size=160, win_size=640)
TAKES = 4  # times that each answer is spoken, from other noise
OCTAVE_SLIP = 9  # semitones: a larger f0 error is the tracker's and is counted apart


def measure(model, corpus, limit=None, workers=1, seed=0):
    """`copy_synthesis` of the answers in `corpus` that no part of the vocoder of `model` has seen.
    Raises ValueError if there are none."""
    items = [item for item in corpus.items(role="answer") if item.answer_id and held_out(item)]
    if not items:
        raise ValueError(f"{corpus.folder} holds no answers that were kept from training: "
                         "make the corpus again")  # fmt: skip
    texts = [item.text for item in items[:limit]]
    wavs = [accuracy.recording(corpus, item) for item in items[:limit]]
    codes = []
    for wav in map(torch.from_numpy, wavs):
        linguistic = model.linguistic.encode(wav, energy_norm=False)
        semantic = model.semantic.encode(wav, energy_norm=False)
        codes.append(interleave.merge(linguistic, semantic, model.ids))
    judge, _ = accuracy.make_judge(accuracy.all_answers(), texts, seed)
    seeds = range(seed, seed + TAKES)
    result = copy_synthesis(model.synthesize, codes, wavs, texts, judge, workers, seeds)
    return {**result, "takes": TAKES}


def copy_synthesis(synthesize, codes, wavs, texts, judge, workers=1, seeds=()):
    """Score of a vocoder on true codes: a dict of n, shares and means, and what was misheard.

    synthesize: audio ids (5G,), 0-based -> wav (N,). codes: a list of such ids. wavs: the
    recordings they were made from, (N,) float at 16 kHz. texts: what these say, all known to the
    judge. `lenient` and `strict` are shares heard right in the synthesis, `teacher_lenient` and
    `teacher_strict` in the recordings. With seeds each answer is spoken once for each, by
    synthesize(ids, seed=seed), and scores are over all takes: the flow starts from noise, and a few
    answers more or less are heard right with each."""
    speakers = [partial(synthesize, seed=seed) for seed in seeds] or [synthesize]
    spoken = (speak(ids) for speak in speakers for ids in codes)
    made = [np.asarray(wav, dtype=np.float32).reshape(-1) for wav in spoken]
    wanted = [normalise(text) for text in texts]
    result, misheard = {"n": len(wanted)}, []
    for mode in ("lenient", "strict"):
        for name, sounds in ((mode, made), (f"teacher_{mode}", wavs)):
            heard = judge.hear_all(sounds, mode == "strict", workers, f"judge, {name}")
            pairs = list(zip(heard, wanted * (len(sounds) // len(wanted)), strict=True))
            right = [heard == text for heard, text in pairs]
            result[name] = float(np.mean(right))
            if name == "lenient":
                misheard = [{"said": t, "heard": h} for h, t in pairs if h != t]
            elif name == "strict" and seeds:
                takes = np.reshape(right, (len(seeds), -1))  # (takes, answers)
                result["strict_of_takes"] = takes.mean(1).tolist()
    pairs = list(zip(made, list(wavs) * len(speakers), strict=True))
    distances = [mel_cepstral_distance(*pair) for pair in pairs]
    melodies = [f0_error(*pair) for pair in pairs]
    result["mel_cepstral_distance_db"] = float(np.nanmean(distances))
    for name in ("semitones", "slips", "voicing"):
        result[f"f0_{name}"] = float(np.nanmean([melody[name] for melody in melodies]))
    return {**result, "misheard": misheard}


def mel_cepstral_distance(wav, reference):
    """Mean mel-cepstral distance in dB of two wavs (N,) at 16 kHz, over the reference's speech. (10
    / ln 10) sqrt(2 sum_k (c_k - r_k)^2), k = 1..24 (Kubichek 1993), where c_k are cosine
    coefficients of the 80-band log mel magnitudes. NaN if the reference holds no speech."""
    ours, theirs = _in_step(_cepstra(wav), _cepstra(reference))
    loud = theirs[:, 0] > theirs[:, 0].max(initial=-np.inf) - FLOOR / 20 * np.log(10)
    if not loud.any():
        return float("nan")
    difference = (ours - theirs)[loud, 1:]
    return float(10 / np.log(10) * np.sqrt(2 * np.square(difference).sum(1)).mean())


def _cepstra(wav):
    """(N,) -> (T, 25), the zeroth being the mean log magnitude."""
    wav = torch.as_tensor(np.asarray(wav, dtype=np.float32))
    if len(wav) < FRAME.n_fft:
        return np.zeros((0, CEPSTRA + 1))
    bands = mel(wav, FRAME).numpy().T  # (T, 80)
    return dct(bands, axis=1)[:, : CEPSTRA + 1] / (2 * FRAME.num_mels)


def _in_step(ours, theirs):
    """Two rows of frames, cut to the length of the shorter."""
    frames = min(len(ours), len(theirs))
    return ours[:frames], theirs[:frames]


def f0_error(wav, reference):
    """Melody of wav (N,) against reference: {"semitones", "slips", "voicing"}. semitones: median
    absolute error over frames that are voiced in both. slips: share of those off by more than 9.
    voicing: share of frames voiced in one alone. NaN where nothing counts."""
    ours, theirs = _in_step(*(f0(np.asarray(x, dtype=np.float32)) for x in (wav, reference)))
    both = (ours > 0) & (theirs > 0)
    error = 12 * np.abs(np.log2(ours[both] / theirs[both]))
    return {
        "semitones": float(np.median(error)) if len(error) else float("nan"),
        "slips": float((error > OCTAVE_SLIP).mean()) if len(error) else float("nan"),
        "voicing": float(((ours > 0) != (theirs > 0)).mean()) if len(ours) else float("nan"),
    }
