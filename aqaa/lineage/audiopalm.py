"""AudioPaLM: a language model of text whose table of embeddings grows by audio tokens, and that
then learns several tasks at once (Rubenstein et al. 2023, arXiv 2306.12925).

Its training (`aqaa.training.lineage.audiopalm`) begins with a model that has only ever read text.
`grow` gives it rows for the audio ids; from then on sound and text are tokens alike, and a tag of
plain text at the head of the question names the task: [asr], [tts], [answer], … Tags may combine
steps, as the paper's [ASR AST S2ST] does: then the answer writes the transcript first. (The mini's
text tokenizer knows letters alone, so brackets leave no ids.) The audio ids are the mini's merged
groups, so its vocoder takes the place of AudioLM's later stages or SoundStorm."""

import copy

from aqaa.lineage.units import MERGED, Stepwise
from aqaa.tokenizers import interleave

TAGS = {  # {task: its one wording}
    "asr": ("[asr]",), "tts": ("[tts]",), "answer": ("[answer]",), "asr_answer": ("[asr answer]",),
    "speak": ("[answer in speech]",), "read": ("[answer in speech]",),
    "chain": ("[asr answer in speech]",), "text": ("",),  # as in the text model: nothing
}  # fmt: skip


def grow(model, n_audio):
    """A copy of a Step-1 model (of transformers) with n_audio more ids behind its own.

    Every old weight stays as it is, bit for bit, so the text logits do; new rows of the embedding
    and of the head are random."""
    grown = copy.deepcopy(model)
    # mean_resizing would draw the new rows around the mean of the old ones: audio is no text.
    grown.resize_token_embeddings(model.config.vocab_size + n_audio, mean_resizing=False)
    return grown


class AudioPaLM(Stepwise):
    """Reads a tag and merged audio ids; writes, then speaks."""

    name, stage, words, group = "audiopalm", "speech", TAGS, MERGED

    def merged(self, audio):
        return interleave.groups(audio, self.model.ids).reshape(-1).tolist()
