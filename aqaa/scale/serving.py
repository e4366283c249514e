"""Several listeners at once: one backbone answers all of them together, each has a vocoder worker.

Answers join and leave the batch at any token. A Step-1 model knows distances only, so an answer may
begin anywhere in the cache: its prompt is run alone, then moved to its row's right end."""

import threading
from contextlib import AbstractContextManager, suppress
from functools import partial
from queue import Empty, SimpleQueue

import torch

from aqaa.backbone import generation
from aqaa.pipeline import AQAA, Talk
from aqaa.scale.vllm.client import EngineError

END = object()
CLOSED = "the batch that this answer was in has been closed: submit the question to another."


class Batch(AbstractContextManager):
    """An engine (AQAA.engine): one backbone, in a thread, for all who call `generate`. Each answer
    is what it would be alone with the same seed, but for the order of sums in a larger matrix
    product. batch_size: answers at once; others wait. Close it, or use it in a `with` block."""

    def __init__(self, backbone, batch_size=8):
        self.backbone, self.batch_size = backbone, batch_size
        self.arrivals, self.vocabulary = SimpleQueue(), generation.Vocabulary(backbone)
        self.closed = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def generate(self, prompt, ids, layout, **sampling):
        """Steps of one answer, as of generation.generate. Raises ValueError as that does."""
        seat = _Seat(self.backbone, prompt, ids, layout, **sampling)
        self.arrivals.put(seat)
        if self.closed:  # the worker thread may have stopped already
            seat.steps_out.put(EngineError(CLOSED))
        return seat.listen()

    def close(self, *_):
        """Stop; answers under way end with an EngineError."""
        self.closed = True
        self.arrivals.put(END)
        self.thread.join()

    __exit__ = close

    @torch.inference_mode()
    def _run(self):
        seats, decoder, arrived = [], None, []
        while not self.closed:
            try:
                arrived = self._arrived(seats)
                seats, decoder = self._turn(seats, decoder, arrived)
            except Exception as fault:  # all in the batch learn of it; none may wait for ever
                for seat in {*seats, *arrived}:
                    seat.steps_out.put(fault)
                seats, decoder = [], None
        waiting = {*seats, *arrived}
        while not self.arrivals.empty():
            waiting.add(self.arrivals.get())
        for seat in waiting - {END}:
            seat.steps_out.put(EngineError(CLOSED))

    def _arrived(self, seats):
        """New seats, as far as there is room; waits for one if there is nothing else to do."""
        new = []
        with suppress(Empty):
            while len(seats) + len(new) < self.batch_size:
                if (seat := self.arrivals.get(block=not seats and not new)) is END:
                    break
                new.append(seat)
        return new

    def _turn(self, seats, decoder, arrived):
        """One more id for each seat, or a new order of seats → (seats, decoder)."""
        staying = [seat for seat in seats if not seat.finished]
        if arrived or len(staying) < len(seats):
            return staying + arrived, self._seat(staying, seats, decoder, arrived)
        if seats:
            generation.advance(decoder, seats, self.vocabulary)
        return seats, decoder

    def _seat(self, staying, seats, decoder, arrived):
        """A decoder with the caches of all who stay or are new; draws the first id of the new."""
        caches = []  # keys and values of each, (layers, 1, G, n, d), without padding
        for seat in staying:
            row, end = seats.index(seat), decoder.cache.length
            own = slice(end - len(seat.history) + 1, end)  # the last id has not been fed yet
            tensors = decoder.cache.keys, decoder.cache.values
            caches.append([tensor[:, row : row + 1, :, own] for tensor in tensors])
        for seat in arrived:
            alone = generation.Decoder(self.backbone, 1, len(seat.history))
            prompt = generation.embed(self.backbone, [seat.history])
            generation.advance(alone, [seat], self.vocabulary, prompt)
            caches.append((alone.cache.keys, alone.cache.values))
        if not caches:
            return None
        length = max(keys.shape[3] for keys, _ in caches)
        room = length + max(seat.left for seat in (*staying, *arrived))
        merged = generation.Decoder(self.backbone, len(caches), room)
        merged.cache.length = length
        visible = torch.zeros(len(caches), room, dtype=torch.bool, device=merged.cache.keys.device)
        for row, (keys, values) in enumerate(caches):
            first = length - keys.shape[3]  # all answers end in the same slot
            merged.cache.keys[:, row, :, first:length] = keys[:, 0]
            merged.cache.values[:, row, :, first:length] = values[:, 0]
            visible[row, first:] = True
        merged.padding = None if visible[:, 0].all() else visible
        return merged


class _Seat(generation.Row):
    """A row of the batch, and the queue to its listener."""

    def __init__(self, backbone, prompt, ids, layout, *, temperature=0.7, top_p=0.9, seed=0,
                 max_tokens=1024, repetition=None, min_audio=0, prefill=None):  # fmt: skip
        generation.check_sampling(temperature, top_p, max_tokens)
        left = generation.room_for(backbone.config.max_seq_len, len(prompt), max_tokens)
        generator = torch.Generator(backbone.lm_head.weight.device).manual_seed(seed)
        machine, self.given_up = layout.machine(ids, min_audio), False
        super().__init__(prompt, machine, left, temperature, top_p, repetition, generator)
        self.steps_out = SimpleQueue()
        if self.finished:
            self.steps_out.put(END)

    @property
    def finished(self):
        return self.given_up or super().finished

    def take(self, token, may, logprob):
        super().take(token, may, logprob)
        self.steps_out.put(self.steps[-1])
        if self.finished:
            self.steps_out.put(END)

    def listen(self):
        try:
            while (step := self.steps_out.get()) is not END:
                if isinstance(step, Exception):
                    raise step
                yield step
        finally:
            self.given_up = True


class Server(AbstractContextManager):
    """A model for several listeners: `submit` questions, iterate over the Pieces of each answer.
    engine: what generates, such as vllm.client.Server, which makes batches itself; by default a
    Batch of the model's backbone. Close it, or use it in a `with` block."""

    def __init__(self, model, engine=None, batch_size=8):
        self.own = Batch(model.backbone, batch_size) if engine is None else None
        part = partial(getattr, model)
        self.model = AQAA(model.config, part, device=model.device, layout=model.layout)
        self.model.vocoder, self.model.engine = model.vocoder, engine or self.own
        for name in ("text", "linguistic", "semantic"):  # now, and not in several threads at once
            getattr(self.model, name)

    def submit(self, question, *, history=(), **sampling):
        """A Spoken answer to a question (see AQAA.stream), which begins at once, in a thread."""
        return Spoken(lambda: self.model.stream(question, history=history, **sampling))

    def close(self, *_):
        """Stop the batch; answers under way end with an error."""
        if self.own:
            self.own.close()

    __exit__ = close


class Spoken:
    """The Pieces of an answer that a worker thread makes; `answer` is the whole. Iterating raises
    whatever went wrong, after the pieces that came before; `resume` then goes on."""

    def __init__(self, begin):
        self.begin, self.talk = begin, None
        self._work()

    def _work(self):
        self.pieces = SimpleQueue()
        threading.Thread(target=self._speak, args=(self.pieces,), daemon=True).start()

    def _speak(self, pieces):
        try:
            self.talk = self.talk or self.begin()
            for piece in self.talk:
                pieces.put(piece)
            pieces.put(END)
        except Exception as fault:  # raised where somebody iterates
            pieces.put(fault)

    def __iter__(self):
        while (piece := self.pieces.get()) is not END:
            if isinstance(piece, Exception):
                self.pieces.put(piece)  # for the next who asks
                raise piece
            yield piece
        self.pieces.put(END)

    def resume(self):
        """Go on after a fault (see Talk.resume), or begin what never began; returns itself."""
        if isinstance(self.talk, Talk):
            self.talk.resume()
        self._work()
        return self

    @property
    def answer(self):
        """The Answer, once all pieces are made."""
        for _ in self:
            pass
        return self.talk.answer
