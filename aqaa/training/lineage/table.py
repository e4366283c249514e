"""`aqaa train lineage NAME`: the stages of each system of the lineage, in their order.

All start from the same shipped model, on the same corpus. `STAGES` of a system's file lists its
stages, whose steps take at most an hour on two cores, all of a system together."""

import time
from pathlib import Path
from pkgutil import resolve_name

import torch

from aqaa.files import data_folder
from aqaa.lineage.registry import SYSTEMS, TRAINED
from aqaa.training.run import Run


def stages(system):
    """The stages of a system."""
    module = SYSTEMS[system].split(":")[0].rpartition(".")[2]
    return resolve_name(f"{__package__}.{module}:STAGES")


def main(name, out="work/lineage", init=None, **options):
    """Train a system, or `all` of them, each in a folder of its name. options: of `run.Run`.
    Raises ValueError for another name."""
    if name not in (*TRAINED, "all"):
        raise ValueError(f"unknown system {name!r}: choose one of {', '.join(TRAINED)}, or all")
    for system in TRAINED if name == "all" else (name,):
        run = Run(Path(out) / system, init=init or data_folder() / "mini", **options)
        for stage in stages(system):
            started = time.monotonic()
            torch.manual_seed(run.training_seed)
            run.train(stage)
            print(f"{stage.name}: {(time.monotonic() - started) / 60:.1f} min")
