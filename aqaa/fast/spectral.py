"""Convolution with long kernels by fewer products: short pieces of the signal are transformed, multiplied, and back.

With 11 taps a direct convolution costs 11 products of a (C, C) matrix for every sample; on pieces of 32 samples, whose
spectra are multiplied, 47 products give 22 samples. All three steps are matrix products. Exact up to rounding.
"""

from functools import lru_cache
from math import pi

import torch

SIZE = 32  # samples in a piece
ROWS = 96  # pieces transformed together, and
SAMPLES = 2048  # samples activated together: what is between two steps stays in a core's cache
CHANNELS, TAPS = 32, 7  # below these a direct convolution is cheaper


def pays(weight):
    """Whether a kernel (C_out, C_in, taps) is wide and long enough."""
    return weight.shape[1] >= CHANNELS and weight.shape[2] >= TAPS


@lru_cache
def transforms(taps):
    """Matrices such that correlation of a piece x with w is inverse @ ((of_kernel @ w) * (forward @ x)).

    forward (47, SIZE), of_kernel (47, taps), inverse (SIZE - taps + 1, 47). A product of complex numbers is written as
    three real ones (Gauss): with a = wr (xr + xi), b = xr (wi - wr), c = xi (wr + wi) it is a - c + i (a + b).
    """
    time = torch.arange(SIZE, dtype=torch.float64)
    angle = 2 * pi / SIZE * torch.arange(1, SIZE // 2, dtype=torch.float64)[:, None] * time
    real, imaginary = angle.cos(), -angle.sin()
    ends = torch.stack([torch.ones_like(time), 1 - 2 * (time % 2)])  # frequencies 0 and SIZE / 2 are real
    forward = torch.cat([ends, real + imaginary, real, imaginary])
    wr, wi = real[:, :taps], -imaginary[:, :taps]  # conjugate: a correlation, as convolution layers compute it
    of_kernel = torch.cat([ends[:, :taps], wr, wi - wr, wr + wi])
    inverse = torch.cat([ends / SIZE, (real + imaginary) * 2 / SIZE, imaginary * 2 / SIZE, real * -2 / SIZE]).T
    return forward.float(), of_kernel, inverse[: SIZE - taps + 1].float().contiguous()


def of_kernel(weight):
    """weight (C_out, C_in, taps) -> its spectrum (47, C_in, C_out) in the order of `transforms`, and taps."""
    taps = weight.shape[2]
    return torch.einsum("ft,oit->fio", transforms(taps)[1], weight.double()).to(weight.dtype).contiguous(), taps


def convolve(x, spectrum, bias, padding, dilation, activation):
    """x (T, C_in) -> (T + 2 padding - (taps - 1) dilation, C_out); `spectrum` comes from `of_kernel`.

    activation(out, x) writes what becomes of a piece of x on its way in. A dilated convolution is an ordinary one over
    `dilation` neighbouring samples taken as one, with that many times the channels side by side.
    """
    spectrum, taps = spectrum
    forward, _, inverse = transforms(taps)
    length, step = len(x) + 2 * padding - (taps - 1) * dilation, len(inverse)
    pieces = -(-length // (step * dilation))
    padded = x.new_empty(((pieces - 1) * step + SIZE) * dilation, x.shape[1])
    padded[:padding] = padded[padding + len(x) :] = 0
    for part, out in zip(x.split(SAMPLES), padded[padding : padding + len(x)].split(SAMPLES)):
        activation(out, part)
    width = dilation * x.shape[1]
    windows = padded.as_strided((SIZE, pieces, width), (width, step * width, 1))
    y = x.new_empty(pieces, step, dilation * spectrum.shape[2])
    at_once = max(1, ROWS // dilation)
    for part, out in zip(windows.split(at_once, 1), y.split(at_once)):
        spectra = (forward @ part.reshape(SIZE, -1)).view(len(forward), -1, x.shape[1])
        product = torch.bmm(spectra, spectrum)  # (47, pieces * dilation, C_out)
        product[0] += SIZE * bias  # frequency 0 is the sum over a piece
        out.copy_((inverse @ product.flatten(1)).view(step, -1, out.shape[2]).transpose(0, 1))
    return y.view(-1, spectrum.shape[2])[:length]


def use(module):
    """Put the twin in place in `module` and its children."""
