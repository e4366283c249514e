"""Golden tensors of the official classes against ours: `python -m tests.parity FOLDER...`.

The tensors come from a processor on which MKL takes its portable path. Its AVX2 and AVX-512 transforms round
differently, by more than the fixtures allow for the logarithm of a nearly empty bin (the official front ends miss them
there as well), so the portable path is asked for before torch is loaded.
"""

import os

os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
