"""One thread that works for many: it owns the model, and nobody else ever waits inside it.

A job has `drain()` (take what came in; quick), `busy` (is there work for the model?), `work()` (one
unit of it), `place(n)` (told its place in the line when that changes) and `fail(fault)`. At most
`seats` jobs take turns, a unit each; the others wait in the order in which they came; who has
nothing to do gives up the seat. A job fills a queue of its own, however slowly its client reads."""

import asyncio
import threading
from collections import deque

SEATS = 2  # more answers at once make each stutter, fewer let a short one wait behind a long one
END = object()


class Worker:
    """The thread; `add`, `remove` and `wake` may be called from any other."""

    def __init__(self, seats=SEATS):
        self.seats = seats
        self._jobs, self._seated, self._line = [], deque(), []
        self._changed, self._news, self._ended = threading.Condition(), False, False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def add(self, job):
        with self._changed:
            if self._ended:
                raise RuntimeError("the server is stopping: ask another one.")
            self._jobs.append(job)
        self.wake()

    def remove(self, job):
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
        self.wake()

    def wake(self):
        """Something came in for some job."""
        with self._changed:
            self._news = True
            self._changed.notify()

    def stop(self, seconds=30):
        """Finish the unit in hand, and end; jobs that are left get no more work."""
        with self._changed:
            self._ended = True
        self.wake()
        self._thread.join(seconds)

    def _run(self):
        while self._turn():  # a method of its own, so that nothing here holds a job that has gone
            pass

    def _turn(self):
        """Drain every job, then do one unit of work; False at the end."""
        with self._changed:
            if not self._seated:
                self._changed.wait_for(lambda: self._news)
            self._news, jobs = False, list(self._jobs)
            if self._ended:
                return False
        for job in jobs:  # what users say and stop comes before any work
            self._safely(job, job.drain)
        self._seat(jobs)
        if self._seated:
            job = self._seated.popleft()
            self._safely(job, job.work)
            self._seated.append(job)
        return True

    def _seat(self, jobs):
        busy = [job for job in jobs if job.busy]
        self._seated = deque(job for job in self._seated if job in busy)
        waiting = [job for job in self._line if job in busy]
        known = {*self._seated, *waiting}
        waiting += [job for job in busy if job not in known]
        while waiting and len(self._seated) < self.seats:
            self._seated.append(waiting.pop(0))
        self._line = waiting
        for place, job in enumerate(waiting, 1):
            job.place(place)

    def _safely(self, job, step):
        try:
            step()
        except Exception as fault:  # of one client: the others go on
            try:
                job.fail(fault)
            except Exception:  # nobody is there to be told
                self.remove(job)


class Waiting(int):
    """A notice: so many are before you, yourself included."""


class Reply:
    """A job that hands the items of a generator to one request of the event loop."""

    def __init__(self, make):
        self.busy, self._make, self._source, self._place = True, make, None, None
        self._loop, self._items = asyncio.get_running_loop(), asyncio.Queue()

    def drain(self):
        pass

    def work(self):
        if self._source is None:
            self._source = self._make()
        item = next(self._source, END)
        self.busy = item is not END
        self._send(item)

    def place(self, place):
        if place != self._place:
            self._place = place
            self._send(Waiting(place))

    def fail(self, fault):
        self.busy = False
        self._send(fault)

    def _send(self, item):
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:  # the event loop has been closed: nobody reads
            self.busy = False

    async def items(self, worker):
        """What the generator gives, and Waiting notices before it. Raises its exceptions."""
        worker.add(self)
        try:
            while (item := await self._items.get()) is not END:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:  # also when the client has gone: a traceback may keep this job, but not its work
            worker.remove(self)
            self.busy, self._source = False, None
