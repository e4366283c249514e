"""The same questions in noise, a room, over a telephone, with lost packets, or overdriven.

The preserve rate is the share of the questions right when clean that are right in a condition."""

import re
import zlib

import numpy as np

from aqaa.config import SAMPLE_RATE
from aqaa.corpus import degrade
from aqaa.evaluation.mos import wilson

CLEAN = "clean"
PACKET, LOST, AGAIN = 0.02, 0.1, 0.5  # s; chance to lose a packet, and after a lost one the next
DRIVE = 4.0  # times too loud (12 dB) for what takes the sound


def loss(wav, rng):
    """Packets lost in bursts, silence in their place: one in six (Gilbert's model)."""
    wav, size, lost = np.array(wav), round(PACKET * SAMPLE_RATE), False
    for start in range(0, len(wav), size):
        lost = rng.random() < (AGAIN if lost else LOST)
        wav[start : start + size] *= not lost
    return wav


def clipping(wav):
    """All that is louder than a quarter of the peak is cut off."""
    peak = np.abs(wav).max(initial=0) / DRIVE
    return np.clip(wav, -peak, peak)


OTHERS = {
    "room": lambda wav, rng: degrade.room(wav, 0.5, 0.7, rng), "loss": loss,
    "clipping": lambda wav, rng: clipping(wav),
    **{name: lambda wav, rng, line=line: line(wav) for name, line in degrade.LINES.items()},
}  # fmt: skip


def conditions(text):
    """["clean", "noise 20", …] of "20,room" or "noise 20,room". Raises ValueError."""
    names = [CLEAN]
    for part in filter(None, (" ".join(one.split()) for one in text.split(","))):
        name = f"noise {part}" if re.fullmatch(r"-?\d+", part) else part
        if name not in OTHERS and name != CLEAN and not re.fullmatch(r"noise -?\d+", name):
            raise ValueError(f"there is no condition {part!r}: write decibels of noise or one of "
                             f"{', '.join(OTHERS)}, as in 20,10,0,room.")  # fmt: skip
        names += [name] * (name not in names)
    return names


def degraded(wav, condition, seed):
    """wav (N,) float32 at 16 kHz under a condition; the same for the same seed, a text."""
    if condition == CLEAN:
        return wav
    rng = np.random.default_rng(zlib.crc32(f"{seed} {condition}".encode()))
    if condition in OTHERS:
        made = OTHERS[condition](wav, rng)
    else:
        made = degrade.noise(wav, int(condition.split()[1]), rng)
    return np.asarray(made, np.float32)


def kept(rows, scores=("text", "spoken")):
    """{condition: {score: share, "kept_" + score: preserve rate}} with intervals, in percent."""
    found, clean = {}, {row["id"]: row for row in rows if row.get("condition", CLEAN) == CLEAN}
    for name in dict.fromkeys(row.get("condition", CLEAN) for row in rows):
        mine, found[name] = [row for row in rows if row.get("condition", CLEAN) == name], {}
        for score in scores:
            known = [row for row in mine if row.get(score) is not None]
            before = [row for row in known if clean.get(row["id"].split("@")[0], {}).get(score)]
            for key, some in ((score, known), (f"kept_{score}", name != CLEAN and before)):
                if some:
                    found[name][key] = wilson(sum(row[score] for row in some), len(some))
    return found
