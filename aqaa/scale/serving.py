"""Several listeners at once: one backbone that answers all of them together, and a vocoder worker for each.

Answers join and leave the batch at any token. A Step-1 model knows distances only, so an answer may begin anywhere in
the cache: its prompt is run alone, then moved to the right end of its row, and what lies to the left is padding.
"""

import threading
from functools import partial
from queue import Empty, SimpleQueue

import torch

from aqaa.backbone import generation
from aqaa.pipeline import AQAA, Talk
from aqaa.scale.vllm.client import EngineError

END = object()
CLOSED = "the batch that this answer was in has been closed: submit the question to another."


class Batch:
    """An engine (AQAA.engine) that runs one backbone for all who call `generate`, in a thread of its own.

    Each answer is what it would be alone with the same seed, but for the order of sums in a larger matrix product.
    batch_size: answers at once; others wait. Close it, or use it in a `with` block.
    """

    def __init__(self, backbone, batch_size=8):
        self.backbone, self.batch_size = backbone, batch_size
        self.arrivals, self.vocabulary = SimpleQueue(), generation.Vocabulary(backbone)
        self.closed = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def generate(self, prompt, ids, layout, **sampling):
        """Steps of one answer, as backbone.generation.generate gives them. Raises ValueError as that does."""
        seat = _Seat(self.backbone, prompt, ids, layout, **sampling)
        self.arrivals.put(seat)
        if self.closed:  # nobody may come for it
            seat.steps_out.put(EngineError(CLOSED))
        return seat.listen()

    def close(self):
        """Stop; answers under way end with an EngineError."""
        self.closed = True
        self.arrivals.put(END)
        self.thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    @torch.inference_mode()
    def _run(self):
        seats, decoder, arrived = [], None, []
        while not self.closed:
            try:
                arrived = self._arrived(seats)
                seats, decoder = self._turn(seats, decoder, arrived)
            except Exception as fault:  # whoever is in the batch learns of it; none may wait for ever
                self._tell(fault, {*seats, *arrived})
                seats, decoder = [], None
        self._tell(EngineError(CLOSED), {*seats, *arrived})
        while not self.arrivals.empty():
            self._tell(EngineError(CLOSED), {self.arrivals.get()} - {END})

    @staticmethod
    def _tell(fault, seats):
        for seat in seats:
            seat.steps_out.put(fault)

    def _arrived(self, seats):
        """New seats, as far as there is room; waits for one if there is nothing else to do."""
        found = []
        while len(seats) + len(found) < self.batch_size:
            try:
                seat = self.arrivals.get(block=not seats and not found)
            except Empty:
                break
            if seat is END:
                break
            found.append(seat)
        return found

    def _turn(self, seats, decoder, arrived):
        """One more id for each seat, or a new order of seats -> (seats, decoder)."""
        going = [seat for seat in seats if seat.goes_on]
        if arrived or len(going) < len(seats):
            return going + arrived, self._seat(going, seats, decoder, arrived)
        if seats:
            embed = self.backbone.model.embed_tokens
            rows = torch.tensor([[seat.history[-1]] for seat in seats], device=embed.weight.device)
            self._step(seats, decoder.feed(embed(rows)))
        return seats, decoder

    def _seat(self, going, seats, decoder, arrived):
        """A decoder with the cache of those that go on and of those that are new, whose first id is drawn here."""
        embed = self.backbone.model.embed_tokens
        device = embed.weight.device
        caches = [self._cut(decoder, seats.index(seat), seat) for seat in going]
        for seat in arrived:
            alone = generation.Decoder(self.backbone, 1, len(seat.history))
            self._step([seat], alone.feed(embed(torch.tensor([seat.history], device=device))))
            caches.append((alone.cache.keys, alone.cache.values))
        if not caches:
            return None
        length = max(keys.shape[3] for keys, _ in caches)
        room = length + max(seat.left for seat in (*going, *arrived))
        merged = generation.Decoder(self.backbone, len(caches), room)
        merged.cache.length = length
        seen = torch.zeros(len(caches), room, dtype=torch.bool, device=device)
        for row, (keys, values) in enumerate(caches):
            own = slice(length - keys.shape[3], length)
            merged.cache.keys[:, row, :, own], merged.cache.values[:, row, :, own] = keys[:, 0], values[:, 0]
            seen[row, own.start :] = True
        merged.padding = None if seen[:, 0].all() else seen
        return merged

    @staticmethod
    def _cut(decoder, row, seat):
        """Keys and values (layers, 1, G, n, D) of one answer, without padding; its last id has not been fed yet."""
        end = decoder.cache.length
        own = slice(end - len(seat.history) + 1, end)
        return decoder.cache.keys[:, row : row + 1, :, own], decoder.cache.values[:, row : row + 1, :, own]

    def _step(self, seats, hidden):
        """Draw the next id of each seat from hidden (B, D), with its own settings and generator."""
        for seat, one in zip(seats, hidden, strict=True):
            if seat.goes_on:
                generation.step_batch([seat], one[None], self.vocabulary, seat.settings, seat.generator)


class _Seat(generation.Row):
    """One answer of the batch: its history, its rules, its dice, and the queue to its listener."""

    def __init__(
        self, backbone, prompt, ids, layout, *, temperature=0.7, top_p=0.9, seed=0, max_tokens=1024, repetition=None,
        min_audio=0, prefill=None,
    ):  # fmt: skip
        generation.check_sampling(temperature, top_p, max_tokens)
        self.left = generation.room_for(backbone.config.max_seq_len, len(prompt), max_tokens)
        super().__init__(0, [int(i) for i in prompt], layout.machine(ids, min_audio))
        self.settings = (temperature, top_p, repetition)
        self.generator = torch.Generator(backbone.lm_head.weight.device).manual_seed(seed)
        self.steps_out, self.given_up = SimpleQueue(), False
        if not self.goes_on:
            self.steps_out.put(END)

    @property
    def goes_on(self):
        return self.left > 0 and not self.machine.finished and not self.given_up

    def take(self, token, may, logprob):
        super().take(token, may, logprob)
        self.left -= 1
        self.steps_out.put(self.steps[-1])
        if not self.goes_on:
            self.steps_out.put(END)

    def listen(self):
        try:
            while (step := self.steps_out.get()) is not END:
                if isinstance(step, Exception):
                    raise step
                yield step
        finally:
            self.given_up = True


class Server:
    """A model for several listeners: `submit` a question, iterate over the Pieces of its answer while others are made.

    engine: what generates, such as vllm_engine.Server, which makes batches itself; by default a Batch of the model's
    backbone. Close it, or use it in a `with` block.
    """

    def __init__(self, model, engine=None, batch_size=8):
        self.own = Batch(model.backbone, batch_size) if engine is None else None
        self.model = AQAA(model.config, partial(getattr, model), device=model.device, layout=model.layout)
        self.model.vocoder, self.model.engine = model.vocoder, engine or self.own
        for part in ("text", "linguistic", "semantic"):  # now, and not in several threads at once
            getattr(self.model, part)

    def submit(self, question, *, history=(), **sampling):
        """A Spoken answer to a question (see AQAA.stream), which begins at once, in a thread of its own."""
        return Spoken(lambda: self.model.stream(question, history=history, **sampling))

    def close(self):
        """Stop the batch; answers under way end with an error."""
        if self.own:
            self.own.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Spoken:
    """The Pieces of an answer that a worker listens for, generates and vocodes; `answer` is the whole.

    Iterating raises whatever went wrong, after the pieces that came before; `resume` then goes on (see Talk.resume).
    """

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
        except Exception as fault:  # the listener's to deal with
            pieces.put(fault)

    def __iter__(self):
        while (piece := self.pieces.get()) is not END:
            if isinstance(piece, Exception):
                self.pieces.put(piece)  # for whoever asks again
                raise piece
            yield piece
        self.pieces.put(END)

    def resume(self):
        """Go on after a fault, from what was said; returns itself. A Talk that never began is begun again."""
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
