"""Text to ids: Step-1's SentencePiece Unigram model, or a small one of the mini's sentences.

Both are one `tokenizers.Tokenizer`. The published file is a protobuf of 74,752 pieces, read here
without a SentencePiece library. (AutoTokenizer of transformers 5 rebuilds it as BPE and gets most
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

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # piece types of the SentencePiece format; 1 is normal
UNIGRAM = 1  # its model_type
SPACE = "▁"
FIRST_TEXT = 68  # ids below are markers
ROLES = ("human\n", "assistant\n", "system\n")  # ids 39, 40, 41 of the mini, unused in Step-1
MANNERS = ("slow", "fast", "high", "low", "loud", "soft", "happy", "sad", "angry", "calm")
NOTES = ("do", "re", "mi", "fa", "sol", "la", "ti", "octave")  # that a word is sung on
HOW = MANNERS + NOTES
TAGS = tuple(f"({how})" for how in HOW)  # ids 42..59 of the mini: how words are said, or sung
STEP1_MARKERS = (
    "<unk>", "<s>", "</s>", "<|EOT|>", "<|BOT|>", "<|CALL_START|>", "<|CALL_END|>",
    "<|THINK_START|>", "<|THINK_END|>", "<|IMG_START|>", "<|IMG_END|>", "<|META_START|>",
    "<|META_END|>", "<im_patch>", "<im_start>", "<im_end>",
    *(f"<unused_{i}>" for i in range(16, 31)), "<audio_start>", "<audio_end>", "<text_start>",
    "<text_end>", "<|TTS|>", "<|ASR|>", "<|TQAA|>", "<|AQTA|>", *ROLES, *TAGS,
    *(f"<unused_{i}>" for i in range(60, FIRST_TEXT)),
)  # fmt: skip
MINI_NORMALIZERS = [
    normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase(),
    normalizers.Replace("’", "'"), normalizers.Replace(Regex("[^a-z']+"), " "), normalizers.Strip(),
]  # fmt: skip
MAX_PIECE = 4  # characters, ▁ included: keeps pieces near 3 characters
LONGEST_PIECE = 1000  # bytes of a published piece: the library cannot take endless ones
ANCHOR = "<s>"  # stands before a text that must not get a leading space
AUTO = {  # for AutoTokenizer; an answer is generated from its end, hence padding on the left
    "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
    "padding_side": "left", "model_input_names": ["input_ids", "attention_mask"],
}  # fmt: skip
AUTO_MARKERS = dict(bos_token=ANCHOR, eos_token="<|EOT|>", unk_token="<unk>", pad_token="<unk>")


def tagged(text, manner):
    """A text that says how it is said: "(slow) the river runs"; unchanged for any other manner."""
    return f"({manner}) {text}" if manner in HOW else text


def normalise(text):
    """The words of a sentence as the judge compares them.

    Lower case, no punctuation but apostrophes, single spaces; "(slow)" is not spoken and left out.
    """
    return " ".join(re.sub(r"\([^)]*\)|[^\w' ]", " ", text.lower()).split())


class TextTokenizer:
    """Text ↔ ids, by from_file, from_sentencepiece or train; `n_text` is the number of its ids."""

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
        """Read Step-1's tokenizer.model (Unigram, byte fallback). FileNotFoundError, ValueError."""
        pieces, model_type = read_sentencepiece(_bytes(path), path)
        if model_type != UNIGRAM:
            fault = f"{path} holds a SentencePiece model of type {model_type}"
            raise ValueError(f"{fault}; only Unigram (1) is supported")
        # The first three, <unk> <s> </s>, are markers whatever types and scores the file gives.
        vocab = [(piece, 0.0 if i < 3 else score) for i, (piece, score, _) in enumerate(pieces)]
        tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        special, plain = [], []
        for i, (piece, _, kind) in enumerate(pieces):
            if i < 3 or kind in (UNKNOWN, CONTROL):
                special.append(piece)
            elif kind == USER_DEFINED:
                plain.append(piece)
        return cls(_finished(tokenizer, special, plain))

    @classmethod
    def train(cls, texts, n_text=512):
        """A small Unigram model of lower-case English: letters, apostrophe, space, no accents.

        texts: strings to learn from. Ids: Step-1's markers 0..67, with role headers and manner tags
        on unused ones, then n_text - 68 pieces of at most MAX_PIECE characters (fewer, and spare
        ids, if the texts hold too little). ValueError if n_text leaves no room for the letters.
        """
        alphabet = [SPACE, *"'abcdefghijklmnopqrstuvwxyz"]
        room = n_text - FIRST_TEXT
        if room < len(alphabet):
            least = FIRST_TEXT + len(alphabet)
            raise ValueError(f"n_text must be at least {least} to hold markers and letters")
        normalizer, words = normalizers.Sequence(MINI_NORMALIZERS), Counter()
        for text in texts:
            words.update(SPACE + word for word in normalizer.normalize_str(text).split())
        pieces = train_unigram(words, room, alphabet)
        spare = [(f"<SPARE_{i}>", -99.0) for i in range(room - len(pieces))]  # in no text
        vocab = [(marker, 0.0) for marker in STEP1_MARKERS] + pieces + spare
        tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0))
        tokenizer.normalizer = normalizer
        # Every word begins with ▁, also after a marker: its pieces are the same everywhere.
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
        plain = [*ROLES, *TAGS]
        return cls(_finished(tokenizer, [m for m in STEP1_MARKERS if m not in plain], plain))

    def encode(self, text, *, bos=False, prefix=True, specials=True):
        """Ids of a text. bos: begin with `<s>`.

        prefix=False: the text goes on after a marker, without Step-1's leading space piece.
        specials=False: markers spelt out in the text are read letter by letter.
        """
        # Cut inside each marker, so that no part holds one.
        cuts = [] if specials else [match.start() + 1 for match in self.markers.finditer(text)]
        encoded = [self.anchor] if bos else []
        for a, b in zip([0, *cuts], [*cuts, len(text)]):
            anchored = a > 0 or not prefix  # the official code also puts a marker in front
            part = ANCHOR * anchored + text[a:b]
            encoded += self.tokenizer.encode(part, add_special_tokens=False).ids[anchored:]
        return encoded

    def decode(self, ids, skip_specials=True):
        """Text of ids. A streamed answer decodes all its ids again: pieces do not stand alone."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_specials)

    def save(self, path):
        """Write a tokenizer.json."""
        self.tokenizer.save(str(path))

    def save_pretrained(self, folder):
        """Write tokenizer.json and tokenizer_config.json: AutoTokenizer then gives the same ids."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save(folder / "tokenizer.json")
        known = {name: marker for name, marker in AUTO_MARKERS.items() if marker in self.specials}
        config = json.dumps({**AUTO, **known}, indent=2) + "\n"
        (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")


def _finished(tokenizer, special, plain):
    """Add the decoder and the markers, which are cut out of a text before all else.

    Only the special ones can be left out by decode.
    """
    apart = [decoders.Replace(tag, f" {tag}") for tag in plain if tag in TAGS]  # "on (fast) the"
    steps = decoders.Replace(SPACE, " "), *apart, decoders.ByteFallback(), decoders.Fuse()
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])
    return tokenizer


def _bytes(path):
    path = Path(path)
    if not path.is_file():
        remedy = "give a tokenizer.json or a tokenizer.model"
        raise FileNotFoundError(f"no tokenizer at {path}: {remedy}")
    return path.read_bytes()


# ---- training a Unigram model (Kudo 2018, section 3.2) -------------------------------------------
# By hand: the UnigramTrainer of `tokenizers` gives other pieces each time, and too few of them.


def train_unigram(words, size, alphabet, max_piece=MAX_PIECE):
    """Pieces of a Unigram model: [(piece, log probability)], at most `size`, all of the alphabet.

    words: Counter of words. Starts from frequent substrings, then alternates two rounds of EM with
    dropping the fifth of the pieces whose loss costs least.
    """
    seeds = Counter()
    for word, count in sorted(words.items()):
        for a in range(len(word)):
            for b in range(a + 1, min(a + max_piece, len(word)) + 1):
                seeds[word[a:b]] += count
    longer = [piece for piece in seeds if len(piece) > 1]
    longer.sort(key=lambda piece: (-seeds[piece] * len(piece), piece))
    counts = {piece: float(seeds[piece]) for piece in longer[: 4 * size]}
    counts |= {letter: seeds[letter] + 1.0 for letter in alphabet}
    while True:
        for _ in range(2):
            counts = _expected_counts(words, counts, alphabet)
        if len(counts) <= size:
            break
        costs = _removal_costs(counts)
        longer = [piece for piece in counts if piece not in alphabet]
        longer.sort(key=lambda piece: (-costs[piece], piece))
        keep = max(size, int(0.8 * len(counts))) - len(alphabet)
        counts = {piece: counts[piece] for piece in [*alphabet, *longer[:keep]]}
    total = sum(counts.values())
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [(piece, round(math.log(count / total), 6)) for piece, count in ranked]


def _expected_counts(words, counts, alphabet):
    """One round of EM: expected uses of each piece over all ways to cut each word."""
    total = sum(counts.values())
    probs = {piece: count / total for piece, count in counts.items()}
    longest = max(map(len, probs))
    expected = dict.fromkeys(alphabet, 1e-3)
    for word, times in words.items():
        n = len(word)
        spans = ((a, b) for b in range(1, n + 1) for a in range(max(0, b - longest), b))
        edges = [(a, b, probs[word[a:b]]) for a, b in spans if word[a:b] in probs]
        # The forward-backward algorithm: probability of all cuts before and behind each place.
        forward = [1.0] + [0.0] * n
        backward = [0.0] * n + [1.0]
        for a, b, prob in edges:  # ordered by end
            forward[b] += forward[a] * prob
        for a, b, prob in sorted(edges, reverse=True):  # ordered by start, last first
            backward[a] += prob * backward[b]
        for a, b, prob in edges:
            use = times * forward[a] * prob * backward[b] / forward[n]
            expected[word[a:b]] = expected.get(word[a:b], 0.0) + use
    return {piece: n for piece, n in expected.items() if n >= 0.5 or piece in alphabet}


def _removal_costs(counts):
    """Loss of log likelihood when a piece is replaced by its best cut into others, per piece."""
    total = math.log(sum(counts.values()))
    score = {piece: math.log(count) - total for piece, count in counts.items()}
    costs = {}
    for piece in score:
        best = [0.0] + [-math.inf] * len(piece)  # Viterbi over the places in the piece
        for b in range(1, len(piece) + 1):
            for a in range(b):
                if b - a < len(piece) and piece[a:b] in score:
                    best[b] = max(best[b], best[a] + score[piece[a:b]])
        costs[piece] = counts[piece] * (score[piece] - best[-1])
    return costs


def read_sentencepiece(data, name="model"):
    """Pieces [(text, score, type)] and model_type of a ModelProto (bytes). Raises ValueError."""
    pieces, model_type, fault = [], UNIGRAM, f"{name} is not a SentencePiece model"
    try:
        for number, value in fields(memoryview(data)):
            if number == 1:  # repeated SentencePiece: 1 piece, 2 score, 3 type
                entry = dict(fields(value))
                (score,) = struct.unpack("<f", entry.get(2, bytes(4)))
                if len(entry[1]) > LONGEST_PIECE or not math.isfinite(score):
                    raise ValueError("a piece is too long, or its score no number")
                pieces.append((bytes(entry[1]).decode(), score, entry.get(3, 1)))
            elif number == 2:  # TrainerSpec: 3 model_type
                model_type = dict(fields(value)).get(3, UNIGRAM)
    except (LookupError, TypeError, ValueError, struct.error) as error:
        raise ValueError(f"{fault}: it is cut short or something else") from error
    if not pieces:
        raise ValueError(f"{fault}: it holds no pieces")
    return pieces, model_type
