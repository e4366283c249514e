"""`aqaa train corpus`: the parts of a corpus, what each costs, and what it is spoken with.

Each part lies in a folder of its own, so that one may change while the others stay."""

from pathlib import Path

from aqaa.corpus import engines, natural, people, pictures, play, speak, wider
from aqaa.corpus.plan import OPEN, open_plan, plan

SECONDS = 0.5, 0.06  # of an utterance: silence at its ends, and a letter, on the average of voices
WITHOUT_NATURAL = "synthesizers alone say the open sentences, and natural voices are heard worse"


def main(folder="work/corpus", scale=1.0, seed=0, workers=2, resume=True, only=None, people=()):
    """Plan and speak all parts, or `only` one; returns the Corpus. `people`: folders of recordings.

    All is planned, checked and counted before any of it is spoken. Raises ValueError for shards
    there, without `resume`, and for what people.py refuses; what `speak.speak` raises."""
    folder = Path(folder)
    chosen = _chosen(folder, only, people)
    for part in chosen if not resume else ():
        if any((folder / part).glob("shard_*")):
            raise ValueError(f"{folder / part} already holds shards; resume them or give another "
                             "folder.")
    recorded, left_out = _people(people, seed) if people else ([], 0)  # first: it may be refused
    makers = {
        "questions": lambda: plan(scale, seed),
        "open": lambda: _open(folder / "open", scale, seed),
        "wider": lambda: _joined(folder / "wider", wider.plan(scale, seed)),
        "play": lambda: _joined(folder / "play", play.plan(scale, seed)),
        "later": lambda: _joined(folder / "later", play.later_plan(scale, seed)),
        "turns": lambda: _joined(folder / "turns", wider.turns_plan(scale, seed)),
        "pictures": lambda: _joined(folder / "pictures", pictures.plan(scale, seed)),
        "people": lambda: recorded,
    }
    plans = {part: makers[part]() for part in chosen}
    for part, items in plans.items():
        todo = speak.check(items, folder / part)[1]
        print(f"{part}: {cost(items)}" if todo else f"{part}: all is there")
    for part, items in plans.items():
        spoken = speak.speak(items, folder / part, workers).items()
        hours = sum(item.length for item in spoken) / 16_000 / 3600
        print(f"{len(spoken)} utterances, {hours:.1f} hours in {folder / part}")
    if left_out:
        print(f"{left_out} of the recordings were left out.")
    return speak.Corpus(folder)


def _chosen(folder, only, people):
    """The parts that are asked for. Raises ValueError where that makes no sense."""
    if (folder / "plan.json").exists():
        raise ValueError(f"{folder} is itself a part of a corpus: move what it holds to "
                         f"{folder / 'questions'}, or give another folder.")
    if only == "people" and not people:
        raise ValueError("no recordings are named: give their folder with --people FOLDER.")
    if people and only not in (None, "people"):
        raise ValueError(f"recordings are no part of {only}: leave out --people, or --only.")
    return [only] if only else [part for part in speak.PARTS if part != "people" or people]


def _open(folder, scale, seed):
    """Items of the open sentences, with natural voices where they are installed, or were when this
    part was begun; says what is missing."""
    lacks = engines.absent(OPEN["natural"])
    began = speak.head(folder).get("engines", {})
    if lacks and not {"hibari", "kokoro"} & set(began):
        names = dict.fromkeys(name for names in lacks.values() for name in names)
        print(f"{', '.join(names)} not found: {WITHOUT_NATURAL}; run "
              f"`{engines.ENGINES['kokoro'].install}`.")  # fmt: skip
        return open_plan(scale, seed, natural=False)
    if not natural.styles_file():
        print(f"Kokoro mixes 3 styles in place of 41: for all of them {natural.STYLES_HELP}.")
    return open_plan(scale, seed)


def _joined(folder, items):
    """Those of the planned `items` whose engines are installed, or were when this part was begun;
    says what is left out. An Item has the same id either way."""
    voices = {item.voice for item in items}
    lacks, began = engines.absent(voices), speak.head(folder).get("engines", {})
    for name, missing in lacks.items() if not began else ():
        print(f"{' and '.join(missing)} not found: the {folder.name} part goes without the voices "
              f"of {name}; run `{engines.ENGINES[name].install}`.")  # fmt: skip
    known = set(began) or set(engines.of(voices)) - set(lacks)
    return [item for item in items if item.voice.split(":")[0] in known]


def _people(folders, seed):
    """(Items of the recordings, how many were left out); says why, one sentence each."""
    clips, faults = people.clips(folders)
    for fault in faults:
        print(fault)
    return people.plan(clips, seed), len(faults)


def cost(items):
    """What speaking some Items costs, in words, by their letters and the speeds of engines."""
    minutes, hours = {}, 0.0
    for item in items:
        (name,) = engines.of([item.voice])
        seconds = SECONDS[0] + SECONDS[1] * len(item.text)
        minutes[name] = minutes.get(name, 0) + seconds / 60
        hours += seconds / 3600
    total = sum(part / engines.ENGINES[name].speed() for name, part in minutes.items())
    total = max(1, total)
    return f"{len(items)} utterances, about {hours:.1f} hours, {total:.0f} minutes of one core"
