"""Dialogues of the corpus as ids."""
from dataclasses import dataclass

from aqaa.tokenizers.text import normalise


@dataclass(frozen=True)
class Dialogue:
    """A question and its answer as ids; the answer begins at `start`. answer: its words as they are judged."""

    ids: list
    start: int
    answer: str

    @property
    def prompt(self):
        return self.ids[: self.start]


def dialogues(source="mini", split="eval", count=None, seed=0):
    """Spoken dialogues of the mini's corpus, from the codes that lie beside its weights: a list of Dialogue.

    They are spread evenly over the split ("train" or "eval"), `count` at most. Raises ValueError or OSError.
    """
    from aqaa import files
    from aqaa.corpus.codes import load_codes
    from aqaa.corpus.plan import plan
    from aqaa.tokenizers import dialogue, interleave
    from aqaa.tokenizers.text import tagged
    from aqaa.weights import model_folder

    folder = model_folder.find(source)
    config = model_folder.read_config(folder)
    text = model_folder.read_text(folder, config.ids.n_text)
    items = plan(seed=seed)
    asked = [item for item in items if item.role == "question" and item.split == split]
    step = max(1.0, len(asked) / count) if count else 1.0
    asked = [asked[int(i * step)] for i in range(min(count or len(asked), len(asked)))]
    wanted = {item.answer_id for item in asked}
    spoken = [item for item in items if item.role == "answer" and item.answer_id in wanted]
    codes = load_codes(files.data_folder() / "codes", [*asked, *spoken])
    sounds = [interleave.merge(*pair, config.ids) for pair in codes]
    answers = {item.answer_id: (item, sound) for item, sound in zip(spoken, sounds[len(asked) :], strict=True)}
    layout, found = dialogue.layout(), []
    for item, sound in zip(asked, sounds[: len(asked)], strict=True):
        answer, answer_sound = answers[item.answer_id]
        prompt = dialogue.prompt([("user", sound)], text, config.ids)
        words = text.encode(tagged(answer.text, answer.manner))
        reply = layout.arrange(words, answer_sound, config.ids)
        found.append(Dialogue(prompt + reply, len(prompt), normalise(item.answer)))
    return found
