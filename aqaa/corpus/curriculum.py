"""What the mini is asked and what it answers, without sound: five categories of StepEval-Audio-360's nine.

curriculum.toml has the wordings and the words; here each intent gets its facts. A new category is more of the same.
"""

from aqaa.corpus import facts as F
from aqaa.corpus.intents import Fact, register, stable_hash
from aqaa.tokenizers.text import MANNERS

LOGIC, LANGUAGE, VOICE = "Logical Reasoning", "Language Ability", "Voice Understanding"
FOLLOW, EMOTION = "Voice Instruction Following", "Speech Emotion Control"
N = F.number
READ_SUMS, READ_DIFFERENCES, READ_PRODUCTS = ({3, 9}, {6, 8}, {4, 10}), ((11, 4), (9, 6), (12, 7)), ({4, 7}, {6, 9})


def _fact(answer, manner="normal", want="", read_only=False, **slots):
    return Fact(tuple(slots.items()), answer, manner, want, read_only)


def _sums():
    for a in range(1, 11):
        for b in range(1, 11):
            yield _fact(f"{N(a)} plus {N(b)} is equal to {N(a + b)}", a=N(a), b=N(b), read_only={a, b} in READ_SUMS)


def _differences():
    for a in range(1, 13):
        for b in range(1, min(a, 10) + 1):
            answer = f"{N(a)} minus {N(b)} is equal to {N(a - b)}"
            yield _fact(answer, a=N(a), b=N(b), read_only=(a, b) in READ_DIFFERENCES)


def _products():
    for a in range(2, 10):
        for b in range(2, 10):
            answer = f"{N(a)} times {N(b)} is equal to {N(a * b)}"
            yield _fact(answer, a=N(a), b=N(b), read_only={a, b} in READ_PRODUCTS)


def _compare(word, choose):
    for a, b in sorted({(a, (a * step) % 20 + 1) for a in range(1, 21) for step in (3, 7, 11, 13)}):
        if a != b:
            one = choose(a, b)
            yield _fact(f"{N(one)} is a {word} number than {N(a + b - one)}", a=N(a), b=N(b))


def _neighbours(kind, where, words, wraps):
    step = 1 if where == "after" else -1
    for i in range(len(words)) if wraps else range(max(0, -step), len(words) - max(0, step)):
        yield _fact(f"the {kind} {where} {words[i]} is {words[(i + step) % len(words)]}", w=words[i])


def _odd_ones():
    for other, members in F.GROUPS.items():
        for group, words in F.GROUPS.items():
            if group == other:
                continue
            for k, odd in enumerate(words):
                three = [members[k], members[(k + 1 + stable_hash(odd, other) % 3) % 4]]
                three.insert(stable_hash(other, odd) % 3, odd)
                yield _fact(f"the odd one is {odd} because the others are {other}", a=three[0], b=three[1], c=three[2])


def _pairs(answer, pairs, read_only):
    """Facts of word pairs: `answer` holds {w}, which is asked about, and {x}."""
    return [_fact(answer.format(w=w, x=x), read_only=w in read_only, w=w) for w, x in pairs]


def _counts():
    for a in range(1, 11):
        for b in range(a + 2, a + 6):
            yield _fact("i am counting " + " ".join(N(i) for i in range(a, b + 1)), a=N(a), b=N(b))


def _heard(**answers):
    """The answer is in the sound of the question, not in its words."""
    return [_fact(answer, want=want) for want, answer in answers.items()]


def _said(manner):
    """Three sentences in four are said back in each manner."""
    return [_fact(x, manner=manner, x=x) for x in F.SENTENCES if stable_hash(manner, x) % 4]


FACTS = {
    "sum": _sums(), "difference": _differences(), "product": _products(),
    "bigger": _compare("bigger", max), "smaller": _compare("smaller", min),
    **{
        f"{kind}_{where}": _neighbours(kind, where, words, kind != "number")
        for kind, words in (("number", [N(i) for i in range(22)]), ("day", F.DAYS), ("month", F.MONTHS))
        for where in ("after", "before")
    },
    "odd_one_out": _odd_ones(),
    "opposite": _pairs(
        "the opposite of {w} is {x}", [p for one in F.OPPOSITES for p in (one, one[::-1])], ("strong", "weak")
    ),
    "plural": _pairs("the plural of {w} is {x}", F.PLURALS, ("wolf", "tree", "lady")),
    "spelling": _pairs("{w} is spelled {x}", [(w, " ".join(w)) for w in F.SPELLED], ("cup", "lamp")),
    "capital": _pairs("the capital of {w} is {x}", F.CAPITALS, ("austria", "japan", "norway")),
    "color": _pairs("the color of {w} is {x}", F.COLORS, ("coal", "tomato", "honey")),
    "animal_sound": [
        _fact(f"the {w} is an animal that {v}", v=v, read_only=w in ("lion", "owl")) for w, v in F.SOUNDS
    ],
    "voice_pitch": _heard(high="your voice sounds high to me", low="your voice sounds low to me"),
    "voice_rate": _heard(fast="you are speaking very fast now", slow="you are speaking very slowly now"),
    "voice_mood": _heard(happy="i think you sound happy today", sad="i think you sound sad today"),
    "voice_person": _heard(man="you sound like a man to me", woman="you sound like a woman to me"),
    "repeat": [_fact(x, x=x) for x in F.SENTENCES],
    **{f"say_{manner}": _said(manner) for manner in MANNERS},
    "count": _counts(),
    "echo_2": [_fact(f"here it is {x} {x}", x=x) for x in F.ECHOED],
    "echo_3": [_fact(f"here it is {x} {x} {x}", x=x) for x in F.ECHOED],
}  # fmt: skip

for _name, _entry in F.SCRIPT["intents"].items():
    _entry = {**F.SCRIPT["like"].get(_entry.pop("like", ""), {}), **_entry}
    for _mark, _words in _entry.pop("marks", {}).items():
        _entry = {key: v.replace(f"<{_mark}>", _words) if isinstance(v, str) else v for key, v in _entry.items()}
    register(_name, facts=FACTS[_name], **_entry)
