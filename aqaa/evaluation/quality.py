"""How an answer sounds to nobody in particular: DNSMOS (Reddy et al. 2022) by `speechmos`.

A network's guess of what listeners would say from 1 to 5; the package is the extra `mos`."""

from functools import cache
from pathlib import Path

import numpy as np

from aqaa.config import SAMPLE_RATE
from aqaa.corpus.kokoro import lacking

SECONDS = 9.01  # that the network hears at a time
QUIET = 1e-4  # peak under which there is nothing to judge


def missing():
    """Packages that are not installed, as a list of names."""
    return lacking("speechmos", "librosa", "onnxruntime")


@cache
def _scorer():
    """The package's scorer on one thread: its own sessions take all, and wait for each other."""
    import onnxruntime
    from speechmos import dnsmos

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    folder = Path(dnsmos.__file__).parent / "dnsmos_models"
    scorer = dnsmos.DNSMOS.__new__(dnsmos.DNSMOS)
    for name, file in (("onnx_sess", "sig_bak_ovr.onnx"), ("p808_onnx_sess", "model_v8.onnx")):
        setattr(scorer, name, onnxruntime.InferenceSession(str(folder / file), options))
    return scorer


def dnsmos(wav):
    """Overall quality of wav (N,) at 16 kHz from 1 to 5; None for silence, or without the package.
    A short sound is repeated to SECONDS; the package repeats more and averages over the repeats."""
    wav = np.clip(np.asarray(wav, np.float32), -1, 1)
    if missing() or np.abs(wav).max(initial=0) < QUIET:
        return None
    wav = np.resize(wav, max(len(wav), int(SECONDS * SAMPLE_RATE)))
    return round(float(_scorer()(wav, SAMPLE_RATE, False)["ovrl_mos"]), 3)
