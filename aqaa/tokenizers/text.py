"""Text to ids: Step-1's SentencePiece Unigram model, or a small one trained on the mini's own sentences.

Both are one `tokenizers.Tokenizer`. The published file is a protobuf of 74,752 pieces; a few fields of it are read here
by hand, so that no SentencePiece library is needed. (AutoTokenizer of transformers 5 rebuilds it as BPE and gets most
strings wrong.) The mini keeps Step-1's marker ids 0..67 and has about 3 characters in a piece.
"""

import json
import math
import re
import struct
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from aqaa.tokenizers.protobuf import fields

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # piece types of the SentencePiece format
UNIGRAM = 1  # its model_type
SPACE = "▁"
FIRST_TEXT = 68  # ids below are markers
ROLES = ("human\n", "assistant\n", "system\n")  # ids 39, 40, 41 of the mini, unused in Step-1
MANNERS = ("slow", "fast", "high", "low", "loud", "soft", "happy", "sad", "angry", "calm")
TAGS = tuple(f"({manner})" for manner in MANNERS)  # ids 42..51 of the mini: how the words that follow are said
STEP1_MARKERS = (
    "<unk>", "<s>", "</s>", "<|EOT|>", "<|BOT|>", "<|CALL_START|>", "<|CALL_END|>", "<|THINK_START|>", "<|THINK_END|>",
    "<|IMG_START|>", "<|IMG_END|>", "<|META_START|>", "<|META_END|>", "<im_patch>", "<im_start>", "<im_end>",
    *(f"<unused_{i}>" for i in range(16, 31)), "<audio_start>", "<audio_end>", "<text_start>", "<text_end>",
    "<|TTS|>", "<|ASR|>", "<|TQAA|>", "<|AQTA|>", *ROLES, *TAGS, *(f"<unused_{i}>" for i in range(52, FIRST_TEXT)),
)  # fmt: skip
MAX_PIECE = 4  # characters, ▁ included: keeps pieces near 3 characters
LONGEST_PIECE = 1000  # bytes of a published piece: the library cannot take endless ones
ANCHOR = "<s>"  # stands before a text that must not get a leading space
AUTO = {  # what AutoTokenizer is told; an answer is generated from its end, hence padding on the left
    "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "padding_side": "left",
    "model_input_names": ["input_ids", "attention_mask"],
}  # fmt: skip
AUTO_MARKERS = {"bos_token": ANCHOR, "eos_token": "<|EOT|>", "unk_token": "<unk>", "pad_token": "<unk>"}


def tagged(text, manner):
    """A text that says how it is said: "(slow) the river runs"; as it is in the normal manner, or in none."""
    return f"({manner}) {text}" if manner in MANNERS else text


class TextTokenizer:
    """Text ↔ ids. Build it with from_file, from_sentencepiece or train; `n_text` is the number of its ids."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.n_text = tokenizer.get_vocab_size(with_added_tokens=True)
        self.anchor = tokenizer.token_to_id(ANCHOR)
        added = tokenizer.get_added_tokens_decoder().values()
        self.specials = [token.content for token in added if token.special]
        self.markers = re.compile("|".join(map(re.escape, self.specials)))

    @classmethod
    def from_file(cls, path):
        """Read a tokenizer.json. Raises FileNotFoundError, or ValueError if it is not one."""
        text = _bytes(path).decode("utf-8", errors="replace")
        try:
            return cls(Tokenizer.from_str(text))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from error

    @classmethod
    def from_sentencepiece(cls, path):
        """Read Step-1's tokenizer.model (Unigram, byte fallback). Raises FileNotFoundError or ValueError."""
        pieces, model_type = read_sentencepiece(_bytes(path), path)
        if model_type != UNIGRAM:
            raise ValueError(f"{path} holds a SentencePiece model of type {model_type}; only Unigram (1) is supported")
        vocab = [(piece, 0.0 if i < 3 else score) for i, (piece, score, _) in enumerate(pieces)]
        tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = _decoder()
        special = [p for i, (p, _, kind) in enumerate(pieces) if kind in (UNKNOWN, CONTROL) or i < 3]
        plain = [p for i, (p, _, kind) in enumerate(pieces) if kind == USER_DEFINED and i >= 3]
        return cls(_with_markers(tokenizer, special, plain))

    @classmethod
    def train(cls, texts, n_text=512):
        """A small Unigram model of lower-case English: letters, apostrophe, space (accents are stripped).

        texts: strings to learn from. Ids: Step-1's markers 0..67, with role headers and manner tags on unused ones,
        then n_text - 68 pieces of at most MAX_PIECE characters (fewer, and spare ids, if the texts hold too little).
        Raises ValueError if n_text leaves no room for the letters.
        """
        alphabet = [SPACE, "'", *"abcdefghijklmnopqrstuvwxyz"]
        if n_text < FIRST_TEXT + len(alphabet):
            raise ValueError(f"n_text must be at least {FIRST_TEXT + len(alphabet)} to hold markers and letters")
        words, clean = Counter(), _mini_normalizer()
        for text in texts:
            words.update(SPACE + word for word in clean.normalize_str(text).split())
        pieces = train_unigram(words, n_text - FIRST_TEXT, alphabet)
        spare = [(f"<SPARE_{i}>", -99.0) for i in range(n_text - FIRST_TEXT - len(pieces))]  # no text can hold these
        vocab = [(marker, 0.0) for marker in STEP1_MARKERS] + pieces + spare
        tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0))
        tokenizer.normalizer, tokenizer.pre_tokenizer = _mini_normalizer(), _mini_pre_tokenizer()
        tokenizer.decoder = _decoder()
        return cls(_with_markers(tokenizer, [m for m in STEP1_MARKERS if m not in ROLES + TAGS], [*ROLES, *TAGS]))

    def encode(self, text, *, bos=False, prefix=True, specials=True):
        """Ids of a text. bos: begin with `<s>`. prefix=False: the text goes on after a marker (no leading space piece
        in Step-1's model). specials=False: markers spelt out in the text are read letter by letter."""
        parts = [text] if specials else _break_markers(text, self.markers)
        encoded = [self.anchor] if bos else []
        for part in parts:
            if prefix and part is parts[0]:
                encoded += self.tokenizer.encode(part, add_special_tokens=False).ids
            else:  # a marker in front, taken off again, is how the official code meets such a text
                encoded += self.tokenizer.encode(ANCHOR + part, add_special_tokens=False).ids[1:]
        return encoded

    def decode(self, ids, skip_specials=True):
        """Text of ids; a streamed answer decodes its whole text again each time, as pieces do not stand alone."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_specials)

    def save(self, path):
        """Write a tokenizer.json."""
        self.tokenizer.save(str(path))

    def save_pretrained(self, folder):
        """Write tokenizer.json and tokenizer_config.json, by which AutoTokenizer of transformers gives the same ids."""
        folder, config = Path(folder), {**AUTO, **{k: v for k, v in AUTO_MARKERS.items() if v in self.specials}}
        folder.mkdir(parents=True, exist_ok=True)
        self.save(folder / "tokenizer.json")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _break_markers(text, markers):
    """Cut a text inside each of its markers, so that no part holds one. (Overlapping markers do not occur.)"""
    cuts = [found.start() + 1 for found in markers.finditer(text)]
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def _with_markers(tokenizer, special, plain):
    """Make markers of pieces: found in a text before anything else; the special ones can be left out by decode."""
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    tokenizer.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in plain])
    return tokenizer


def _decoder():
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return decoders.Sequence(steps)


def _mini_normalizer():
    steps = [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase(), normalizers.Replace("’", "'")]
    clean = [normalizers.Replace(Regex("[^a-z']+"), " "), normalizers.Strip()]
    return normalizers.Sequence(steps + clean)


def _mini_pre_tokenizer():
    """Every word begins with ▁, also after a marker, so that a word has one spelling in pieces wherever it stands."""
    return pre_tokenizers.Metaspace(prepend_scheme="always", split=True)


# --- training a Unigram model (Kudo 2018, section 3.2), small enough for plain Python, the same on every machine -----


def train_unigram(words, size, alphabet, max_piece=MAX_PIECE):
    """Pieces of a Unigram model: [(piece, log probability)], at most `size`, the alphabet always among them.

    words: Counter of words. Starts from frequent substrings, then alternates expectation-maximisation with dropping
    the pieces whose loss costs least.
    """
    seeds = Counter()
    for word, count in sorted(words.items()):
        for a in range(len(word)):
            for b in range(a + 2, min(a + max_piece, len(word)) + 1):
                seeds[word[a:b]] += count
    kept = sorted(seeds, key=lambda piece: (-seeds[piece] * len(piece), piece))[: 4 * size]
    weights = {piece: float(seeds[piece]) for piece in kept}
    letters = Counter()
    for word, count in words.items():
        for letter in word:
            letters[letter] += count
    weights.update({letter: letters[letter] + 1.0 for letter in alphabet})
    while True:
        for _ in range(2):
            weights = _expected_counts(words, weights, alphabet)
        if len(weights) <= size:
            break
        costs = _removal_costs(weights)
        longer = sorted((p for p in weights if p not in alphabet), key=lambda piece: (-costs[piece], piece))
        keep = max(size, int(0.8 * len(weights))) - len(alphabet)
        weights = {piece: weights[piece] for piece in [*alphabet, *longer[:keep]]}
    total = sum(weights.values())
    ranked = sorted(weights.items(), key=lambda item: (-item[1], item[0]))
    return [(piece, round(math.log(weight / total), 6)) for piece, weight in ranked]


def _expected_counts(words, weights, alphabet):
    """One round of EM: how often each piece is used, over all ways to cut each word (forward-backward)."""
    total = sum(weights.values())
    chance = {piece: weight / total for piece, weight in weights.items()}
    longest = max(map(len, chance))
    counts = dict.fromkeys(alphabet, 1e-3)
    for word, times in words.items():
        n = len(word)
        spans = ((a, b) for b in range(1, n + 1) for a in range(max(0, b - longest), b))
        edges = [(a, b, chance[word[a:b]]) for a, b in spans if word[a:b] in chance]
        ahead, behind = [1.0] + [0.0] * n, [0.0] * n + [1.0]
        for a, b, p in edges:  # ordered by end
            ahead[b] += ahead[a] * p
        for a, b, p in sorted(edges, reverse=True):  # ordered by start, last first
            behind[a] += p * behind[b]
        for a, b, p in edges:
            piece = word[a:b]
            counts[piece] = counts.get(piece, 0.0) + times * ahead[a] * p * behind[b] / ahead[n]
    return {piece: count for piece, count in counts.items() if count >= 0.5 or piece in alphabet}


def _removal_costs(weights):
    """By how much the log likelihood falls when a piece is replaced by its best cut into others."""
    total = math.log(sum(weights.values()))
    score = {piece: math.log(weight) - total for piece, weight in weights.items()}
    costs = {}
    for piece in score:
        best = [0.0] + [-math.inf] * len(piece)
        for b in range(1, len(piece) + 1):
            for a in range(b):
                if b - a < len(piece) and piece[a:b] in score:
                    best[b] = max(best[b], best[a] + score[piece[a:b]])
        costs[piece] = weights[piece] * (score[piece] - best[-1])
    return costs


def _bytes(path):
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}: give a tokenizer.json or a tokenizer.model")
    return path.read_bytes()


# --- a reader for the few protobuf fields that a SentencePiece model needs -------------------------------------------


def read_sentencepiece(data, name="model"):
    """Pieces [(text, score, type)] and model_type of a SentencePiece ModelProto (bytes). Raises ValueError."""
    try:
        pieces, model_type = [], UNIGRAM
        for number, value in fields(data):
            if number == 1:  # repeated SentencePiece: 1 piece, 2 score, 3 type
                entry = dict(fields(value))
                (score,) = struct.unpack("<f", entry.get(2, bytes(4)))
                if len(entry[1]) > LONGEST_PIECE or not math.isfinite(score):
                    raise ValueError("a piece is too long, or its score no number")
                pieces.append((entry[1].decode(), score, entry.get(3, NORMAL)))
            elif number == 2:  # TrainerSpec: 3 model_type
                model_type = dict(fields(value)).get(3, UNIGRAM)
    except (LookupError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{name} is not a SentencePiece model: it is cut short or something else") from error
    if not pieces:
        raise ValueError(f"{name} is not a SentencePiece model: it holds no pieces")
    return pieces, model_type


def normalise(text):
    """The words of a sentence as the judge compares them: lower case, no punctuation but apostrophes, single spaces.

    What stands in round brackets, "(slow)", is not spoken and left out.
    """
    return " ".join(re.sub(r"\([^)]*\)|[^\w' ]", " ", text.lower()).split())
