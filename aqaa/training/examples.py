"""Examples of the language model's stages."""
import numpy as np

from aqaa.tokenizers import interleave


class Book:
    """Everything that is said, as ids: one entry an utterance, with its words and its merged audio ids."""

    def __init__(self, config, tokenizer, items, codes, lines):
        """items: corpus items; codes: list of (linguistic, semantic) arrays; lines: dicts of `corpus.texts`."""
        self.config, self.tokenizer = config, tokenizer
        self.items = items
        self.audio = [np.array(interleave.merge(*pair, config.ids), dtype=np.int64) for pair in codes]
        self.words = {}
        self.lines = lines
        self.questions = [i for i, item in enumerate(items) if item.role == "question"]
        self.answers = {item.answer_id: i for i, item in enumerate(items) if item.role == "answer" and item.answer_id}
        self.voiced = [i for i, item in enumerate(items) if item.role == "answer"]
        missing = {items[i].answer_id for i in self.questions} - set(self.answers)
        if missing:
            raise ValueError(f"{len(missing)} answers were never spoken, {sorted(missing)[0]} among them")

    def encode(self, text):
        """Ids of a text, remembered."""
        if text not in self.words:
            self.words[text] = self.tokenizer.encode(text)
        return self.words[text]
