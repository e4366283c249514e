"""What an audio tokenizer heard: small CTC heads that read phones from it, beside the model.

The answer never needs them. They read the linguistic encoder's output (B, T, D), and the vectors of
the semantic codes: what is left of the words once they are codes.
"""

from typing import NamedTuple

import torch
from torch import nn

from aqaa import audio

PHONES = (
    "aa ae ah ao aw ax ay b ch d dh eh er ey f g hh ih iy jh k l m n ng ow oy p r s sh t th uh uw "
    "v w y z zh"
).split()
PHONE_IDS = {name: i for i, name in enumerate(PHONES, 1)}  # 0 is the CTC blank
CLASSES = len(PHONES) + 1
FACTORS = {"linguistic": 3, "semantic": 2}  # CTC outputs a row: fast speech has 20 phones a second
CONTEXT = 7  # semantic rows that one output looks at: a code alone is 40 ms
SECONDS = 0.02  # from one CTC output to the next, of either: 60 ms / 3 and 40 ms / 2


class Phone(NamedTuple):
    """A phone that was heard, and when, in seconds."""

    name: str
    start: float
    end: float


def phone_ids(phones):
    """CMU phone names to 1-based ids. Unknown names, such as pauses, are left out."""
    return [PHONE_IDS[phone] for phone in phones if phone in PHONE_IDS]


class PhoneHead(nn.Module):
    """Rows (B, T, size) to CTC logits (B, T, factor * CLASSES), `factor` outputs a row.

    context: rows around each that are read along, 1 for none; rows beyond the end must be zero.
    """

    def __init__(self, size, factor, context=1):
        super().__init__()
        self.factor = factor
        conv = nn.Conv1d(size, size, context, padding=context // 2, groups=size)
        self.context = conv if context > 1 else None
        out = nn.Linear(2 * size, factor * CLASSES)
        self.layers = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), out)

    def forward(self, rows):
        if self.context:
            rows = rows + self.context(rows.transpose(1, 2)).transpose(1, 2)
        return self.layers(rows)

    def log_probs(self, rows):
        """(B, T, size) -> (B, T * factor, CLASSES), in the order of time."""
        return self(rows).float().unflatten(-1, (self.factor, -1)).flatten(1, 2).log_softmax(-1)


class PhoneHeads(nn.Module):
    """The heads of both tokenizers of an AQAAConfig: the file heads.safetensors of a folder."""

    def __init__(self, config):
        super().__init__()
        self.linguistic = PhoneHead(config.linguistic.output_size, FACTORS["linguistic"])
        size = config.semantic.n_audio_state
        self.semantic = PhoneHead(size, FACTORS["semantic"], CONTEXT)

    @torch.no_grad()
    def heard(self, wav, linguistic, semantic, start=0):
        """{"linguistic": [Phone, …], "semantic": …} of (N,) samples at 16 kHz, which begin at
        sample `start` of a sound; linguistic, semantic: the tokenizers."""
        (wav,) = audio.levelled([wav], True, linguistic.centroids.device)
        hidden = linguistic(linguistic.features(wav)[None])  # (1, T, D)
        codes = semantic.encode(wav, energy_norm=False)
        rows = {"linguistic": hidden, "semantic": code_vectors(semantic, codes[None])}
        start = start / audio.SAMPLE_RATE
        return {name: timed(getattr(self, name).log_probs(row)[0], start)
                for name, row in rows.items()}  # fmt: skip


def code_vectors(semantic, codes, mask=None):
    """Codes (B, T) -> (B, T, D) vectors as the semantic head reads them, zero outside `mask`."""
    vectors = semantic.quantizer._codebook.embed[codes].float()
    vectors = vectors * vectors.shape[-1] ** 0.5  # entries have a length of about 1
    return vectors if mask is None else vectors * mask[..., None]


def best_path(log_probs, lengths):
    """Greedy CTC: lists of phone ids. log_probs (B, T, classes), lengths (B,) in its frames."""
    phones = []
    for row, length in zip(log_probs.argmax(-1), lengths.tolist(), strict=True):
        phones.append([p for p in row[:length].unique_consecutive().tolist() if p])
    return phones


def error_rate(predicted, wanted):
    """What is wrong, missing or too much, in percent of what is wanted: of two lists of lists, of
    phones or of words."""
    from torchaudio.functional import edit_distance  # here: answering needs none of it

    errors = sum(map(edit_distance, predicted, wanted))
    return 100.0 * errors / max(sum(map(len, wanted)), 1)


def timed(log_probs, start=0.0):
    """The best path of one utterance as Phones. log_probs (T, classes), one every SECONDS from
    `start` on.

    CTC says a phone in a frame or two and blanks between: a phone lasts to the middle of the gap.
    """
    path, counts = log_probs.argmax(-1).unique_consecutive(return_counts=True)
    ends = counts.cumsum(0)
    runs = zip(path.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True)
    spoken = [run for run in runs if run[0]]
    edges = [(left[2] + right[1]) / 2 for left, right in zip(spoken, spoken[1:], strict=False)]
    edges = [*(run[1] for run in spoken[:1]), *edges, *(run[2] for run in spoken[-1:])]
    times = [round(start + edge * SECONDS, 3) for edge in edges]
    names = [PHONES[phone - 1] for phone, _, _ in spoken]
    return list(map(Phone, names, times, times[1:]))
