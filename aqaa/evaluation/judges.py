"""An independent ear: pocketsphinx with its bundled English model hears what a spoken answer says.

Lenient: a forced choice among all possible answers (give it 500 or more, so that it cannot guess).
Strict: a bigram language model over the words of the answers, which may hear any mixture of them. A
score means little without the judge's ceiling, its score on the teacher's own recordings."""

import contextlib
import math
import multiprocessing
import signal
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from aqaa.config import SAMPLE_RATE
from aqaa.tokenizers.text import normalise

FRAMES = 100  # a second, of pocketsphinx
PAD = 0.2  # seconds of silence on both sides: the model expects some
DITHER = 1e-4  # digital silence has no logarithm
PEAK = 0.7  # loudness must not matter
SILENCE = 1e-4  # peak under which there is nothing to hear
CHUNK = 4  # wavs a worker takes at a time


class Judge:
    """Hears which of the possible `answers` a recording speaks.

    answers: texts; equal ones count once. bigrams: the texts whose word pairs the strict ear knows,
    if not those. pronunciations: {word: phones of the CMU set} for words that the bundled
    dictionary lacks, for example {"oink": "OY NG K"}. seed: of the dither; the same recording is
    always heard alike, whatever was heard before. Copies can be sent to other processes. Raises
    ValueError for a word without a pronunciation, ImportError where pocketsphinx is missing."""

    def __init__(self, answers, *, bigrams=None, pronunciations=None, seed=0):
        self.answers = _distinct(answers)
        self.bigrams = self.answers if bigrams is None else _distinct(bigrams)
        if not self.answers or not self.bigrams:
            raise ValueError("the judge needs at least one possible answer: none was given")
        self._entries = _entries(self.answers + self.bigrams, pronunciations or {})
        self._decoders, self.seed = {}, seed

    def __getstate__(self):
        return {**self.__dict__, "_decoders": {}}

    def hear(self, wav, strict=False):
        """The sentence heard in wav (N,) float at 16 kHz; "" for silence and for no sentence."""
        pcm = self._prepare(wav)
        if pcm is None:
            return ""
        heard = self._search(self._decoder(strict), pcm).hyp()
        return heard.hypstr if heard else ""

    @staticmethod
    def _search(decoder, pcm):
        decoder.reinit_feat()  # forgets the cepstral mean and the noise of the recording before
        decoder.start_utt()
        decoder.process_raw(pcm, no_search=False, full_utt=True)
        decoder.end_utt()
        return decoder

    def when(self, wav, text):
        """[(word, its first second, its last), …] of a text that wav (N,) is known to say; none
        where it cannot be found there. Raises ValueError for a word that no answer has."""
        words, pcm = normalise(text).split(), self._prepare(wav)
        known = {word for answer in self.answers for word in answer.split()}
        if unknown := [word for word in words if word not in known]:
            raise ValueError(f"no answer of this judge has the word {unknown[0]!r}: give it one")
        if pcm is None:
            return []
        decoder = self._decoder(strict=False)
        chain = [(place, place + 1, 1.0, word) for place, word in enumerate(words)]
        decoder.add_fsg("known", decoder.create_fsg("known", 0, len(words), chain))
        decoder.activate_search("known")
        self._search(decoder, pcm)
        spoken = [part for part in decoder.seg() or () if part.word[0] not in "<("]  # no silence
        found = [(part.word.split("(")[0], part.start_frame / FRAMES - PAD,
                  (part.end_frame + 1) / FRAMES - PAD) for part in spoken]  # fmt: skip
        decoder.activate_search("answers")
        return found if [word for word, _, _ in found] == words else []

    def hear_all(self, wavs, strict=False, workers=1, progress=None):
        """What is heard in each of several wavs, in their order, by `workers` processes. progress:
        the label of a progress bar, or None for no bar."""
        wavs, pool = list(wavs), None
        if workers > 1 and len(wavs) > CHUNK:
            context = multiprocessing.get_context("spawn")  # a fork copies threads half-alive
            pool = ProcessPoolExecutor(workers, context, _start, (self, strict))
            heard = pool.map(_hear, wavs, chunksize=CHUNK)
        else:
            heard = (self.hear(wav, strict) for wav in wavs)
        with pool or contextlib.nullcontext():
            return list(tqdm(heard, progress, len(wavs), leave=False, disable=not progress))

    def _prepare(self, wav):
        """(N,) float -> 16-bit bytes at one level, padded and dithered; None for silence."""
        wav = np.asarray(wav, dtype=np.float32)
        if wav.ndim != 1:
            raise ValueError(f"the judge hears one mono wav (N,), got shape {wav.shape}")
        if not np.isfinite(wav).all():
            raise ValueError("the judge cannot hear values that are not finite (NaN or infinity)")
        peak = np.abs(wav).max(initial=0)
        if peak < SILENCE:
            return None
        wav = np.pad(wav * (PEAK / peak), int(PAD * SAMPLE_RATE))
        wav = wav + np.random.default_rng(self.seed).normal(0, DITHER, len(wav))
        return (wav * 32767).clip(-32768, 32767).astype(np.int16).tobytes()

    def _decoder(self, strict):
        """Made once, with only the needed words: 10 ms, where the whole dictionary takes 1 s."""
        if strict in self._decoders:
            return self._decoders[strict]
        with tempfile.TemporaryDirectory() as folder:
            words = Path(folder, "words.dict")
            words.write_text("\n".join(self._entries) + "\n", encoding="utf-8")
            options = {"dict": str(words), "lm": None, "cmn": "batch", "loglevel": "FATAL"}
            if strict:
                model = Path(folder, "bigram.lm")
                model.write_text(bigram_arpa(self.bigrams), encoding="utf-8")
                options["lm"] = str(model)
            decoder = _pocketsphinx().Decoder(**options)
        if not strict:
            start, end, _, edges = word_graph(self.answers)
            weighted = [(a, b, 1.0, word) for a, b, word in edges]
            decoder.add_fsg("answers", decoder.create_fsg("answers", start, end, weighted))
            decoder.activate_search("answers")
        self._decoders[strict] = decoder
        return decoder


def missing_words(texts):
    """The words of `texts` that the bundled dictionary has no pronunciation for, sorted."""
    return sorted({w for text in texts for w in normalise(text).split()} - set(_dictionary()))


def word_graph(sentences):
    """The smallest acyclic graph whose paths are exactly the sentences (strings of words): (start,
    end, number of states, edges [(from, to, word)]). Raises ValueError if a sentence is empty.

    Equal ends are shared: on 556 answers the search is the same as in a list of alternatives, and
    seven times faster."""
    root = {}
    for sentence in sentences:
        if not sentence.split():
            raise ValueError("an empty sentence has no path in a word graph")
        node = root
        for word in sentence.split():
            node = node.setdefault(word, {})
        node[None] = {}  # the sentence may end here
    states, edges = {((), True): 0}, []  # state 0: the sentence is over and no other goes on

    def fold(node):
        """The state that continues as `node` does; made if there is none yet."""
        words = sorted((word, fold(child)) for word, child in node.items() if word is not None)
        key = tuple(words), None in node
        if key not in states:
            states[key] = len(states)
            edges.extend((states[key], to, word) for word, to in words)
        return states[key]

    start = fold(root)
    stops = {state for (_, stop), state in states.items() if stop} - {0}
    # A state where one sentence ends and another goes on: its incoming words also lead to the end.
    edges += [(a, 0, word) for a, b, word in edges if b in stops]
    return start, 0, len(states), edges


def bigram_arpa(sentences):
    """ARPA text of a bigram language model over sentences, interpolated with unigrams.

    Witten-Bell smoothing (Witten & Bell 1991): after a word seen with many different successors
    more is left for unseen ones. Interpolation is written out as back-off, so any reader of ARPA
    files computes the same numbers."""
    pairs, words, seen = Counter(), Counter(), Counter()  # seen: as the first of a pair
    for sentence in sentences:
        line = ["<s>", *sentence.split(), "</s>"]
        pairs.update(zip(line, line[1:]))
        words.update(line[1:])
        seen.update(line[:-1])
    total, kinds = words.total(), len(words)
    successors = Counter(before for before, _ in pairs)
    single = {w: (count + 0.5) / (total + 0.5 * kinds) for w, count in words.items()}
    left = {w: successors[w] / (successors[w] + seen[w]) for w in seen}  # the share of the unigram
    lines = ["\\data\\", f"ngram 1={kinds + 1}", f"ngram 2={len(pairs)}", "", "\\1-grams:"]
    lines.append(f"-99 <s> {math.log10(left['<s>']):.5f}")
    for word in sorted(single):
        backoff = f" {math.log10(left[word]):.5f}" if word in left else ""
        lines.append(f"{math.log10(single[word]):.5f} {word}{backoff}")
    lines += ["", "\\2-grams:"]
    for (before, word), count in sorted(pairs.items()):
        p = (1 - left[before]) * count / seen[before] + left[before] * single[word]
        lines.append(f"{math.log10(p):.5f} {before} {word}")
    return "\n".join([*lines, "", "\\end\\", ""])


def _distinct(texts):
    return sorted({normalise(text) for text in texts} - {""})


def _pocketsphinx():
    try:
        import pocketsphinx
    except ImportError:
        raise ImportError("the judge needs pocketsphinx: pip install 'aqaa[notebooks]'") from None
    return pocketsphinx


@lru_cache(1)
def _dictionary():
    """{word: its lines of the bundled dictionary, one a pronunciation}."""
    path = Path(_pocketsphinx().get_model_path(), "en-us", "cmudict-en-us.dict")
    entries = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name = line.split(maxsplit=1)[0]
        entries.setdefault(name.split("(")[0], []).append(line)
    return entries


def _entries(answers, pronunciations):
    """Dictionary lines for all words of the answers. Raises ValueError for unknown ones."""
    known, lines = dict(_dictionary()), {}
    for word, phones in pronunciations.items():
        cmu = {phone for rows in _dictionary().values() for x in rows for phone in x.split()[1:]}
        if not phones.split() or set(phones.split()) - cmu:
            raise ValueError(f"the pronunciation {phones!r} of {word!r} is not made of CMU phones "
                             "such as OY NG K")  # fmt: skip
        known[word] = [f"{word} {phones}"]
    for answer in answers:
        for word in answer.split():
            if word not in known:
                raise ValueError(
                    f"the judge has no pronunciation of {word!r} (in the answer {answer!r}): "
                    f"choose another word, or pass pronunciations={{{word!r}: 'its phones'}}"
                )
            lines[word] = known[word]
    return [line for word in sorted(lines) for line in lines[word]]


def _start(judge, strict):
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback at Ctrl-C
    _worker = judge, strict


def _hear(wav):
    judge, strict = _worker
    return judge.hear(wav, strict)
