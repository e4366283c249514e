"""HiFT's long kernels by fewer products: pieces are transformed, multiplied, transformed back.

With 11 taps a direct convolution costs 11 products of a (C, C) matrix for every sample; on pieces
of 32 samples, whose spectra are multiplied, 47 products give 22 samples. Exact up to rounding."""

from functools import lru_cache
from math import pi

import torch

from aqaa.vocoder.hift import ResBlock

SIZE = 32  # samples in a piece
ROWS = 96  # pieces transformed together, and
SAMPLES = 2048  # samples activated together: what is between two steps stays in a core's cache
CHANNELS = 32  # a direct convolution with fewer channels
TAPS = 7  # or fewer taps is cheaper


def use(module):
    """Put the twin in place of each ResBlock that is folded, wide and long enough."""
    for block in module.modules():
        if type(block) is ResBlock and block.convs1[0].folded:
            _, channels, taps = block.convs1[0].weight.shape
            if channels >= CHANNELS and taps >= TAPS:
                block.__class__ = SpectralResBlock


class SpectralResBlock(ResBlock):
    """A ResBlock that multiplies spectra on a CPU in fp32, where no gradient is asked for."""

    spectra = None  # [(of convs1[i], of convs2[i])] of the present weights, made when first needed

    def forward(self, x):
        """x (B, C, T) -> (B, C, T)."""
        if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        if self.spectra is None:
            pairs = zip(self.convs1, self.convs2)
            self.spectra = [[of_kernel(conv.weight.detach()) for conv in pair] for pair in pairs]
        out = torch.empty_like(x)
        for row, place in zip(x, out):
            y = row.T.contiguous()  # (T, C)
            for (snake1, conv1, snake2, conv2), (first, second) in zip(self.pairs(), self.spectra):
                inner = convolve(y, first, conv1, snake1)
                y = convolve(inner, second, conv2, snake2).add_(y)
            place.copy_(y.T)
        return out

    def _load_from_state_dict(self, *args):
        self.spectra = None  # of the weights that are about to go
        super()._load_from_state_dict(*args)


@lru_cache
def transforms(taps):
    """forward (47, SIZE), of_kernel (47, taps), inverse (SIZE - taps + 1, 47), such that
    inverse @ ((of_kernel @ w) * (forward @ x)) correlates a piece x with w.

    A product of complex numbers is three real ones (Gauss): with a = wr (xr + xi),
    b = xr (wi - wr), c = xi (wr + wi) it is a - c + i (a + b)."""
    time = torch.arange(SIZE, dtype=torch.float64)
    angle = 2 * pi / SIZE * torch.arange(1, SIZE // 2, dtype=torch.float64)[:, None] * time
    real, imaginary = angle.cos(), -angle.sin()
    ends = torch.stack([torch.ones_like(time), 1 - 2 * (time % 2)])  # frequencies 0, SIZE / 2
    both = real + imaginary
    forward = torch.cat([ends, both, real, imaginary])
    wr, wi = real[:, :taps], -imaginary[:, :taps]  # conjugate: a correlation, as layers compute it
    of_kernel = torch.cat([ends[:, :taps], wr, wi - wr, wr + wi])
    inverse = torch.cat([ends / SIZE, both * 2 / SIZE, imaginary * 2 / SIZE, real * -2 / SIZE]).T
    return forward.float(), of_kernel, inverse[: SIZE - taps + 1].float().contiguous()


def of_kernel(weight):
    """weight (C_out, C_in, taps) -> (its spectrum (47, C_in, C_out), taps)."""
    taps = weight.shape[2]
    spectrum = torch.einsum("ft,oit->fio", transforms(taps)[1], weight.double())
    return spectrum.to(weight.dtype).contiguous(), taps


def convolve(x, spectrum, conv, snake):
    """conv(snake(x)): x (T, C_in) -> (T', C_out); spectrum: `of_kernel` of the conv's weight. A
    dilated convolution is an ordinary one over `dilation` samples whose channels stand as one."""
    spectrum, taps = spectrum
    forward, _, inverse = transforms(taps)
    padding, dilation = conv.options["padding"], conv.options["dilation"]
    length = len(x) + 2 * padding - (taps - 1) * dilation
    step = len(inverse)  # samples that a piece gives
    pieces = -(-length // (step * dilation))
    padded = x.new_empty(((pieces - 1) * step + SIZE) * dilation, x.shape[1])
    padded[:padding] = 0
    padded[padding + len(x) :] = 0
    inside = padded[padding : padding + len(x)]
    for part, out in zip(x.split(SAMPLES), inside.split(SAMPLES)):
        sine = torch.mul(part, snake.alpha, out=out).sin_()
        torch.addcmul(part, sine, sine * (1 / (snake.alpha + 1e-9)), out=out)
    width = dilation * x.shape[1]
    # overlapping pieces, side by side, as a view: (SIZE, pieces, width)
    windows = padded.as_strided((SIZE, pieces, width), (width, step * width, 1))
    y = x.new_empty(pieces, step, dilation * spectrum.shape[2])
    at_once = max(1, ROWS // dilation)
    for part, out in zip(windows.split(at_once, 1), y.split(at_once)):
        spectra = (forward @ part.reshape(SIZE, -1)).view(len(forward), -1, x.shape[1])
        product = torch.bmm(spectra, spectrum)  # (47, pieces * dilation, C_out)
        product[0] += SIZE * conv.bias  # frequency 0 is the sum over a piece
        out.copy_((inverse @ product.flatten(1)).view(step, -1, out.shape[2]).transpose(0, 1))
    return y.view(-1, spectrum.shape[2])[:length]
