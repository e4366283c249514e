"""What the audio tokenizers learn from: features of every utterance, computed once, and batches.

On disk they are plain .npy arrays of concatenated rows with a .json of lengths beside them, written
whole or not at all."""

import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from aqaa import audio
from aqaa.config import preset
from aqaa.files import read_object, reading, replacing, write_json
from aqaa.pitch import f0
from aqaa.tokenizers.linguistic import LinguisticTokenizer, row_count
from aqaa.tokenizers.phones import phone_ids

AGAIN = "remove features.json beside it, and run `aqaa train features` again"
ANSWER_SHARE = 4.0  # an answer-voice utterance is drawn this much more often than a question
FRAME = 160  # samples of a log-mel frame
WIDTHS = {"lfr": 560, "log_mel": 512, "f0": 4}  # of a row
BATCH = 64  # utterances whose codes are made at once
F0_FLOOR = 60.0  # Hz; melody is measured in octaves above it


def as_heard(item, wav):
    """int16 -> float (N,) as a tokenizer takes it: questions peak-normalised, answers as is."""
    wav = torch.from_numpy(np.asarray(wav, dtype=np.float32) / 32768)
    return wav if item.role == "answer" else audio.energy_norm(wav)


@cache
def front_end():
    """A linguistic tokenizer of one block, whose CMVN does nothing: its features are raw rows."""
    return LinguisticTokenizer(replace(preset("mini").linguistic, num_blocks=1))


def _features(wav):
    """fp16 LFR rows (T, 560), log-mel at 25 Hz (T, 512), f0 in octaves above F0_FLOOR (T, 4)."""
    torch.set_num_threads(1)
    rows = front_end().features(wav)
    log_mel = audio.log_mel(wav).T  # (T, 128)
    frames = len(log_mel) // 4 * 4
    pitch = f0(wav.numpy())[:frames]
    pitch = np.pad(pitch, (0, frames - len(pitch)))
    octaves = np.log2(np.maximum(pitch, F0_FLOOR) / F0_FLOOR) + 1e-3
    octaves = np.where(pitch > 0, octaves, 0).reshape(-1, 4)
    log_mel = log_mel[:frames].reshape(frames // 4, -1)
    return tuple(x.astype(np.float16) for x in (rows.numpy(), log_mel.numpy(), octaves))


def prepare(corpus, items, folder, workers=2):
    """Compute and store the features of `items`, unless they are there. Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "features.json"
    names = [item.id for item in items]
    if done.exists() and read_object(done, AGAIN).get("ids") == names:
        return folder
    slow = [item.length // FRAME // 4 for item in items]
    lengths = {"lfr": [row_count(item.length) for item in items], "log_mel": slow, "f0": slow}
    jobs = (as_heard(item, corpus.wav(item)) for item in items)
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads half-alive
    quiet = (signal.SIGINT, signal.SIG_DFL)  # no traceback at Ctrl-C
    with ExitStack() as stack:
        files = {}
        for kind, width in WIDTHS.items():  # rows go to the disk as they come: hours fill a memory
            part = stack.enter_context(replacing(folder / f"{kind}.npy"))
            files[kind] = np.lib.format.open_memmap(
                part, mode="w+", dtype=np.float16, shape=(sum(lengths[kind]), width)
            )
        pool = stack.enter_context(ProcessPoolExecutor(workers, context, signal.signal, quiet))
        rows = pool.map(_features, jobs, chunksize=32) if workers > 1 else map(_features, jobs)
        filled = dict.fromkeys(files, 0)
        for utterance in tqdm(rows, "features", len(items), unit="utt", mininterval=5):
            for kind, values in zip(files, utterance, strict=True):
                files[kind][filled[kind] : filled[kind] + len(values)] = values
                filled[kind] += len(values)
    write_json(done, {"ids": names, "lengths": lengths})
    return folder


def _load(path, rows):
    """A stored array of so many rows. Raises ModelError if it is damaged or has another number."""
    with reading(path, AGAIN):
        array = np.lib.format.open_memmap(path, mode="r")
        if len(array) != rows:
            raise ValueError(f"{len(array)} rows in place of {rows}")
        return array


class Utterances:
    """Feature rows of many utterances (fp16), with phones and, for the semantic part, f0.

    rows: (sum T, D), lengths: (N,), phones: list of N lists of ids, extra: dict of (sum T, ...)
    arrays, weights: (N,) relative chance of each to be drawn."""

    def __init__(self, rows, lengths, phones, extra=None, weights=None):
        self.rows, self.lengths = rows, np.asarray(lengths)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.phones, self.extra, self.weights = phones, extra or {}, weights

    def gather(self, indices, data=None):
        """Zero-padded (B, T, D) float32 of `data` (default the feature rows) and lengths (B,)."""
        data = self.rows if data is None else data
        parts = (data[self.starts[i] : self.starts[i + 1]].astype(np.float32) for i in indices)
        rows = pad_sequence(list(map(torch.from_numpy, parts)), batch_first=True)
        return rows, torch.from_numpy(self.lengths[indices])

    def targets(self, indices):
        """Concatenated phone ids and their counts, as ctc_loss takes them."""
        phones = [self.phones[i] for i in indices]
        flat = torch.tensor([phone for row in phones for phone in row], dtype=torch.long)
        return flat, torch.tensor([len(row) for row in phones])


def utterances(folder, items, kind):
    """Stored features as `Utterances`: kind "lfr" (CMVN comes later) or "log_mel" (with f0). Raises
    ModelError when they are damaged."""
    folder = Path(folder)
    path = folder / "features.json"
    with reading(path, AGAIN):
        lengths = read_object(path, AGAIN)["lengths"][kind]
    rows = _load(folder / f"{kind}.npy", sum(lengths))
    extra = {"f0": _load(folder / "f0.npy", sum(lengths))} if kind == "log_mel" else {}
    phones = [phone_ids(item.phones) for item in items]
    # What has no phones, noise, teaches no tokenizer.
    weights = [ANSWER_SHARE if item.role == "answer" else float(bool(item.phones))
               for item in items]  # fmt: skip
    return Utterances(rows, lengths, phones, extra, np.array(weights))


def measure_cmvn(data, model):
    """Set the CMVN of a LinguisticTokenizer from the raw rows of `data` that may be drawn."""
    rows = data.rows[:: max(1, len(data.rows) // 200_000)].astype(np.float32)
    model.add_shift.copy_(torch.from_numpy(-rows.mean(0)))
    model.rescale.copy_(torch.from_numpy(1 / rows.std(0)))


class LengthBuckets:
    """Draws batches of items of similar length, so that little is padded. lengths: (N,) frames.
    budget: frames in a batch. weights: relative chance of each item (equal)."""

    def __init__(self, lengths, budget, weights=None):
        self.lengths, self.budget = np.asarray(lengths), budget
        self.order = np.argsort(self.lengths, kind="stable")
        self.rank = np.argsort(self.order)
        probs = np.ones(len(self.lengths)) if weights is None else np.asarray(weights, dtype=float)
        self.probs = probs / probs.sum()

    def draw(self, rng):
        """Indices of one batch: an anchor by weight, then picks from its neighbours in length."""
        anchor = rng.choice(len(self.lengths), p=self.probs)
        size = max(1, int(self.budget // max(self.lengths[anchor], 1)))
        width = min(max(16 * size, 64), len(self.order))
        low = int(np.clip(self.rank[anchor] - width // 2, 0, len(self.order) - width))
        near = self.order[low : low + width]
        probs = self.probs[near] / self.probs[near].sum()
        picks = rng.choice(near, size=min(size, np.count_nonzero(probs)), replace=False, p=probs)
        picks = picks[np.argsort(self.lengths[picks], kind="stable")]
        # The longest sets the padding: it leaves while the padded batch is over the budget.
        while len(picks) > 1 and len(picks) * self.lengths[picks[-1]] > self.budget:
            picks = picks[:-1]
        return picks


def hidden(model, x, lengths):
    """What a tokenizer's encoder makes of its stored features: x (B, T, ...), lengths (B,) in rows
    -> (B, T, D)."""
    if isinstance(model, LinguisticTokenizer):
        return model((x + model.add_shift) * model.rescale, lengths)
    log_mel = x.unflatten(-1, (-1, model.config.n_mels)).flatten(1, 2).transpose(1, 2)
    return model.hidden(log_mel, lengths * 4)[0]


@torch.no_grad()
def codes(model, data, rows, bend=None, seed=()):
    """{row: codes (N,)} of a tokenizer, for rows of its Utterances that are in order of length.

    bend: an Augment for copies from other mouths and microphones. For the same rows and seed the
    mouths of two tokenizers are the same: their sizes are what an Augment draws first."""
    found = {}
    for start in tqdm(range(0, len(rows), BATCH), "codes", unit="batch", mininterval=5):
        batch = rows[start : start + BATCH]
        x, lengths = data.gather(batch)  # (B, T, D), (B,)
        if bend:
            x, _, _ = bend(x, lengths, np.random.default_rng((*seed, start)))
        quantized = model.quantize(hidden(model, x, lengths))  # (B, T)
        for row, ids, length in zip(batch, quantized, lengths.tolist(), strict=True):
            found[row] = ids[:length].numpy()
    return found
