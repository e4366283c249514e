"""From two streams of codes to one stream of ids, and from text and audio ids to an answer.

Three small languages are defined here. The *merge* puts two linguistic and three semantic codes into a group of 120 ms
(AQAA paper 2.1). The *layout* decides how the answer's text and audio ids share one sequence (Table 1). The *prompt*
wraps turns in the markers of Step-1's chat format. Everything is plain Python on ints: no torch.
"""

import re

import numpy as np

from aqaa.config import GROUP_SIZE, LINGUISTIC_PER_GROUP, SEMANTIC_PER_GROUP

KINDS = ("text", "linguistic", "semantic", "marker")
TEXT, LINGUISTIC, SEMANTIC, MARKER = range(4)
GROUP_PATTERN = "L" * LINGUISTIC_PER_GROUP + "S" * SEMANTIC_PER_GROUP
AUDIO_STRING = re.compile(r"<audio_(\d+)>")


def kinds(tokens, ids):
    """Kind of each id, as an index into KINDS: what a loss mask needs.

    tokens (T,) ids of the backbone; ids an IdsConfig. Returns (T,) int8. Rows after the audio ids count as markers.
    """
    tokens = np.asarray(tokens, dtype=np.int64)
    edges = np.array([ids.first_text, ids.n_text, ids.semantic_start, ids.end])
    table = np.array([MARKER, TEXT, LINGUISTIC, SEMANTIC, MARKER], dtype=np.int8)
    return table[np.searchsorted(edges, tokens, side="right")]


def merge(linguistic, semantic, ids):
    """Interleave two streams of codes 2:3; whatever does not fill a group of five is dropped (AQAA paper 2.1).

    linguistic codes in [0, n_linguistic), semantic codes in [0, n_semantic). Returns a list of ids, a multiple of 5.
    Raises ValueError for a code outside its codebook.
    """
    linguistic, semantic = np.asarray(linguistic, dtype=np.int64), np.asarray(semantic, dtype=np.int64)
    _check_codes(linguistic, ids.n_linguistic, "linguistic")
    _check_codes(semantic, ids.n_semantic, "semantic")
    groups = min(len(linguistic) // LINGUISTIC_PER_GROUP, len(semantic) // SEMANTIC_PER_GROUP)
    first = ids.n_text + linguistic[: groups * LINGUISTIC_PER_GROUP].reshape(groups, LINGUISTIC_PER_GROUP)
    second = ids.semantic_start + semantic[: groups * SEMANTIC_PER_GROUP].reshape(groups, SEMANTIC_PER_GROUP)
    return np.concatenate([first, second], axis=1).reshape(-1).tolist()


def _check_codes(codes, size, name):
    if codes.ndim != 1:
        raise ValueError(f"{name} codes must be one row of numbers, not an array of shape {codes.shape}")
    if len(codes) and not 0 <= codes.min() <= codes.max() < size:
        raise ValueError(f"{name} codes must lie in 0..{size - 1}; found {codes.min()}..{codes.max()}")


def groups(tokens, ids):
    """The whole groups in a stream of ids: (G, 5) int64. Text and markers are skipped, broken groups are dropped.

    A missing or spurious id costs only the group it is in: the search starts again at the next L L S S S.
    """
    tokens = np.asarray(tokens, dtype=np.int64)
    kind = kinds(tokens, ids)
    audio = tokens[(kind == LINGUISTIC) | (kind == SEMANTIC)]
    letters = np.where(audio < ids.semantic_start, ord("L"), ord("S")).astype(np.uint8).tobytes().decode()
    starts = np.array([found.start() for found in re.finditer(GROUP_PATTERN, letters)], dtype=np.int64)
    return audio[starts[:, None] + np.arange(GROUP_SIZE)]


def split(tokens, ids):
    """The inverse of merge: (linguistic codes, semantic codes), two lists of 2 and 3 codes a group. See `groups`."""
    whole = groups(tokens, ids)
    linguistic = whole[:, :LINGUISTIC_PER_GROUP] - ids.n_text
    semantic = whole[:, LINGUISTIC_PER_GROUP:] - ids.semantic_start
    return linguistic.reshape(-1).tolist(), semantic.reshape(-1).tolist()


def to_string(tokens, ids):
    """Audio ids as Step-Audio writes them in a prompt: `<audio_17><audio_4>…`. Raises ValueError for another id."""
    for token in tokens:
        if not ids.n_text <= token < ids.end:
            raise ValueError(f"id {token} is not an audio id: those lie in {ids.n_text}..{ids.end - 1}")
    return "".join(f"<audio_{token - ids.n_text}>" for token in tokens)


def from_string(string, ids):
    """The inverse of to_string; anything that is not an audio token is skipped. Raises ValueError for one too large."""
    numbers = [int(number) for number in AUDIO_STRING.findall(string)]
    for number in numbers:
        if number >= ids.n_audio:
            raise ValueError(f"<audio_{number}> does not exist: the last one is <audio_{ids.n_audio - 1}>")
    return [ids.n_text + number for number in numbers]
