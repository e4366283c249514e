"""From two streams of codes to one stream of ids, and back.

The *merge* puts two linguistic and three semantic codes into a group of 120 ms (AQAA paper 2.1).
Codes become ids by an offset: text ids come first, then linguistic, then semantic ones. No torch.
"""

import re

import numpy as np

from aqaa.config import GROUP_SIZE, LINGUISTIC_PER_GROUP, SEMANTIC_PER_GROUP

KINDS = ("text", "linguistic", "semantic", "marker")
TEXT, LINGUISTIC, SEMANTIC, MARKER = range(4)
GROUP_PATTERN = "L" * LINGUISTIC_PER_GROUP + "S" * SEMANTIC_PER_GROUP
AUDIO_STRING = re.compile(r"<audio_(\d+)>")


def kinds(tokens, ids):
    """Kind of each id, as an index into KINDS, for loss masks.

    tokens (T,) ids; ids an IdsConfig. Returns (T,) int8; ids beyond the audio ids are markers.
    """
    edges = np.array([ids.first_text, ids.n_text, ids.semantic_start, ids.end])
    table = np.array([MARKER, TEXT, LINGUISTIC, SEMANTIC, MARKER], dtype=np.int8)
    return table[np.searchsorted(edges, np.asarray(tokens, dtype=np.int64), side="right")]


def merge(linguistic, semantic, ids):
    """Interleave two streams of codes 2:3; codes that fill no group of five are dropped.

    linguistic codes in [0, n_linguistic), semantic codes in [0, n_semantic). Returns a list of ids,
    a multiple of 5. Raises ValueError for a code outside its codebook.
    """
    linguistic = _codes(linguistic, ids.n_linguistic, "linguistic")
    semantic = _codes(semantic, ids.n_semantic, "semantic")
    count = min(len(linguistic) // LINGUISTIC_PER_GROUP, len(semantic) // SEMANTIC_PER_GROUP)
    first = linguistic[: count * LINGUISTIC_PER_GROUP].reshape(count, LINGUISTIC_PER_GROUP)
    second = semantic[: count * SEMANTIC_PER_GROUP].reshape(count, SEMANTIC_PER_GROUP)
    # Offsets keep the two codebooks apart in the one vocabulary.
    whole = np.concatenate([ids.n_text + first, ids.semantic_start + second], axis=1)  # (G, 5)
    return whole.reshape(-1).tolist()


def _codes(codes, size, name):
    """(T,) int64, checked."""
    codes = np.asarray(codes, dtype=np.int64)
    if codes.ndim != 1:
        shape = f"an array of shape {codes.shape}"
        raise ValueError(f"{name} codes must be one row of numbers, not {shape}")
    if len(codes) and not 0 <= codes.min() <= codes.max() < size:
        given = f"{codes.min()}..{codes.max()}"
        raise ValueError(f"{name} codes must lie in 0..{size - 1}; these lie in {given}")
    return codes


def groups(tokens, ids):
    """The whole groups in a stream of ids: (G, 5) int64. Text, markers, broken groups are skipped.

    A missing or spurious id costs only its group: the search starts again at the next L L S S S.
    """
    tokens = np.asarray(tokens, dtype=np.int64)
    kind = kinds(tokens, ids)  # (T,)
    audio = tokens[(kind == LINGUISTIC) | (kind == SEMANTIC)]
    # One letter an id, so that a regular expression does the search.
    letters = np.where(audio < ids.semantic_start, b"L", b"S").tobytes().decode()
    starts = [match.start() for match in re.finditer(GROUP_PATTERN, letters)]
    return audio[np.array(starts, dtype=np.int64)[:, None] + np.arange(GROUP_SIZE)]


def split(tokens, ids):
    """The inverse of merge: (linguistic codes, semantic codes), two lists. See `groups`."""
    whole = groups(tokens, ids)
    linguistic = whole[:, :LINGUISTIC_PER_GROUP] - ids.n_text
    semantic = whole[:, LINGUISTIC_PER_GROUP:] - ids.semantic_start
    return linguistic.reshape(-1).tolist(), semantic.reshape(-1).tolist()


def to_string(tokens, ids):
    """Audio ids as Step-Audio writes them in a prompt: `<audio_17><audio_4>…`, else ValueError."""
    for token in tokens:
        if not ids.n_text <= token < ids.end:
            fault = f"id {token} is not an audio id"
            raise ValueError(f"{fault}: those lie in {ids.n_text}..{ids.end - 1}")
    return "".join(f"<audio_{token - ids.n_text}>" for token in tokens)


def from_string(string, ids):
    """The inverse of to_string; other text is skipped. Raises ValueError for a number too large."""
    numbers = [int(number) for number in AUDIO_STRING.findall(string)]
    for number in numbers:
        if number >= ids.n_audio:
            last = f"the last one is <audio_{ids.n_audio - 1}>"
            raise ValueError(f"<audio_{number}> does not exist: {last}")
    return [ids.n_text + number for number in numbers]
