"""How many threads torch computes with: one for small networks.

Threads of one operation meet at a barrier and spin there until the last one comes. The mini's products last some ten
microseconds, so a second thread gains nothing even on an idle machine; and as soon as another program wants a core, one
thread waits for its turn while the other spins: an answer then takes ten times as long (data/runs/speed.json).
"""

from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch

LARGE = 15_000_000  # weights of a network from which on more threads pay; the mini's largest part has 6 million
_counted = WeakKeyDictionary()


def threads_for(module):
    """How many threads suit an nn.Module on this machine: one below LARGE weights, else as many as the caller has."""
    return torch.get_num_threads() if count(module) >= LARGE else 1


def count(module):
    """Weights of a module; counted once, since every step of an answer asks."""
    if module not in _counted:
        _counted[module] = sum(x.numel() for x in (*module.parameters(), *module.buffers()))
    return _counted[module]


@contextmanager
def suited_to(*modules):
    """Within it torch has the threads that suit the largest of `modules`; afterwards what the caller had, always.

    A program that uses aqaa keeps its own setting: nothing of this outlives the block, an exception included.
    """
    before = torch.get_num_threads()
    networks = [module for module in modules if isinstance(module, torch.nn.Module)]  # tests have stand-ins
    wanted = max(map(threads_for, networks), default=before)
    if wanted == before:
        yield
        return
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def suited(iterator, *modules):
    """The items of `iterator`, each made with the threads that suit `modules`; between two items the caller's hold."""
    end = object()
    while True:
        with suited_to(*modules):
            item = next(iterator, end)
        if item is end:
            return
        yield item
