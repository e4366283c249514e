"""What the mini is asked and what it answers, without sound: five categories of StepEval-Audio-360's nine.

Each intent is registered with its wordings (a core a line, * marks one that training never hears) and its facts. A new
category is more of the same.
"""

from aqaa.training import facts as F
from aqaa.training.intents import Fact, register, stable_hash

LOGIC, LANGUAGE, VOICE = "Logical Reasoning", "Language Ability", "Voice Understanding"
FOLLOW, EMOTION = "Voice Instruction Following", "Speech Emotion Control"


def _fact(answer, manner="normal", want="", read_only=False, **slots):
    return Fact(tuple(slots.items()), answer, manner, want, read_only)


# ---- Logical Reasoning -------------------------------------------------------------------------------------
N = F.number
READ_SUMS, READ_DIFFERENCES, READ_PRODUCTS = ({3, 9}, {6, 8}, {4, 10}), ((11, 4), (9, 6), (12, 7)), ({4, 7}, {6, 9})

register("sum", LOGIC, 1430, """
    what is {a} plus {b}
    how much is {a} plus {b}
    add {a} and {b}
    what do you get when you add {a} and {b}
    what is the sum of {a} and {b}
    {a} plus {b} is what
    what does {a} plus {b} make
    add {b} to {a}
    *how much do {a} and {b} make
    *what is the answer to {a} plus {b}
""", (
    _fact(f"{N(a)} plus {N(b)} is equal to {N(a + b)}", a=N(a), b=N(b), read_only={a, b} in READ_SUMS)
    for a in range(1, 11) for b in range(1, 11)
), hold_one_in=5)

register("difference", LOGIC, 1260, """
    what is {a} minus {b}
    how much is {a} minus {b}
    take {b} from {a}
    what do you get when you take {b} from {a}
    what is left when you take {b} from {a}
    {a} minus {b} is what
    what does {a} minus {b} make
    *how much is left when you take {b} from {a}
    *what is the answer to {a} minus {b}
""", (
    _fact(f"{N(a)} minus {N(b)} is equal to {N(a - b)}", a=N(a), b=N(b), read_only=(a, b) in READ_DIFFERENCES)
    for a in range(1, 13) for b in range(1, a + 1) if b < 11
), hold_one_in=5)

register("product", LOGIC, 1180, """
    what is {a} times {b}
    how much is {a} times {b}
    multiply {a} by {b}
    what do you get when you multiply {a} by {b}
    what is the product of {a} and {b}
    {a} times {b} is what
    what does {a} times {b} make
    *how much do you get when you multiply {a} by {b}
    *what is the answer to {a} times {b}
""", (
    _fact(f"{N(a)} times {N(b)} is equal to {N(a * b)}", a=N(a), b=N(b), read_only={a, b} in READ_PRODUCTS)
    for a in range(2, 10) for b in range(2, 10)
), hold_one_in=5)

_COMPARED = sorted({(a, (a * step) % 20 + 1) for a in range(1, 21) for step in (3, 7, 11, 13)})


def _compare(word, choose):
    return (
        _fact(f"{N(choose(a, b))} is a {word} number than {N(a + b - choose(a, b))}", a=N(a), b=N(b))
        for a, b in _COMPARED if a != b
    )


register("bigger", LOGIC, 920, """
    which is bigger {a} or {b}
    which number is bigger {a} or {b}
    what is bigger {a} or {b}
    is {a} bigger than {b} or is {b} bigger
    which one is the bigger number {a} or {b}
    {a} or {b} which is bigger
    *of {a} and {b} which one is bigger
    *what is the bigger number {a} or {b}
""", _compare("bigger", max), hold_one_in=5)

register("smaller", LOGIC, 920, """
    which is smaller {a} or {b}
    which number is smaller {a} or {b}
    what is smaller {a} or {b}
    is {a} smaller than {b} or is {b} smaller
    which one is the smaller number {a} or {b}
    {a} or {b} which is smaller
    *of {a} and {b} which one is smaller
    *what is the smaller number {a} or {b}
""", _compare("smaller", min), hold_one_in=5)

NEXT = """
    what comes {where} {w}
    which {kind} comes {where} {w}
    what {kind} is {where} {w}
    tell me the {kind} {where} {w}
    what is the {kind} that comes {where} {w}
    {where} {w} comes which {kind}
    *what {kind} comes right {where} {w}
    *which one is the {kind} {where} {w}
"""


def _neighbours(kind, where, renders, words, step, wraps=False):
    def fact(i, word):
        return _fact(f"the {kind} {where} {word} is {words[(i + step) % len(words)]}", w=word)

    inside = range(len(words)) if wraps else range(max(0, -step), len(words) - max(0, step))
    wordings = NEXT.replace("{where}", where).replace("{kind}", kind)
    register(f"{kind}_{where}", LOGIC, renders, wordings, [fact(i, words[i]) for i in inside])


_COUNTED = [N(i) for i in range(22)]
_neighbours("number", "after", 1090, _COUNTED, 1)
_neighbours("number", "before", 1090, _COUNTED, -1)
_neighbours("day", "after", 550, F.DAYS, 1, wraps=True)
_neighbours("day", "before", 550, F.DAYS, -1, wraps=True)
_neighbours("month", "after", 800, F.MONTHS, 1, wraps=True)
_neighbours("month", "before", 800, F.MONTHS, -1, wraps=True)


def _odd_ones():
    for other, members in F.GROUPS.items():
        for group, words in F.GROUPS.items():
            if group == other:
                continue
            for k, odd in enumerate(words):
                three = [members[k], members[(k + 1 + stable_hash(odd, other) % 3) % 4]]
                three.insert(stable_hash(other, odd) % 3, odd)
                yield _fact(f"the odd one is {odd} because the others are {other}", a=three[0], b=three[1], c=three[2])


register("odd_one_out", LOGIC, 1430, """
    which is the odd one out {a} {b} or {c}
    which one does not belong {a} {b} or {c}
    find the odd one out {a} {b} {c}
    {a} {b} {c} which is the odd one out
    what does not belong here {a} {b} or {c}
    {a} {b} {c} which one does not belong
    *which one is the odd one {a} {b} or {c}
    *find the one that does not belong {a} {b} {c}
""", _odd_ones())

# ---- Language Ability --------------------------------------------------------------------------------------
_BOTH_WAYS = [pair for one in F.OPPOSITES for pair in (one, one[::-1])]

register("opposite", LANGUAGE, 1510, """
    what is the opposite of {w}
    tell me the opposite of {w}
    give me the opposite of {w}
    what word is the opposite of {w}
    {w} is the opposite of what
    which word means the opposite of {w}
    say the opposite of {w}
    *what is the opposite word of {w}
    *the opposite of {w} is what
""", (
    _fact(f"the opposite of {w} is {o}", w=w, read_only=w in ("strong", "weak")) for w, o in _BOTH_WAYS
))

register("plural", LANGUAGE, 1260, """
    what is the plural of {w}
    tell me the plural of {w}
    give me the plural of {w}
    how do you say more than one {w}
    one {w} and two what
    what do you call more than one {w}
    say the plural of {w}
    *what is more than one {w}
    *the plural of {w} is what
""", (
    _fact(f"the plural of {w} is {p}", w=w, read_only=w in ("wolf", "tree", "lady")) for w, p in F.PLURALS
))

register("spelling", LANGUAGE, 1260, """
    how do you spell {w}
    spell the word {w}
    spell {w}
    how is {w} spelled
    tell me how to spell {w}
    what is the spelling of {w}
    which letters are in {w}
    *how do you spell the word {w}
    *what are the letters of {w}
""", (
    _fact(f"{w} is spelled {' '.join(w)}", w=w, read_only=w in ("cup", "lamp")) for w in F.SPELLED
))

register("capital", LANGUAGE, 1260, """
    what is the capital of {w}
    tell me the capital of {w}
    which city is the capital of {w}
    give me the capital of {w}
    name the capital of {w}
    what city is the capital of {w}
    {w} has which capital
    *what is the capital city of {w}
    *the capital of {w} is what
""", (
    _fact(f"the capital of {w} is {c}", w=w, read_only=w in ("austria", "japan", "norway")) for w, c in F.CAPITALS
))

register("color", LANGUAGE, 1180, """
    what color is {w}
    what is the color of {w}
    tell me the color of {w}
    which color is {w}
    name the color of {w}
    what color does {w} have
    {w} has what color
    *which color does {w} have
    *the color of {w} is what
""", (
    _fact(f"the color of {w} is {c}", w=w, read_only=w in ("coal", "tomato", "honey")) for w, c in F.COLORS
))

register("animal_sound", LANGUAGE, 1010, """
    which animal {v}
    what animal {v}
    tell me which animal {v}
    name an animal that {v}
    {v} which animal is that
    what is the animal that {v}
    *which is the animal that {v}
    *tell me an animal that {v}
""", (
    _fact(f"the {w} is an animal that {v}", v=v, read_only=w in ("lion", "owl")) for w, v in F.SOUNDS
))

# ---- Voice Understanding: the answer is in the sound, not in the words -------------------------------------


def _heard(name, renders, wordings, answers):
    register(name, VOICE, renders, wordings, [_fact(text, want=want) for want, text in answers.items()], hold_one_in=0)


_heard("voice_pitch", 630, """
    is my voice high or low
    do i have a high voice or a low voice
    how is my voice high or low
    is this a low voice or a high voice
    am i speaking in a high voice or a low voice
    what kind of voice do i have high or low
    high or low how is my voice
    *is this voice high or low
    *do i speak in a high voice or a low voice
""", {"high": "your voice sounds high to me", "low": "your voice sounds low to me"})

_heard("voice_rate", 630, """
    am i speaking fast or slowly
    am i talking slowly or fast
    do i speak fast or slowly
    how am i speaking fast or slowly
    is my speech fast or slow
    how fast am i talking
    fast or slow how do i speak
    *am i talking fast or slowly right now
    *how fast do i speak
""", {"fast": "you are speaking very fast now", "slow": "you are speaking very slowly now"})

_heard("voice_mood", 630, """
    do i sound happy or sad
    am i happy or sad
    how do i sound happy or sad
    is my voice happy or sad
    can you hear if i am happy or sad
    do you think i am sad or happy
    happy or sad how do i sound
    *how is my voice happy or sad
    *do you think i sound happy or sad
""", {"happy": "i think you sound happy today", "sad": "i think you sound sad today"})

_heard("voice_person", 630, """
    am i a man or a woman
    is this a man or a woman
    do i sound like a man or a woman
    is my voice the voice of a man or a woman
    who is speaking a man or a woman
    do you hear a man or a woman
    a woman or a man who am i
    *is a man or a woman speaking
    *do you think i am a man or a woman
""", {"man": "you sound like a man to me", "woman": "you sound like a woman to me"})

# ---- Voice Instruction Following and Speech Emotion Control ------------------------------------------------
register("repeat", FOLLOW, 1090, """
    repeat after me {x}
    say after me {x}
    repeat this {x}
    repeat these words {x}
    say the words {x}
    say this {x}
    repeat this sentence {x}
    *say these words after me {x}
    *repeat the words {x}
""", (_fact(x, x=x) for x in F.SENTENCES))

MANNERS = """
    say {x} {adverb}
    {adverb} say {x}
    say this {adverb} {x}
    repeat {x} in {adjective} voice
    in {adjective} voice say {x}
    read this in {adjective} voice {x}
    speak {adverb} and say {x}
    use {adjective} voice to say {x}
    *repeat this {adverb} {x}
    *say {x} in {adjective} voice
"""


def _manner(name, category, renders, adverb, adjective):
    article = "an" if adjective == "angry" else "a"
    wordings = MANNERS.replace("{adverb}", adverb).replace("{adjective}", f"{article} {adjective}")
    chosen = [x for x in F.SENTENCES if stable_hash(name, x) % 4]  # three sentences in four
    register(f"say_{name}", category, renders, wordings, [_fact(x, manner=name, x=x) for x in chosen])


for _name, _adverb, _adjective in (
    ("slow", "slowly", "slow"), ("fast", "quickly", "fast"), ("high", "higher", "high"),
    ("low", "lower", "low"), ("loud", "louder", "loud"), ("soft", "softly", "soft"),
):
    _manner(_name, FOLLOW, 420, _adverb, _adjective)
for _name, _adverb in (("happy", "happily"), ("sad", "sadly"), ("angry", "angrily"), ("calm", "calmly")):
    _manner(_name, EMOTION, 560, _adverb, _name)

register("count", FOLLOW, 920, """
    count from {a} to {b}
    start at {a} and count to {b}
    say the numbers from {a} to {b}
    count up from {a} to {b}
    start with {a} and stop at {b}
    tell me the numbers from {a} to {b}
    *start with {a} and count to {b}
    *give me the numbers from {a} to {b}
""", (
    _fact("i am counting " + " ".join(N(i) for i in range(a, b + 1)), a=N(a), b=N(b))
    for a in range(1, 11) for b in range(a + 2, a + 6)
), hold_one_in=5)

for _times, _how_often in ((2, "twice"), (3, "three times")):
    register(f"echo_{_times}", FOLLOW, 670, """
        say the word {x} {n}
        say {x} {n}
        repeat the word {x} {n}
        {n} say the word {x}
        say it {n} the word is {x}
        the word is {x} repeat it {n}
        *say {n} the word {x}
        *repeat {n} the word {x}
    """.replace("{n}", _how_often), [_fact("here it is " + " ".join([x] * _times), x=x) for x in F.ECHOED])
