"""Examples from which the language model learns, drawn from a book of utterances.

Stages follow the paper (3.1 and 3.2) at mini size. Every example is one sequence of the one
vocabulary; an answer's text begins with its manner, "(slow) …", unless that is the normal one:
  text   written question -> written answer           asr   speech -> its words
  tts    words (and manners) -> answer voice           next  speech, continued (audio continuation)
  joined an utterance, one part of it as words, the other as sound (interleaved audio and text)
  tqaa   written question -> spoken answer             aqta  spoken question -> written answer
  aqtaa  spoken question -> written and spoken answer, in blocks of the layout
  turns  the same behind earlier turns, which are text, as in a chat"""

import itertools
from collections import Counter
from functools import cache, cached_property

import numpy as np

from aqaa.config import AQTA, ASR_MARKER, GROUP_SIZE, TQAA, TTS
from aqaa.corpus.curriculum import VOICE
from aqaa.corpus.voices import NATURAL
from aqaa.corpus.wider import turns_before
from aqaa.tokenizers import dialogue, interleave
from aqaa.tokenizers.text import MANNERS, TAGS, normalise, tagged

# What a target weighs in the loss: words are few and say all; a question is heard, not to be said.
TEXT_WEIGHT, ANSWER_WEIGHT, HEARD_WEIGHT = 4.0, 1.0, 0.1
# Skills of the voice, by StepEval-Audio-360's names: what SFT-2 is for, whichever a book has.
SPECIAL = ("Sing", "Creativity", "Role-playing", "Gaming", "Speech Emotion Control",
           "Voice Instruction Following")  # fmt: skip
NATURAL_WEIGHT = 4.0  # of what a natural voice says, among the others
# What the mini does not know is asked more often than there is of it, most of all in words that it
# knows: only there does one word decide.
INTENT_WEIGHTS = {"outside_open": 1.5, "outside_sentence": 0.8, "outside_world": 2.5,
                  "outside_near": 3.0, "switch": 2.0}  # fmt: skip
HISTORY, FOLLOWS = (0.5, 0.35, 0.15), 0.7  # chances of 0, 1, 2 further turns; of a second question
UNHEARD = "unheard"  # the intent of noise
MISHEARD = 0.4  # largest share of an utterance without copies that is heard as in others' copies
REMINDER = 0.25  # share of other answers in SFT-2: without any, what they teach is soon forgotten


class Book:
    """Everything that is said, as ids: one entry an utterance, with its words and its audio ids."""

    def __init__(self, config, tokenizer, items, codes, lines, joints=()):
        """items: of a corpus; codes: list of (linguistic, semantic) arrays, or `stored_codes`, in
        which an item may have copies; lines: of `plan.texts`; joints: {id: the groups at which its
        manner changes}. Raises ValueError when the answer to a question is missing, or codes are.
        """
        self.config, self.tokenizer, self.items, self.lines = config, tokenizer, items, lines
        self.joints = dict(joints)
        copies = [[pair] for pair in codes] if isinstance(codes, list) else _copies(codes, items)
        self.heard = [[np.array(interleave.merge(*pair, config.ids), np.int64) for pair in pairs]
                      for pairs in copies]  # fmt: skip
        self.audio = [variants[0] for variants in self.heard]  # as spoken
        self.encode = cache(tokenizer.encode)  # a text to its ids, the same list each time
        self.about = cache(lambda intent: [line for line in lines if line["intent"] == intent])
        self.questions = [i for i, item in enumerate(items) if item.role == "question"]
        self.spoken_words = [i for i, item in enumerate(items) if item.intent != UNHEARD]
        self.follows = [i for i, item in enumerate(items) if item.role == "follow"]
        self.voiced = [i for i, x in enumerate(items) if x.role == "answer" or x.is_voiced]
        self.answers = {items[i].answer_id: i for i in self.voiced if items[i].answer_id}
        asked = self.questions + self.follows
        if missing := {items[i].answer_id for i in asked} - set(self.answers):
            raise ValueError(f"{len(missing)} answers were never spoken, {min(missing)} among them")

    @cached_property
    def confused(self):
        """`confusions` of all that has bent copies: counted when it is first asked for."""
        return confusions(self.heard, self.config.ids.end)

    def balance(self):
        """Probability of each question: equal shares for intents, though large ones still lead;
        natural voices are heard more often than there are of them."""
        intents = [self.items[i].intent for i in self.questions]
        counts = Counter(intents)
        shares = [counts[name] ** -0.4 * INTENT_WEIGHTS.get(name, 1.0) for name in intents]
        probs = np.array(shares) * self.by_voice(self.questions)
        return probs / probs.sum()

    def by_voice(self, indices):
        """Probability of each utterance of `indices` where only its voice counts."""
        natural = [self.items[i].voice in NATURAL for i in indices]
        weights = np.where(natural, NATURAL_WEIGHT, 1.0)
        return weights / max(weights.sum(), 1.0)

    def spoken(self, index):
        """Words, headed by their manner, and audio ids of an answer."""
        item = self.items[index]
        return self.encode(tagged(item.text, item.manner)), self.audio[index]

    def pieces(self, index):
        """The same where the manner changes in the middle: a (words, audio ids) for each."""
        words, audio = self.spoken(index)
        cuts = self.joints.get(self.items[index].id, ())  # in groups of audio ids
        tags = range(self.config.ids.first_text, self.config.ids.first_text + len(TAGS))
        starts = [i for i, token in enumerate(words) if token in tags]
        if not cuts or len(starts) != len(cuts) + 1:
            return [(words, audio)]
        parts = zip([0, *starts[1:]], [*starts[1:], None], strict=True)
        sounds = np.split(audio, [GROUP_SIZE * cut for cut in cuts])
        return [(words[a:b], list(sound)) for (a, b), sound in zip(parts, sounds, strict=True)]


def _copies(stored, items):
    """[[codes as spoken, codes of its copies …], …] of items."""
    if missing := [item.id for item in items if item.id not in stored]:
        raise ValueError(f"there are no codes of {missing[0]}: run `aqaa train codes`")
    result = []
    for item in items:
        names = itertools.chain([item.id], (f"{item.id}~{i}" for i in itertools.count(1)))
        result.append([stored[name] for name in itertools.takewhile(stored.__contains__, names)])
    return result


class Examples:
    """Draws examples of a mixture {kind: share}; each kind is the method of that name.

    noise: share of a question's audio ids that are replaced by others of their kind. layout: how
    text and audio of an answer share the sequence: a Layout or its name (the released model's).
    heard: weight of a question's ids as targets. selected: only the answers that
    `selected` takes are drawn for spoken questions (SFT-2). favour: {intent: how many times as
    often its questions are drawn}; follows: share of second questions among `turns`."""

    def __init__(self, book, mixture, *, noise=0.05, layout="ratio_10_15",
                 heard=HEARD_WEIGHT, selected=False, favour=(), follows=FOLLOWS):  # fmt: skip
        self.book, self.mixture, self.noise, self.ids = book, mixture, noise, book.config.ids
        self.layout = dialogue.layout(layout) if isinstance(layout, str) else layout
        self.heard, self.follows = heard, follows
        self.open_turn = len(dialogue.prompt([], book.tokenizer, self.ids))
        favour = dict(favour)
        self.probs = book.balance() * (self.selected() if selected else 1.0)
        self.probs *= [favour.get(book.items[i].intent, 1.0) for i in book.questions]
        self.probs /= self.probs.sum()
        self.asr_probs, self.follow_probs = map(book.by_voice, (book.spoken_words, book.follows))
        # No voice is heard in writing, and no noise. A book may hold nothing but such questions.
        askable = [book.items[i].category != VOICE and book.items[i].intent != UNHEARD
                   for i in book.questions]  # fmt: skip
        written = self.probs * askable if any(askable) else self.probs
        self.written_probs = written / written.sum()

    def selected(self):
        """Weight of each question for SFT-2 (paper 3.2): only answers of a stable format, whose
        text ends before their sound does; special skills in full, others as a reminder."""
        weights = []
        for index in self.book.questions:
            item = self.book.items[index]
            answer = self.spoken(self.book.answers[item.answer_id])
            special = item.category in SPECIAL or item.manner in MANNERS
            stable = self.ids.text_start not in answer
            weights.append(stable * (1.0 if special else REMINDER))
        if not any(weights):
            raise ValueError(f"layout {self.layout.name} ends no answer's text before its sound: "
                             "choose one with more text in a block")  # fmt: skip
        return np.array(weights)

    def draw(self, rng):
        """One example: ids (N,) and the weight of each as a target (N,)."""
        kind = rng.choice(list(self.mixture), p=np.array(list(self.mixture.values())))
        return getattr(self, kind)(rng)

    def text(self, rng):
        line = self.book.lines[rng.integers(len(self.book.lines))]
        answer = self.book.encode(tagged(line["answer"], line["manner"]))
        return self.example(None, self.book.encode(line["question"]), [*answer, self.ids.eot])

    def asr(self, rng):
        index = self.book.spoken_words[rng.choice(len(self.asr_probs), p=self.asr_probs)]
        words = self.book.encode(normalise(self.book.items[index].text))
        return self.example(ASR_MARKER, self.noisy(rng, index), [*words, self.ids.eot])

    def tts(self, rng):
        index = self.book.voiced[rng.integers(len(self.book.voiced))]
        words, audio = self.book.spoken(index)
        return self.example(TTS, words, [*audio, self.ids.eot])

    def next(self, rng):
        audio = self.book.audio[rng.integers(len(self.book.items))]
        weights = np.full(len(audio), ANSWER_WEIGHT)
        return np.concatenate([[self.ids.bos], audio]), np.concatenate([[0], weights])

    def joined(self, rng):
        """An utterance, cut between two words: one part is written, the other sounds. How far into
        the sound a word stands is guessed by its share of the letters."""
        index = self.book.spoken_words[rng.choice(len(self.asr_probs), p=self.asr_probs)]
        words, audio = normalise(self.book.items[index].text).split(), self.book.audio[index]
        cut = rng.integers(len(words) + 1)
        share = len(" ".join(words[:cut])) / max(1, len(" ".join(words)))
        at = round(share * len(audio) / GROUP_SIZE) * GROUP_SIZE
        if rng.random() < 0.5:
            parts = self.book.encode(" ".join(words[:cut])), audio[at:]
        else:
            parts = audio[:at], self.book.encode(" ".join(words[cut:]))
        ids = np.array([self.ids.bos, *parts[0], *parts[1]], dtype=np.int64)
        weights = np.where(ids < self.ids.n_text, TEXT_WEIGHT, ANSWER_WEIGHT).astype(np.float32)
        weights[0] = 0.0
        return ids, weights

    def tqaa(self, rng):
        index, answer = self.pair(rng, self.written_probs)
        question = self.book.encode(self.book.items[index].text)
        return self.example(TQAA, question, self.spoken(answer))

    def aqta(self, rng):
        index, _ = self.pair(rng, self.probs)
        item = self.book.items[index]
        words = self.book.encode(tagged(item.answer, item.manner))
        return self.example(AQTA, self.noisy(rng, index), [*words, self.ids.eot])

    def aqtaa(self, rng):
        index, answer = self.pair(rng, self.probs)
        return self.example(None, self.noisy(rng, index), self.spoken(answer))

    def turns(self, rng):
        """A second question behind the first; or any question behind turns that do not matter."""
        history = [self.some_turn(rng, self.book.lines) for _ in range(rng.choice(3, p=HISTORY))]
        if self.book.follows and rng.random() < self.follows:
            index = self.book.follows[rng.choice(len(self.follow_probs), p=self.follow_probs)]
            item = self.book.items[index]
            history = [*history[1:], turns_before(item)]  # its first question comes last
            answer = self.book.answers[item.answer_id]
        else:
            history = history or [self.some_turn(rng, self.book.lines)]
            index, answer = self.pair(rng, self.probs)
            # Half follow one of their own intent: there a second question is most easily heard.
            alike = self.book.about(self.book.items[index].intent)
            if alike and rng.random() < 0.5:
                history[-1] = self.some_turn(rng, alike)
        turns = [turn for pair in history for turn in pair]
        return self.example(None, self.noisy(rng, index), self.spoken(answer), turns)

    def some_turn(self, rng, lines):
        """One of `lines`, a written question and its answer, as two turns of a dialogue."""
        line = lines[rng.integers(len(lines))]
        return [("user", line["question"]), ("assistant", tagged(line["answer"], line["manner"]))]

    def pair(self, rng, probs):
        """Places in the book of a question, drawn by `probs`, and of its spoken answer."""
        index = self.book.questions[rng.choice(len(probs), p=probs)]
        return index, self.book.answers[self.book.items[index].answer_id]

    def noisy(self, rng, index):
        """Audio ids of an utterance (N,), some of them replaced by others of their kind. Half of
        those without bent copies are heard as if they had one, by what befell the ids of others."""
        variants = self.book.heard[index]
        audio = variants[rng.integers(len(variants))]
        # Where all shall be heard as it was spoken, there is no noise of this kind either.
        if self.noise and len(variants) == 1 and rng.random() < 0.5:
            audio = misheard(audio, self.book.confused, rng.uniform(0, MISHEARD), rng)
        return swapped(audio, self.ids, self.noise, rng)

    def spoken(self, index):
        """Ids of a spoken answer in the layout, a piece a manner where that keeps them apart."""
        by_piece = getattr(self.layout, "marked", False) or hasattr(self.layout, "starts")
        pieces = self.book.pieces(index) if by_piece else [self.book.spoken(index)]
        return self.layout.arrange_pieces(pieces, self.ids)

    def example(self, marker, question, answer, turns=()):
        """A question and the ids of its answer, up to eot.

        marker: a control token that asks for this kind of answer, or None; turns: what was said
        before. Returns ids (N,) and weights (N,), which are 0 for the chat template."""
        asked = [*turns, ("user", question)]
        prompt = dialogue.prompt(asked, self.book.tokenizer, self.ids, marker=marker)
        ids = np.array([*prompt, *answer], dtype=np.int64)
        weights = np.zeros(len(ids), dtype=np.float32)
        # Between the question and the answer stand its eot and the header of the open turn, which
        # are together as long as a prompt of no turns: bos in place of eot. The question's first id
        # follows a header that is the same everywhere, so it could only be guessed.
        end = len(prompt) - self.open_turn
        weights[end - len(question) + 1 : end] = self.heard
        in_words = ids[len(prompt) :] < self.ids.n_text
        weights[len(prompt) :] = np.where(in_words, TEXT_WEIGHT, ANSWER_WEIGHT)
        return ids, weights


def swapped(audio, ids, share, rng):
    """Audio ids (N,), of which a share is replaced by others of their kind."""
    swap = rng.random(len(audio)) < share
    first, border, end = ids.n_text, ids.semantic_start, ids.end
    semantic = rng.integers(border, end, len(audio))
    linguistic = rng.integers(first, border, len(audio))
    return np.where(swap, np.where(audio >= border, semantic, linguistic), audio)


def confusions(heard, size):
    """What ids below `size` became in bent copies: (others (M,), by the id that they stand for;
    bounds (size + 1,) of each id's part). heard: [[ids as spoken, ids of a copy, …], …]."""
    pairs = [(clear, bent) for clear, *copies in heard for bent in copies
             if len(bent) == len(clear)]  # fmt: skip
    clear, bent = np.hstack(pairs) if pairs else np.zeros((2, 0), np.int64)
    clear, bent = clear[clear != bent], bent[clear != bent]
    order = np.argsort(clear, kind="stable")
    return bent[order], np.searchsorted(clear[order], np.arange(size + 1))


def misheard(audio, confused, share, rng):
    """Audio ids (N,), of which a share became what they became elsewhere (`confusions`)."""
    others, bounds = confused
    count = bounds[audio + 1] - bounds[audio]
    swap = (rng.random(len(audio)) < share) & (count > 0)
    # One of the part that belongs to the id: what it often became is drawn often.
    drawn = bounds[audio[swap]] + (rng.random(swap.sum()) * count[swap]).astype(int)
    result = audio.copy()  # the book keeps what was spoken
    result[swap] = others[drawn]
    return result


def masks(ids, weights, tokenizer, config):
    """What the loss sees of an example, for readers: (piece, kind, weight) of every id.

    ids, weights (N,): of `Examples.draw`; config: IdsConfig. Weight 0 is no target."""
    rows = []
    for token, kind, weight in zip(ids, interleave.kinds(ids, config), weights, strict=True):
        kind = interleave.KINDS[kind]
        audio = kind in ("linguistic", "semantic")
        piece = f"<audio_{token - config.n_text}>" if audio else tokenizer.decode([token], False)
        rows.append((piece, kind, float(weight)))
    return rows
