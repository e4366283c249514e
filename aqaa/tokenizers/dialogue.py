"""A dialogue as one sequence of ids: chat template, answer layouts, and the machine behind them.

A layout decides how the text and the audio of an answer share one sequence. Its machine says which
ids may come next while the backbone generates, so that every answer can be taken apart again.
"""

from dataclasses import dataclass
from typing import NamedTuple

from aqaa.config import GROUP_SIZE, LINGUISTIC_PER_GROUP
from aqaa.tokenizers.interleave import groups

END_OF_SEQUENCE = 2  # `</s>`: never trained as an answer's end, but a stop wherever it occurs


def prompt(turns, tokenizer, ids, answer=True, marker=None):
    """A dialogue as ids: `<s>`, `<|BOT|>role\\n content <|EOT|>` a turn, an open assistant turn.

    turns: (role, content) pairs; the role "user" is written "human"; content is text, or audio ids,
    or a list of both. Markers spelt out in a text are read as plain text. With answer=False no
    assistant turn is opened. marker: a control token after `<s>` asks for another kind of answer.
    """
    result = [ids.bos] if marker is None else [ids.bos, marker]
    for role, content in turns:
        result += [ids.bot, *_turn(role, content, tokenizer), ids.eot]
    return result + [ids.bot, *_turn("assistant", "", tokenizer)] if answer else result


def _turn(role, content, tokenizer):
    """Header and content of a turn; text at its start is encoded with the header, as officially."""
    parts = content if isinstance(content, (list, tuple)) else ()
    mixed = any(isinstance(part, str) or hasattr(part, "__len__") for part in parts)
    text, encoded = ("human" if role == "user" else role) + "\n", []
    for part in [*content, []] if mixed else [content, []]:
        if isinstance(part, str):
            text += part
            continue
        if text:
            encoded += tokenizer.encode(text, prefix=False, specials=False)
        encoded += [int(token) for token in part]
        text = ""
    return encoded


class Allowed(NamedTuple):
    """What may come next: ids start..stop-1 of one kind, or one of the markers."""

    kind: str  # "text", "linguistic", "semantic", "marker"; "end" after the answer is complete
    start: int
    stop: int
    markers: tuple  # those of text_end, text_start, audio_start, audio_end, eot that are legal here


@dataclass(frozen=True)
class Layout:
    """How text and audio of an answer share one sequence (AQAA Table 1).

    Blocks of `text_block` text ids, then `audio_block` audio ids. The id after the last text id is
    text_end; from there on only audio comes, then eot. If the audio ends first, text_start says so,
    and the rest of the text follows; without `late_text` the machine forbids that.
    """

    name: str
    text_block: int | None  # None: all the text at once; 0: no text
    audio_block: int
    marked: bool = False  # every piece stands between audio_start and audio_end (Table 2)
    late_text: bool = False  # audio may end before the text
    padded: bool = False  # text blocks go on when the text has ended, full of text_end

    def __post_init__(self):
        if self.audio_block <= 0 or self.audio_block % GROUP_SIZE:
            raise ValueError(f"layout {self.name}: audio_block must be a multiple of {GROUP_SIZE}")

    def arrange(self, text, audio, ids):
        """The answer's ids, eot included; text (T,) ids of words, audio (5 G,) merged ids.

        Raises ValueError for ids of another kind.
        """
        return self.arrange_pieces([(text, audio)], ids)

    def arrange_pieces(self, pieces, ids):
        """An answer of several pieces (text, audio), each spoken in one manner.

        With marked=True the pieces keep their markers (Table 2, best row); otherwise they are
        joined. `join` gives that table's third row. Only marked pieces have a Machine.
        """
        answer = []
        for text, audio in pieces:
            text, audio = [int(t) for t in text], [int(a) for a in audio]
            wrong = next((t for t in text if not ids.first_text <= t < ids.n_text), None)
            if wrong is not None:
                text_ids = f"{ids.first_text}..{ids.n_text - 1}"
                raise ValueError(f"id {wrong} is not a text id: those lie in {text_ids}")
            if len(audio) % GROUP_SIZE or groups(audio, ids).size != len(audio):
                needed = "whole groups of 2 linguistic and 3 semantic ids"
                raise ValueError(f"the audio of an answer must be {needed}")
            body = self._interleave(text, audio, ids)
            answer += [ids.audio_start, *body, ids.audio_end] if self.marked else body
        return answer + [ids.eot]

    def _interleave(self, text, audio, ids):
        if self.text_block == 0:
            return audio
        size, body = self.text_block or len(text) + 1, []
        while True:
            body += text[:size]
            if len(text) < size:  # a block that is not full is the last: the rest is audio
                if not self.padded:
                    return body + [ids.text_end] + audio
                body += [ids.text_end] * (size - len(text))
                for start in range(0, len(audio), self.audio_block):
                    block = audio[start : start + self.audio_block]
                    full = len(block) == self.audio_block
                    body += block + [ids.text_end] * (size if full else 0)
                return body
            text = text[size:]
            body += audio[: self.audio_block]
            if len(audio) < self.audio_block:  # the audio has ended before the text
                return body + [ids.text_start, *text, ids.text_end]
            audio = audio[self.audio_block :]

    def parse(self, tokens, ids):
        """(text ids, audio ids) of an answer, up to its eot; groups may be broken, see `split`."""
        return join(self.parse_pieces(tokens, ids))

    def parse_pieces(self, tokens, ids):
        """The same, one (text, audio) pair a marked piece; a single pair without markers."""
        pieces = [([], [])]
        for token in map(int, tokens):
            if token in (ids.eot, END_OF_SEQUENCE):
                break
            if token == ids.audio_start and any(pieces[-1]):
                pieces.append(([], []))
            if ids.first_text <= token < ids.end:
                pieces[-1][token >= ids.n_text].append(token)
        return pieces

    def machine(self, ids, min_audio=0):
        """A fresh Machine for one answer, which may not stop before `min_audio` audio ids."""
        return Machine(self, ids, min_audio)


def join(pieces):
    """One piece out of several: texts joined, audios joined (Table 2, marker removal)."""
    return [t for text, _ in pieces for t in text], [a for _, audio in pieces for a in audio]


TABLE_1 = (
    Layout("audio_only", 0, 15),
    Layout("ratio_6_50", 6, 50, late_text=True),  # 5 text ids a second: no faster than speech
    Layout("ratio_3_5", 3, 5),
    Layout("text_cot", None, 15),
    Layout("ratio_10_15", 10, 15),
)
NEIGHBOURS = (  # other systems' blocks; audio by its seconds, in whole groups of 120 ms
    Layout("glm4_voice", 13, 85, late_text=True),  # 13:26 at 12.5 Hz
    Layout("step_audio_2", 1, 5, late_text=True),  # 1:4 at 25 Hz
    Layout("lfm2_audio", 6, 40, late_text=True),  # 6:12 at 12.5 Hz
    Layout("llama_omni2", 3, 15, late_text=True),  # 3:10 at 25 Hz
    Layout("padded_10_15", 10, 15, padded=True),  # no early stop: 2506.04518 drops these blocks
)
LAYOUTS = {layout.name: layout for layout in TABLE_1}
EVERY_LAYOUT = {layout.name: layout for layout in (*TABLE_1, *NEIGHBOURS)}


def layout(name="ratio_10_15"):
    """The layout of that name. Raises ValueError for an unknown name."""
    if name not in EVERY_LAYOUT:
        raise ValueError(f"unknown layout {name!r}: choose one of {', '.join(EVERY_LAYOUT)}")
    return EVERY_LAYOUT[name]


class Machine:
    """Follows an answer id by id and says what may come next.

    Text and audio take turns, a block each, until text_end; then audio runs on to the end:

        text --block full--> audio --block full--> text ... text --text_end--> audio --eot--> end

    eot is legal only when the text has ended and the audio is at the end of a group. A marked piece
    waits in "open" for audio_start and rests in "closed" after audio_end, where another may follow.
    With `late_text`, audio may end first: text_start, the rest of the text, text_end, "closed".
    A padded layout fills every later text block, and the last one, in "padding".
    """

    def __init__(self, layout, ids, min_audio=0):
        self.layout, self.ids, self.min_audio = layout, ids, min_audio
        self.audio_total = 0  # in all pieces
        self._stop = ids.audio_end if layout.marked else ids.eot  # ends a piece
        self._begin_piece()
        if layout.marked:
            self.state = "open"

    def _begin_piece(self):
        self.text_done = self.layout.text_block == 0
        self.audio_done = False
        self.state = "audio" if self.text_done else "text"
        self.text_used = self.audio_used = 0  # in this block

    @property
    def finished(self):
        return self.state == "end"

    def allowed(self):
        """Allowed: the kind and range of the next id, and the markers that may come instead."""
        ids, state = self.ids, self.state
        if state == "text":
            return Allowed("text", ids.first_text, ids.n_text, (ids.text_end,))
        if state == "audio":
            place = self.audio_used % GROUP_SIZE  # in the group: L L S S S
            if place >= LINGUISTIC_PER_GROUP:
                return Allowed("semantic", ids.semantic_start, ids.end, ())
            markers = ()
            # A marker inside a group would leave codes that the vocoder cannot use.
            if place == 0 and self.audio_total >= self.min_audio:
                late = (ids.text_start,) if self.layout.late_text else ()
                markers = (self._stop,) if self.text_done else late
            return Allowed("linguistic", ids.n_text, ids.semantic_start, markers)
        if state == "padding":
            return Allowed("text", 0, 0, (ids.text_end,))
        if state == "closed":  # behind a marked piece, or behind text that outlived its audio
            another = self.layout.marked and not self.audio_done
            return Allowed("marker", 0, 0, (ids.audio_start, ids.eot) if another else (self._stop,))
        if self.finished:
            return Allowed("end", 0, 0, ())
        return Allowed("marker", 0, 0, (ids.audio_start,))

    def advance(self, token):
        """Take the next id. Raises ValueError if it is not legal here."""
        may = self.allowed()
        if token in may.markers:
            self._advance_marker(token)
        elif not may.start <= token < may.stop:
            legal = f"{may.kind} {may.start}..{may.stop - 1} or {may.markers}"
            raise ValueError(f"id {token} is not legal here: {legal}")
        elif self.state == "text":
            self.text_used += 1
            # After audio that has ended (late text), the text goes on in one run.
            if self.text_used == self.layout.text_block and not self.audio_done:
                self.state, self.audio_used = "audio", 0
        else:
            self.audio_used += 1
            self.audio_total += 1
            padded = self.text_done and self.layout.padded
            if self.audio_used == self.layout.audio_block and (padded or not self.text_done):
                self.state, self.text_used = "padding" if padded else "text", 0

    def _advance_marker(self, token):
        ids = self.ids
        if token == ids.text_end:
            self.text_done = True
            self.audio_used = 0
            self.text_used += 1
            padding = self.layout.padded and self.text_used < self.layout.text_block
            self.state = "closed" if self.audio_done else "padding" if padding else "audio"
        elif token == ids.text_start:
            self.audio_done = True
            self.state = "text"
        elif token == ids.audio_start:
            self._begin_piece()
        elif token == ids.audio_end:
            self.audio_done = False
            self.state = "closed"
        else:
            self.state = "end"


@dataclass(eq=False)
class TextOnly:
    """A Layout, and its own Machine, where only text is wanted: text ids, then eot."""

    ids: object = None
    finished: bool = False

    def machine(self, ids, min_audio=0):
        return TextOnly(ids)

    def allowed(self):
        return Allowed("text", self.ids.first_text, self.ids.n_text, (self.ids.eot,))

    def advance(self, token):
        self.finished = token == self.ids.eot


@dataclass(frozen=True)
class Resumed:
    """A Layout whose answer has begun: the prompt ends with the ids in `said`."""

    layout: object
    said: tuple

    def machine(self, ids, min_audio=0):
        """The layout's machine after `said`. ValueError if those do not begin such an answer."""
        machine = self.layout.machine(ids, min_audio)
        for token in self.said:
            machine.advance(token)
        return machine
