"""Codes of the corpus: stored, read, counted."""

import math
from pathlib import Path

import numpy as np

from aqaa.files import reading, replacing

ANSWERS = "answers"  # the file of what the answer voice says, whatever part of the corpus it is of


def usage(codes, size):
    """{"size", "used", "perplexity", "entropy_bits"} of codes (N,) in [0, size), or a list of such.

    Perplexity is `size` where all are equally frequent. Raises ValueError for none, or outside."""
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


def store_codes(path, names, linguistic, semantic):
    """Write an npz of the code sequences of utterances by their ids, small enough to travel."""
    pairs = list(zip(linguistic, semantic, strict=True))
    with replacing(Path(path)) as part, open(part, "wb") as file:
        np.savez_compressed(
            file,
            ids=np.array(names),
            lengths=np.array([[len(codes) for codes in pair] for pair in pairs], dtype=np.int16),
            codes=np.concatenate([codes for pair in pairs for codes in pair]).astype(np.int16),
        )


def load_codes(folder, items):
    """List of (linguistic, semantic) int arrays, in the order of `items`: `stored_codes` of them.

    Raises ValueError if there are none of an item, and what `stored_codes` raises."""
    pairs = stored_codes(folder)
    if missing := [item.id for item in items if item.id not in pairs]:
        raise ValueError(f"{folder} has no codes of {missing[0]}: it belongs to another corpus, "
                         "run `aqaa train codes`")
    return [pairs[item.id] for item in items]


def stored_codes(*folders):
    """{id: (linguistic, semantic)} of the files of codes in some folders, of which a later one
    counts where two have a file of that name. ID~1, ID~2, … are bent copies of an utterance. What
    the answer voice says counts as its own file has it: others may have an earlier voice's rows.

    Raises FileNotFoundError if there are none at all, ValueError if they are damaged."""
    files = {path.name: path for folder in folders
             for path in sorted(Path(folder).glob("codes*.npz"))}  # fmt: skip
    if not files:
        raise FileNotFoundError(f"{folders[-1]} holds no codes.npz: run `aqaa train codes` first")
    pairs, last = {}, codes_file("", ANSWERS).name  # what is read last counts
    for path in sorted(files.values(), key=lambda path: path.name == last):
        pairs |= _read(path)
    return pairs


def _read(path):
    """{id: (linguistic, semantic)} of one file. Raises ValueError if it is damaged."""
    with reading(path, "run `aqaa train codes` again"), np.load(path) as file:
        names = file["ids"].tolist()
        lengths, codes = (file[key].astype(np.int64) for key in ("lengths", "codes"))
    parts = np.split(codes, lengths.reshape(-1).cumsum()[:-1])
    return dict(zip(names, zip(parts[::2], parts[1::2], strict=True), strict=True))


def codes_file(folder, part=""):
    """Where the codes of a part of a corpus lie: codes.npz, codes_wider.npz, …"""
    return Path(folder) / ("codes.npz" if part in ("", "questions") else f"codes_{part}.npz")


def replaceable(source, folder):
    """{file of codes in `source`: where it goes in `folder`}. Raises ValueError where one there has
    utterances that the new one lacks: a part of a corpus, coded to learn something, shall not take
    the place of the whole."""
    files = {path: Path(folder) / path.name for path in sorted(Path(source).glob("codes*.npz"))}
    mine = set().union(*map(_read, files))
    for path, there in files.items():
        if there.exists() and (lost := _read(there).keys() - mine):
            raise ValueError(f"{there} has {len(lost):,} utterances that {path} lacks: code the "
                             "whole part, export to another folder, or move that file away")
    return files
