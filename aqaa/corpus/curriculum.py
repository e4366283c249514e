"""The facts of every intent, in five of StepEval-Audio-360's nine categories (curriculum.toml)."""

from itertools import product
from operator import add, mul, sub

from aqaa.corpus.facts import SCRIPT, Fact, number, pairs, phrases, stable_hash, words
from aqaa.tokenizers.text import MANNERS

LOGIC, LANGUAGE, VOICE = "Logical Reasoning", "Language Ability", "Voice Understanding"
FOLLOW, EMOTION = "Voice Instruction Following", "Speech Emotion Control"
SENTENCES, ECHOED = phrases("SENTENCES"), words("ECHOED")
PLUS, TIMES = product(range(1, 11), repeat=2), product(range(2, 10), repeat=2)
MINUS = [(a, b) for a in range(1, 13) for b in range(1, min(a, 10) + 1)]
READ_SUMS, READ_PRODUCTS = ({3, 9}, {6, 8}, {4, 10}), ({4, 7}, {6, 9})
READ_DIFFERENCES = ((11, 4), (9, 6), (12, 7))


def _fact(answer, manner="normal", want="", read_only=False, **slots):
    return Fact(tuple(slots.items()), answer, manner, want, read_only)


def _arithmetic(word, result, operands, read_only):
    for a, b in operands:
        answer = f"{number(a)} {word} {number(b)} is equal to {number(result(a, b))}"
        yield _fact(answer, a=number(a), b=number(b), read_only=read_only(a, b))


def _compare(word, choose):
    steps = {(a, (a * step) % 20 + 1) for a in range(1, 21) for step in (3, 7, 11, 13)}
    for a, b in sorted(steps):
        if a != b:
            one = choose(a, b)
            answer = f"{number(one)} is a {word} number than {number(a + b - one)}"
            yield _fact(answer, a=number(a), b=number(b))


def _neighbours(kind, where, words, wraps):
    step = 1 if where == "after" else -1
    for i, word in enumerate(words):
        if wraps or 0 <= i + step < len(words):
            neighbour = words[(i + step) % len(words)]
            yield _fact(f"the {kind} {where} {word} is {neighbour}", w=word)


def _odd_ones():
    groups = {name: members.split() for name, members in SCRIPT["words"]["GROUPS"].items()}
    for other, members in groups.items():
        for group, odd_ones in groups.items():
            for k, odd in enumerate(odd_ones if group != other else ()):
                three = [members[k], members[(k + 1 + stable_hash(odd, other) % 3) % 4]]
                three.insert(stable_hash(other, odd) % 3, odd)
                answer = f"the odd one is {odd} because the others are {other}"
                yield _fact(answer, **dict(zip("abc", three, strict=True)))


def _pairs(answer, pairs, read_only, slot="w"):
    """Facts of word pairs (w, x), of which the one in the slot is asked about."""
    for w, x in pairs:
        slots = {slot: w if slot == "w" else x}
        yield _fact(answer.format(w=w, x=x), read_only=w in read_only.split(), **slots)


def _counts():
    for a in range(1, 11):
        for b in range(a + 2, a + 6):
            counted = " ".join(number(i) for i in range(a, b + 1))
            yield _fact(f"i am counting {counted}", a=number(a), b=number(b))


def _heard(**answers):
    """The answer is in the sound of the question, not in its words."""
    return [_fact(answer, want=want) for want, answer in answers.items()]


SPELLED = [(word, " ".join(word)) for word in words("SPELLED")]
OPPOSITES = [pair for one in pairs("OPPOSITES") for pair in (one, one[::-1])]
ROWS = (("number", [number(i) for i in range(22)], False), ("day", words("DAYS"), True),
        ("month", words("MONTHS"), True))  # True: the last is followed by the first  # fmt: skip
FACTS = {
    "sum": _arithmetic("plus", add, PLUS, lambda a, b: {a, b} in READ_SUMS),
    "difference": _arithmetic("minus", sub, MINUS, lambda a, b: (a, b) in READ_DIFFERENCES),
    "product": _arithmetic("times", mul, TIMES, lambda a, b: {a, b} in READ_PRODUCTS),
    "bigger": _compare("bigger", max),
    "smaller": _compare("smaller", min),
    **{f"{kind}_{where}": _neighbours(kind, where, row, wraps)
       for kind, row, wraps in ROWS for where in ("after", "before")},
    "odd_one_out": _odd_ones(),
    "opposite": _pairs("the opposite of {w} is {x}", OPPOSITES, "strong weak"),
    "plural": _pairs("the plural of {w} is {x}", pairs("PLURALS"), "wolf tree lady"),
    "spelling": _pairs("{w} is spelled {x}", SPELLED, "cup lamp"),
    "capital": _pairs("the capital of {w} is {x}", pairs("CAPITALS"), "austria japan norway"),
    "color": _pairs("the color of {w} is {x}", pairs("COLORS"), "coal tomato honey"),
    "animal_sound": _pairs("the {w} is an animal that {x}", pairs("SOUNDS"), "lion owl", slot="v"),
    "voice_pitch": _heard(high="your voice sounds high to me", low="your voice sounds low to me"),
    "voice_rate": _heard(fast="you are speaking very fast now",
                         slow="you are speaking very slowly now"),
    "voice_mood": _heard(happy="i think you sound happy today", sad="i think you sound sad today"),
    "voice_person": _heard(man="you sound like a man to me", woman="you sound like a woman to me"),
    "repeat": [_fact(x, x=x) for x in SENTENCES],
    **{f"say_{manner}": [_fact(x, manner, x=x) for x in SENTENCES if stable_hash(manner, x) % 4]
       for manner in MANNERS},  # three sentences in four are said back in each manner
    "count": _counts(),
    "echo_2": [_fact(f"here it is {x} {x}", x=x) for x in ECHOED],
    "echo_3": [_fact(f"here it is {x} {x} {x}", x=x) for x in ECHOED],
}  # fmt: skip
FACTS = {name: tuple(facts) for name, facts in FACTS.items()}
