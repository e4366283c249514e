"""Sentences of an open vocabulary, for speech recognition: `lexicon.toml` put together by rule.

Agreement is right, sense may be loose. Every draw takes the least used of a few candidates, so that
rare words are heard as often as common ones and no word is guessed from its neighbours alone."""

import re
import tomllib
from collections import Counter
from pathlib import Path

from aqaa.corpus.facts import TENS, UNITS, number

LEXICON = tomllib.loads((Path(__file__).parent / "lexicon.toml").read_text(encoding="utf-8"))
CANDIDATES = 6
BANDS = ((1, 3, 15), (4, 8, 50), (9, 15, 30), (16, 25, 5))  # words from, to; percent of sentences
KINDS = (  # how often each kind is tried in a band
    dict(lone=55, group=25, stock=12, exclaim=4, numeric=2, command=2),
    dict(clause=30, question=14, command=10, statement=14, device=9, numeric=8, naming=5,
         stock=4, several=3, scramble=14),
    dict(linked=40, question=6, statement=8, device=4, numeric=3, several=8, two=14, scramble=13),
    dict(chain=60, two=20, scramble=15),
)  # fmt: skip
REFUSALS = 10_000  # in a row, before `open_sentences` gives up
SLOT = re.compile(r"<(?:(\w+):)?(\w+)>")
VOWEL = re.compile(  # a sound, not a letter: an hour, a university
    r"(?!(?:one|once|ukraine)\b|us[eu]|uni[^mn]|eu)[aeiou]|(?:hour|honest|honor|heir)"
)
SINGLE_CVC = re.compile(r"(?:[^aeiou]*|[^aeiou]*qu)[aeiou][bdgmnprt]")
RANGES = dict(
    small=(2, 12), hour=(1, 12), unit_of=(2, 9), digit=(0, 9), number=(13, 99), tens=(10, 59))
ORDINALS = dict(ordinal=99, day_th=30)  # up to


def _items(text):
    return [" ".join(item.split()) for item in text.split(",")] if "," in text else text.split()


POOLS = {name: _items(text) for table in LEXICON.values() for name, text in table.items()}
PLURAL = dict(pair.split() for pair in POOLS["plural_of"])
PAST = {base: (past, done) for base, past, done in map(str.split, POOLS["past_of"])}
COMPARED = {base: (more, most) for base, more, most in map(str.split, POOLS["compared_of"])}
UNSAID = ("irregular", "slots", "patterns")  # the tables of no words
NOUNS = [name for name in LEXICON["nouns"] if name not in ("stuff", "dish", "room")]
VERBS = list(LEXICON["verbs"])
FITTING = dict(  # adjectives that go with a noun
    person=("kind",), animal=("size", "color", "kind"), food=("tasty",), dish=("tasty",),
    thing=("made", "made", "size", "color"), place=("size", "general"), idea=("general",),
    stuff=("general",), body=("size",),
)  # fmt: skip


def plural(noun):
    """Plural of a noun: dog -> "dogs", city -> "cities", child -> "children"."""
    return PLURAL.get(noun) or _s(noun)


def third(verb):
    """The form after he, she or it: go -> "goes"."""
    return "goes" if verb == "go" else _s(verb)


def past(verb):
    """Past tense and participle: take -> ("took", "taken"), stop -> ("stopped", "stopped")."""
    return PAST.get(verb) or (_with(verb, "ed"),) * 2


def ing(verb):
    """Present participle: tie -> "tying", make -> "making", run -> "running"."""
    if verb.endswith("ie"):
        return verb[:-2] + "ying"
    return verb + "ing" if verb.endswith(("ee", "oe", "y")) else _with(verb, "ing")


def compared(adjective):
    """Comparative and superlative: big -> ("bigger", "biggest"), honest -> ("more honest", …)."""
    syllables = len(re.findall("[aeiouy]+", adjective.removesuffix("e")))
    if adjective in COMPARED:
        return COMPARED[adjective]
    if syllables > 1 + adjective.endswith("y") or adjective in POOLS["analytic"]:
        return f"more {adjective}", f"most {adjective}"
    return _with(adjective, "er"), _with(adjective, "est")


def _s(word):
    if re.search("[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search("(s|x|z|ch|sh)$", word) else "s")


def _with(word, ending):  # stop -> stopped, like -> liked, carry -> carried
    if word in POOLS["doubled"] or SINGLE_CVC.fullmatch(word):
        return word + word[-1] + ending
    if word.endswith("e"):
        return word[:-1] + ending
    return word[:-1] + "i" + ending if re.search("[^aeiou]y$", word) else word + ending


def ordinal(n):
    """Words of the n-th, 1 to 99: 21 -> "twenty first". Raises IndexError for more."""
    tens, unit = divmod(n, 10)
    if n < 20:
        return POOLS["numbered"][n - 1]
    return f"{TENS[tens - 2]} {ordinal(unit)}" if unit else TENS[tens - 2][:-1] + "ieth"


FORMED = dict(  # slots of verbs and adjectives
    do=str, does=third, doing=ing, did=lambda verb: past(verb)[0], done=lambda verb: past(verb)[1],
    more=lambda word: compared(word)[0], most=lambda word: compared(word)[1],
)  # fmt: skip


def bases():
    """All words of the lexicon as they stand there, in its order: no inflected form, no pattern."""
    tables = [table for name, table in LEXICON.items() if name not in UNSAID]
    items = (word for table in tables for name in table for word in POOLS[name])
    return list(dict.fromkeys(word for item in items for word in item.split()))


def _forms():
    nouns = [noun for kind in (*NOUNS, "room") for noun in POOLS[kind]]
    verbs = [verb for kind in VERBS for verb in POOLS[kind]]
    adjectives = [word for kind in ("kind", "made", "general") for word in POOLS[kind]]
    patterns = ["more most"] + [SLOT.sub(" ", item) for table in ("slots", "patterns")
                for name in LEXICON[table] for item in POOLS[name]]  # fmt: skip
    items = bases() + [plural(noun) for noun in nouns] + UNITS + TENS
    items += [form for verb in verbs for form in (third(verb), *past(verb), ing(verb))]
    items += [form for word in adjectives for form in compared(word)] + patterns
    items += [ordinal(n) for n in range(1, 100)]
    return list(dict.fromkeys(word for item in items for word in item.split()))


BASES, FORMS = bases(), _forms()
POOLS["base"] = [word for word in BASES if len(word) > 1]
SCRAMBLED = [word for word in FORMS if len(word) > 1]  # "a b" would be neither article nor letters


def vocabulary():
    """The set of all word forms that a sentence can hold."""
    return set(FORMS)


def sentence(rng, least_used=None):
    """A text of 1 to 25 words. `least_used`, a Counter of what was drawn so far, is added to."""
    low, high, _ = band = rng.choices(BANDS, [share for *_, share in BANDS])[0]
    kinds = KINDS[BANDS.index(band)]
    while True:
        draft = _Draft(rng, least_used, low, high)
        text = _articles(draft.make(rng.choices(list(kinds), list(kinds.values()))[0]))
        if low <= len(text.split()) <= high:
            draft.counts.update(draft.drawn)
            return text


def filled(pattern, rng, least_used=None):
    """A pattern such as "where do <animals> sleep" with words in its slots. Arguments as above."""
    draft = _Draft(rng, least_used, 1, 25)
    text = SLOT.sub(lambda found: draft.slot(*found.groups()), pattern)
    draft.counts.update(draft.drawn)
    return _articles(" ".join(text.split()))


def _articles(text):
    return re.sub(r"\ban? (?=([a-z']+))", lambda m: "an " if VOWEL.match(m[1]) else "a ", text)


def open_sentences(count, rng, avoid=lambda text: False):
    """`count` distinct texts for which `avoid` is false, in the order drawn.

    Raises ValueError where too few are left."""
    counts, texts, refused = Counter(), {}, 0
    while len(texts) < count:
        text = sentence(rng, counts)
        refused = refused + 1 if text in texts or avoid(text) else 0
        if not refused:
            texts[text] = True
        elif refused == REFUSALS:
            fault = f"{len(texts)} of {count} sentences found, then {REFUSALS} refused in a row"
            raise ValueError(f"{fault}; ask for fewer, or let `avoid` refuse less")
    return list(texts)


class _Draft:
    """One sentence in the making: `drawn` is what it took from the pools."""

    def __init__(self, rng, least_used, low, high):
        self.rng, self.low, self.high, self.drawn, self.verbs = rng, low, high, [], VERBS
        self.counts = Counter() if least_used is None else least_used

    def take(self, pool):
        few = [pool[int(self.rng.random() * len(pool))] for _ in range(CANDIDATES)]
        item = min(few, key=lambda item: (item in self.drawn, self.counts[item]))
        self.drawn.append(item)
        return item

    def one_of(self, names):  # pools in proportion to their sizes, so that use is even
        return self.rng.choices(names, [len(POOLS[name]) for name in names])[0]

    def make(self, kind):
        if kind == "scramble":
            count = self.rng.randint(self.low, self.high)
            return " ".join(self.take(SCRAMBLED) for _ in range(count))
        return " ".join(self.slot(None, kind).split())

    def slot(self, form, name):
        """What <name> or <form:name> stands for, itself made of slots."""
        if form in ("np", "one", "many"):
            return self.phrase(name, {"one": False, "many": True}.get(form))
        if form in FORMED:
            return FORMED[form](self.take(POOLS[name]))
        if name in FORMED:
            return self.verb(FORMED[name])
        if name in RANGES:
            return number(self.rng.randint(*RANGES[name]))
        if name in ORDINALS:
            return ordinal(self.rng.randint(1, ORDINALS[name]))
        name = self.one_of(NOUNS + VERBS) if name == "anyword" else name
        if name not in POOLS:  # <things>
            return plural(self.take(POOLS[name.removesuffix("s")]))
        return SLOT.sub(lambda found: self.slot(*found.groups()), self.take(POOLS[name]))

    def phrase(self, kind, many=None):
        """A noun with its article or the like, and perhaps an adjective."""
        mass = kind in ("stuff", "dish")
        many = not mass and (self.rng.random() < 0.35 if many is None else many)
        common = [["the"], ["" if mass or many else "a"], POOLS["own"]]
        common.append(POOLS["mass" if mass else "plural" if many else "singular"])
        words = [self.take(self.rng.choices(common, (35, 20, 25, 20))[0])]
        if self.rng.random() < 0.4:
            words.append(self.take(POOLS[self.rng.choice(FITTING[kind])]))
        noun = self.take(POOLS[kind])
        return " ".join([*words, plural(noun) if many else noun])

    def verb(self, form):
        """A verb in a form and what follows it; one clause in a sentence may hang on a verb."""
        kind = self.one_of(self.verbs)
        self.verbs = self.verbs if kind != "tell" else [name for name in VERBS if name != kind]
        return f"{form(self.take(POOLS[kind]))} {self.slot(None, f'{kind}_then')}"
