"""HiFT: mel spectrogram to wave by a neural source filter and an inverse STFT (CosyVoice).

A small network reads the pitch off the mel; harmonics of that pitch form a source signal, which
convolutions shape, guided by the mel, into a very short STFT, whose inverse is the wave.
"""

from dataclasses import dataclass
from math import pi, prod

import torch
import torch.nn.functional as F
from torch import nn

MAX_MAGNITUDE = 100.0
FINAL_SLOPE = 0.01  # the last leaky ReLU has torch's default slope, not lrelu_slope


class WeightNormConv(nn.Module):
    """Conv1d with weight = weight_g * weight_v / |weight_v| (norm over all axes but the first).

    Loads `weight_g`/`weight_v`, torch's newer `parametrizations.weight.original0/1`, or a folded
    `weight`. (torch's own weight norm rounds the product differently in all layers and loses the
    factors on folding: recorded answers and files would change.) rate: a ConvTranspose1d that
    gives so many samples for one; otherwise the length stays.
    """

    def __init__(self, n_in, n_out, kernel, dilation=1, rate=None):
        super().__init__()
        self.options = {"dilation": dilation, "padding": (kernel - 1) * dilation // 2}
        if rate is not None:
            self.options = {"stride": rate, "padding": (kernel - rate) // 2}
        conv = (nn.ConvTranspose1d if rate else nn.Conv1d)(n_in, n_out, kernel)
        self.weight_v = nn.Parameter(conv.weight.detach())
        self.weight_g = nn.Parameter(_norm(conv.weight.detach()))
        self.bias = nn.Parameter(conv.bias.detach())
        self._register_load_state_dict_pre_hook(self._rename)

    @property
    def folded(self):
        """Is the product in place of its factors?"""
        return "weight" in self._parameters

    def kernel(self):
        """The weight that the convolution uses."""
        return self.weight if self.folded else _product(self.weight_g, self.weight_v)

    def forward(self, x):
        """x (B, C_in, T) -> (B, C_out, T), or T * rate."""
        convolve = F.conv_transpose1d if "stride" in self.options else F.conv1d
        return convolve(x, self.kernel(), self.bias, **self.options)

    def fold(self):
        """Put the product in place of the factors, for inference; `factors` still knows them."""
        if not self.folded:
            weight = self.kernel().detach()
            for name in ("weight_g", "weight_v"):
                factor = getattr(self, name).detach()
                delattr(self, name)
                self.register_buffer(name, factor, persistent=False)
            self.weight = nn.Parameter(weight)

    def factors(self):
        """{"weight_g", "weight_v"} of a folded layer, so that it is saved as it was read (rounded
        once more, it would sound differently); {} if not folded, or changed since."""
        if not self.folded:
            return {}
        same = torch.allclose(_product(self.weight_g, self.weight_v), self.weight, 1e-6, 0)
        return {"weight_g": self.weight_g, "weight_v": self.weight_v} if same else {}

    def _rename(self, state, prefix, *_):
        """Give the weight that is about to be loaded the names that this layer has now."""
        weight, g, v = (prefix + name for name in ("weight", "weight_g", "weight_v"))
        for new, old in ((g, "original0"), (v, "original1")):
            old = f"{prefix}parametrizations.weight.{old}"
            if old in state:
                state[new] = state.pop(old)
        if weight in state:  # a product is its own direction, at its own length
            state[g] = _norm(state[weight])
            state[v] = state[weight]
        if self.folded and v in state:
            self.weight_g = state.pop(g)
            self.weight_v = state.pop(v)
            state.setdefault(weight, _product(self.weight_g, self.weight_v))
        else:
            state.pop(weight, None)


def _norm(weight):
    return weight.norm(dim=(1, 2), keepdim=True)


def _product(g, v):
    return v * (g / _norm(v))


class Snake(nn.Module):
    """x + sin^2(alpha x) / alpha, one alpha a channel (Ziyin et al. 2020)."""

    def __init__(self, channels):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        """x (B, C, T) -> (B, C, T): periodic, so that tones go on where the training stopped."""
        alpha = self.alpha[:, None].to(x.dtype)  # (C, 1)
        return torch.addcmul(x, torch.sin(alpha * x).square(), 1 / (alpha + 1e-9))


class ResBlock(nn.Module):
    """Residual pairs of convolutions, the first of each dilated, each behind a Snake."""

    def __init__(self, channels, kernel, dilations):
        super().__init__()
        sizes = (channels, channels, kernel)
        self.convs1 = nn.ModuleList(WeightNormConv(*sizes, dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(WeightNormConv(*sizes) for _ in dilations)
        self.activations1 = nn.ModuleList(Snake(channels) for _ in dilations)
        self.activations2 = nn.ModuleList(Snake(channels) for _ in dilations)

    def pairs(self):
        """(Snake, dilated convolution, Snake, convolution) of each residual."""
        return zip(self.activations1, self.convs1, self.activations2, self.convs2)

    def forward(self, x):
        """x (B, C, T) -> (B, C, T)."""
        for snake1, conv1, snake2, conv2 in self.pairs():
            x = x + conv2(snake2(conv1(snake1(x))))
        return x


class F0Predictor(nn.Module):
    """Mel (B, n_mels, T) -> pitch (B, T) in Hz, about 0 where unvoiced."""

    def __init__(self, in_channels, channels):
        super().__init__()
        layers = []
        for n_in in (in_channels, *[channels] * 4):
            layers += [WeightNormConv(n_in, channels, 3), nn.ELU()]
        self.condnet = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, 1)

    def forward(self, mel):
        return self.classifier(self.condnet(mel).transpose(1, 2)).squeeze(-1).abs()


@dataclass
class SourceState:
    """What the source must remember between two chunks.

    phase (H+1,) float64: cycles that each harmonic has gone; offset (H+1,): where it began, in
    radians, 0 for the fundamental; generator: of the noise (None: torch's own).
    """

    phase: torch.Tensor
    offset: torch.Tensor
    generator: torch.Generator | None = None

    def copy(self):
        """An independent state at the same place, for a continuation that may be withdrawn."""
        generator = self.generator and self.generator.clone_state()
        return SourceState(self.phase.clone(), self.offset.clone(), generator)


class HarmonicSource(nn.Module):
    """Sines at the multiples of f0, or noise, merged to one signal (NSF, Wang et al. 2019)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.l_linear = nn.Linear(config.nb_harmonics + 1, 1)

    def start(self, seed=None, offset=None):
        """A SourceState at sample 0; offset (H+1,) replaces the random starting phases."""
        n = self.config.nb_harmonics + 1
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        if offset is None:
            offset = (torch.rand(n, generator=generator) * 2 - 1) * pi
        offset = offset.flatten().clone()
        offset[0] = 0
        return SourceState(torch.zeros(n, dtype=torch.float64), offset, generator)

    def forward(self, f0, state=None, noise=None):
        """f0 (B, N) Hz per sample -> source (B, 1, N). noise (B, H+1, N) replaces the random one.

        state (B = 1) is moved to the end of these samples; None: phases start at random.
        """
        config = self.config
        sines = self._sines(f0, state)  # (B, H+1, N)
        if noise is None:
            # time first: N samples drawn in several chunks are then the same N numbers
            noise = torch.randn(sines.mT.shape, generator=state.generator if state else None)
            noise = noise.to(sines).mT
        voiced = (f0 > config.nsf_voiced_threshold).to(sines.dtype)[:, None]  # (B, 1, N)
        # a breath of noise beside a tone, and noise as loud as a third of a tone without one
        noise = noise * (voiced * config.nsf_sigma + (1 - voiced) * config.nsf_alpha / 3)
        merged = self.l_linear((sines * voiced * config.nsf_alpha + noise).mT)  # (B, N, 1)
        return torch.tanh(merged).mT

    def _sines(self, f0, state):
        """f0 (B, N) -> (B, H+1, N), the sine of each harmonic's phase."""
        harmonics = torch.arange(1, self.config.nb_harmonics + 2, device=f0.device)  # (H+1,)
        cycles = f0.detach().double()[:, None] * harmonics[:, None] / self.config.sampling_rate
        # summed in double precision: at float32 the ninth harmonic goes out of tune in a minute
        cycles = cycles.float().double().cumsum(-1)  # (B, H+1, N)
        if state is None:
            offset = torch.rand(len(f0), len(harmonics), 1, device=f0.device)
            offset = (offset * 2 - 1) * pi
            offset[:, 0] = 0
        else:
            cycles = cycles + state.phase[:, None].to(f0.device)
            state.phase = (cycles[0, :, -1] % 1).cpu()
            offset = state.offset[:, None].to(f0)
        return torch.sin(2 * pi * (cycles % 1).to(f0) + offset)


class HiFT(nn.Module):
    """The vocoder: `inference` from mel to wave, `decode` from mel and a given source.

    One mel frame gives `hop` samples: the upsampling rates times the hop of the inverse STFT.
    Parameter names are those of hift.pt; a `generator.` prefix is taken off when loading.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        rates = config.upsample_rates
        self.hop = prod(rates) * config.istft_hop
        base = config.base_channels
        spectrum = config.istft_n_fft + 2  # real and imaginary part of each frequency
        self.f0_predictor = F0Predictor(config.in_channels, config.f0_channels)
        self.m_source = HarmonicSource(config)
        self.conv_pre = WeightNormConv(config.in_channels, base, 7)
        self.ups = nn.ModuleList()
        self.source_downs = nn.ModuleList()
        self.source_resblocks = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        for i, (rate, kernel) in enumerate(zip(rates, config.upsample_kernel_sizes)):
            channels = base // 2 ** (i + 1)
            self.ups.append(WeightNormConv(2 * channels, channels, kernel, rate=rate))
            down = prod(rates[i + 1 :])  # from the rate of the source's STFT to this stage's
            shape = (2 * down, down, down // 2) if down > 1 else (1, 1, 0)
            self.source_downs.append(nn.Conv1d(spectrum, channels, *shape))
            size = config.source_resblock_kernel_sizes[i]
            dilations = config.source_resblock_dilation_sizes[i]
            self.source_resblocks.append(ResBlock(channels, size, dilations))
            kinds = zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes)
            self.resblocks.extend(ResBlock(channels, *kind) for kind in kinds)
        self.conv_post = WeightNormConv(channels, spectrum, 7)
        self.register_buffer("window", torch.hann_window(config.istft_n_fft), persistent=False)
        self._register_load_state_dict_pre_hook(_drop_generator_prefix)

    def source(self, f0, state=None, noise=None):
        """f0 (B, T) Hz per frame -> source signal (B, 1, T * hop)."""
        return self.m_source(f0.repeat_interleave(self.hop, dim=1), state, noise)

    def source_spectrum(self, source):
        """source (B, 1, N) -> real and imaginary STFT (B, n_fft + 2, N / istft_hop + 1)."""
        size, hop = self.config.istft_n_fft, self.config.istft_hop
        stft = torch.stft(source[:, 0], size, hop, window=self.window, return_complex=True)
        return torch.cat([stft.real, stft.imag], 1)

    def spectrum(self, mel, source):
        """mel (B, n_mels, T), source (B, 1, T * hop) -> magnitude before clipping, and phase in
        radians, (B, n_fft / 2 + 1, T * hop / istft_hop + 1) each."""
        kernels = len(self.config.resblock_kernel_sizes)
        stft = self.source_spectrum(source)
        x = self.conv_pre(mel)  # (B, base_channels, T)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, self.config.lrelu_slope))  # half the channels, rate times T
            if i == len(self.ups) - 1:
                x = F.pad(x, (1, 0), mode="reflect")  # an STFT has one frame more than hops
            # the source at the rate of this stage: the mel says how to colour it
            x = x + self.source_resblocks[i](self.source_downs[i](stft))
            # kernels of several lengths see the same, each its span of time
            first, *others = self.resblocks[i * kernels : (i + 1) * kernels]
            x = sum((block(x) for block in others), first(x)) / kernels
        x = self.conv_post(F.leaky_relu(x, FINAL_SLOPE)).float()
        log_magnitude, phase = x.chunk(2, 1)
        # far above the clip at 100, far below overflow, where the gradient would be NaN
        return log_magnitude.clamp(max=20).exp(), phase.sin()

    def wave(self, magnitude, phase):
        """The inverse STFT of what `spectrum` gives -> (B, T * hop), within +-audio_limit."""
        config = self.config
        spectrum = torch.polar(magnitude.clamp(max=MAX_MAGNITUDE), phase)
        wave = torch.istft(spectrum, config.istft_n_fft, config.istft_hop, window=self.window)
        return wave.clamp(-config.audio_limit, config.audio_limit)

    def decode(self, mel, source):
        """mel (B, n_mels, T) and source (B, 1, T * hop) -> wave (B, T * hop)."""
        return self.wave(*self.spectrum(mel, source))

    @torch.inference_mode()
    def inference(self, mel, state=None, noise=None):
        """mel (B, n_mels, T) -> wave (B, T * hop). A state (of m_source.start) is moved on."""
        return self.decode(mel, self.source(self.f0_predictor(mel), state, noise))

    def fold_weight_norm(self):
        """Fold every weight norm, in place: the same output, sooner. Returns self."""
        for module in self.modules():
            if isinstance(module, WeightNormConv):
                module.fold()
        return self


def _drop_generator_prefix(state, prefix, *_):
    for key in [key for key in state if key.startswith(prefix + "generator.")]:
        state[prefix + key.removeprefix(prefix + "generator.")] = state.pop(key)
