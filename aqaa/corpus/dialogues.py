"""Dialogues of the corpus as ids."""

from dataclasses import dataclass

from aqaa.corpus import play, wider
from aqaa.corpus.codes import stored_codes
from aqaa.corpus.plan import plan, spread
from aqaa.files import data_folder
from aqaa.tokenizers import dialogue, interleave
from aqaa.tokenizers.text import normalise, tagged
from aqaa.weights import model_folder, sources


@dataclass(frozen=True)
class Dialogue:
    """A question and its answer as ids; the answer begins at `start`. answer: its words, judged."""

    ids: list
    start: int
    answer: str

    @property
    def prompt(self):
        return self.ids[: self.start]


def dialogues(source="mini", split="eval", count=None, seed=0):
    """[Dialogue, …] of the mini's corpus, from the codes beside its weights.

    Spread evenly over the split ("train", "dev" or "eval"), `count` at most; second questions stand
    behind the first one and its right answer. Raises ValueError or OSError."""
    folder = sources.find(source)
    ids = model_folder.read_config(folder).ids
    text = model_folder.read_text(folder, ids.n_text)
    stored = stored_codes(data_folder() / "codes")
    # Of what joined not all need have been spoken (see the data card).
    items = plan(seed=seed) + [item for item in play.joined(seed=seed) if item.id in stored]
    asked = [one for one in items if one.role in ("question", "follow") and one.split == split]
    asked = spread(asked, count)
    wanted = {item.answer_id for item in asked}
    spoken = [item for item in items if item.role == "answer" and item.answer_id in wanted]
    if missing := [item.id for item in (*asked, *spoken) if item.id not in stored]:
        raise ValueError(f"there are no codes of {missing[0]}: they belong to another corpus")
    audio = {item.id: interleave.merge(*stored[item.id], ids) for item in (*asked, *spoken)}
    answers = {item.answer_id: item for item in spoken}
    layout, result = dialogue.layout(), []
    for item in asked:
        answer = answers[item.answer_id]
        turns = [*wider.turns_before(item), ("user", audio[item.id])]
        prompt = dialogue.prompt(turns, text, ids)
        words = text.encode(tagged(answer.text, answer.manner))
        reply = layout.arrange(words, audio[answer.id], ids)
        result.append(Dialogue(prompt + reply, len(prompt), normalise(item.answer)))
    return result
