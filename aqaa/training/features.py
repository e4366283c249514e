"""What the training stages read: features of every utterance, computed once, and later its codes.

Both are plain .npy arrays of concatenated rows with a .json of lengths beside them, written whole or not at all.
"""

import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from aqaa import audio
from aqaa.config import preset
from aqaa.files import read_object, reading, replacing, write_json
from aqaa.pitch import f0
from aqaa.tokenizers.linguistic import LinguisticTokenizer
from aqaa.training.speech_tokenizers import F0_FLOOR, Utterances, phone_ids

AGAIN = "remove features.json beside it, and run `aqaa train features` again"
ANSWER_SHARE = 4.0  # an answer-voice utterance is drawn this much more often than a question


def as_heard(item, wav):
    """The wave as a tokenizer takes it: questions peak-normalised, answers at the level they were spoken at."""
    wav = torch.from_numpy(np.asarray(wav, dtype=np.float32) / 32768)
    return wav if item.role == "answer" else audio.energy_norm(wav)


@cache
def front_end():
    """A linguistic tokenizer of one block whose CMVN does nothing: its `features` are raw LFR rows."""
    return LinguisticTokenizer(replace(preset("mini").linguistic, num_blocks=1))


def _features(wav):
    """Of one utterance, in fp16: LFR rows (T, 560), log-mel at 25 Hz (T, 512), f0 in octaves above F0_FLOOR (T, 4)."""
    torch.set_num_threads(1)
    rows = front_end().features(wav)
    log_mel = audio.log_mel(wav).T  # (T, 128)
    frames = len(log_mel) // 4 * 4
    pitch = f0(wav.numpy())[:frames]
    pitch = np.pad(pitch, (0, frames - len(pitch)))
    octaves = np.where(pitch > 0, np.log2(np.maximum(pitch, F0_FLOOR) / F0_FLOOR) + 1e-3, 0)
    log_mel = log_mel[:frames].reshape(frames // 4, -1)
    return tuple(x.astype(np.float16) for x in (rows.numpy(), log_mel.numpy(), octaves.reshape(-1, 4)))


def prepare(corpus, items, folder, workers=2):
    """Compute and store the features of `items`, unless they are already there. Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "features.json"
    names = [item.id for item in items]
    if done.exists() and read_object(done, AGAIN).get("ids") == names:
        return folder
    parts = {"lfr": [], "log_mel": [], "f0": []}
    jobs = (as_heard(item, corpus.wav(item)) for item in items)
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads half-alive
    quiet = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_DFL)}  # no traceback at Ctrl-C
    with ProcessPoolExecutor(workers, context, **quiet) as pool:
        found = pool.map(_features, jobs, chunksize=32) if workers > 1 else map(_features, jobs)
        for lfr, log_mel, pitch in tqdm(found, total=len(items), desc="features", unit="utt", mininterval=5):
            for key, value in zip(parts, (lfr, log_mel, pitch), strict=True):
                parts[key].append(value)
    lengths = {key: [len(value) for value in values] for key, values in parts.items()}
    for key, values in parts.items():
        save_array(folder / f"{key}.npy", np.concatenate(values))
    write_json(done, {"ids": names, "lengths": lengths})
    return folder


def utterances(folder, items, kind):
    """The stored features as `Utterances`: kind "lfr" (with CMVN statistics applied later) or "log_mel" (with f0)."""
    folder = Path(folder)
    path = folder / "features.json"
    with reading(path, AGAIN):
        lengths = read_object(path, AGAIN)["lengths"][kind]
    flat = load_array(folder / f"{kind}.npy", sum(lengths))
    extra = {"f0": np.array(load_array(folder / "f0.npy", sum(lengths)))} if kind == "log_mel" else {}
    phones = [phone_ids(item.phones) for item in items]
    weights = [ANSWER_SHARE if item.role == "answer" else 1.0 for item in items]
    return Utterances(np.array(flat), lengths, phones, extra, np.array(weights))


def normalise(data, model: LinguisticTokenizer):
    """Set the CMVN of `model` from the rows of `data`, and apply it to them in place."""
    rows = data.rows[:: max(1, len(data.rows) // 200_000)].astype(np.float32)
    mean, deviation = rows.mean(0), rows.std(0)
    model.add_shift.copy_(torch.from_numpy(-mean))
    model.rescale.copy_(torch.from_numpy(1 / deviation))
    for start in range(0, len(data.rows), 1 << 16):
        part = data.rows[start:start + (1 << 16)]
        part[:] = (part.astype(np.float32) - mean) / deviation


def save_array(path, array):
    """np.save that never leaves half a file."""
    with replacing(path) as part, open(part, "wb") as file:
        np.save(file, array)


def load_array(path, rows):
    """An array of so many rows, mapped. Raises ModelError if it is damaged or has another number."""
    with reading(path, AGAIN):
        array = np.lib.format.open_memmap(path, mode="r")
        if len(array) != rows:
            raise ValueError(f"{len(array)} rows in place of {rows}")
        return array
