"""Codes of the corpus: stored, read, counted."""

import math
from pathlib import Path

import numpy as np

from aqaa.files import reading, replacing


def usage(codes, size):
    """{"size", "used", "perplexity", "entropy_bits"} of codes (N,) in [0, size), or a list of such.

    Perplexity is `size` where all are equally frequent. Raises ValueError for none, or outside.
    """
    rows = codes if len(codes) and np.ndim(codes[0]) else [codes]
    codes = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    if not len(codes):
        raise ValueError("there are no codes to count")
    if not 0 <= codes.min() <= codes.max() < size:
        raise ValueError(f"codes must lie in 0..{size - 1}; found {codes.min()}..{codes.max()}")
    probs = np.bincount(codes, minlength=size) / len(codes)
    probs = probs[probs > 0]
    entropy = float(-(probs * np.log(probs)).sum())  # nats
    perplexity, bits = math.exp(entropy), entropy / math.log(2)
    return {"size": size, "used": len(probs), "perplexity": perplexity, "entropy_bits": bits}


def store_codes(folder, items, linguistic, semantic):
    """Write codes.npz: the code sequences of each item, small enough to travel."""
    pairs = list(zip(linguistic, semantic, strict=True))
    with replacing(Path(folder) / "codes.npz") as part, open(part, "wb") as file:
        np.savez_compressed(
            file,
            ids=np.array([item.id for item in items]),
            lengths=np.array([[len(codes) for codes in pair] for pair in pairs], dtype=np.int16),
            codes=np.concatenate([codes for pair in pairs for codes in pair]).astype(np.int16),
        )


def load_codes(folder, items, shipped=None):
    """List of (linguistic, semantic) int arrays, in the order of `items`, from folder/codes.npz.

    shipped: a folder whose codes serve when there are none in `folder`. Raises FileNotFoundError if
    there are none at all, ValueError if they are damaged, or of other utterances.
    """
    paths = [Path(place) / "codes.npz" for place in (folder, shipped or folder)]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} holds no codes.npz: run `aqaa train codes` first")
    with reading(path, "run `aqaa train codes` again"), np.load(path) as file:
        names = file["ids"].tolist()
        lengths, codes = (file[key].astype(np.int64) for key in ("lengths", "codes"))
    parts = np.split(codes, lengths.reshape(-1).cumsum()[:-1])
    pairs = dict(zip(names, zip(parts[::2], parts[1::2], strict=True), strict=True))
    if missing := [item.id for item in items if item.id not in pairs]:
        raise ValueError(f"{path} has no codes of {missing[0]}: it belongs to another corpus, run "
                         "`aqaa train codes`")
    return [pairs[item.id] for item in items]
