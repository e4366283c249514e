"""Linguistic tokenizer: what is said, 16.67 codes a second (AQAA paper 2.1).

Paraformer's streaming encoder (FunASR SANMEncoderChunkOpt), then the nearest of k-means' centroids.
The encoder works in chunks of 240 ms: four new rows, run together with the five rows before them,
which also look at the keys and values that the four chunks before have left in the same layer. So
a chunk needs nothing from the chunks beside it in its own layer, and all chunks of an utterance go
through a layer at once: training, offline encoding and live streaming are one `forward`.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from aqaa import audio
from aqaa.config import LinguisticConfig

STRIDE = 3840  # samples that bring four new rows: 240 ms
EPS = 1e-12  # of every layer norm


def row_count(n_samples):
    """How many codes a wave of `n_samples` gives; a tail below 55 ms gives none."""
    strides, rest = divmod(n_samples, STRIDE)
    if strides:  # the front end keeps 320 samples of the stride before: frames of 400 every 160
        frames = (rest - 80) // 160 + 1 if rest >= 80 else 0
        return 4 * strides + (math.ceil((frames - 2) / 6) if frames >= 6 else 0)
    frames = (rest - 400) // 160 + 1
    return math.ceil(frames / 6) if frames >= 4 else 0


def read_mvn(path):
    """(AddShift, Rescale), two tensors, of a Kaldi `am.mvn` file. ValueError if one is missing."""
    vectors = {}
    for tag, line in pairwise(Path(path).read_text(encoding="utf-8").splitlines()):
        if tag.startswith(("<AddShift>", "<Rescale>")) and line.startswith("<LearnRateCoef>"):
            vectors[tag.split(">")[0]] = torch.tensor([float(v) for v in line.split()[3:-1]])
    if len(vectors) != 2:
        missing = "<AddShift> and <Rescale> are missing"
        raise ValueError(f"{path} is no Kaldi normalisation file: {missing}.")
    return vectors["<AddShift"], vectors["<Rescale"]


class SANMAttention(nn.Module):
    """Self-attention plus FSMN memory, a depthwise convolution over the values of the chunk."""

    def __init__(self, config, in_size):
        super().__init__()
        size, kernel = config.output_size, config.kernel_size
        self.heads, self.look_back = config.attention_heads, config.look_back
        self.keep = config.chunk_rows
        self.linear_q_k_v = nn.Linear(in_size, 3 * size)
        self.linear_out = nn.Linear(size, size)
        self.fsmn_block = nn.Conv1d(size, size, kernel, groups=size, bias=False)
        self.pad = (kernel - 1) // 2, kernel // 2

    def forward(self, x, mask, valid, past):
        """x (B, C, R, in_size), mask (B, C, keys), valid (B, C, R, 1), past [keys, values].

        Returns (B, C, R, D) and the past of the next chunks; each past is (B, look_back, keep, D).
        """
        q, k, v = self.linear_q_k_v(x).chunk(3, -1)  # each (B, C, R, D)
        keys, past_keys = self._with_past(k, past[0])
        values, past_values = self._with_past(v, past[1])
        y = self.linear_out(self._attend(q, keys, values, mask))
        # The memory sees only this chunk, so rows beyond the end must be zero there.
        return y + self.memory(v * valid), [past_keys, past_values]

    def _with_past(self, rows, past):
        """(B, C, R, D), past -> (B, C, look_back * keep + R, D), every chunk's view; next past."""
        # A chunk leaves its first four rows behind; the other five are run again by the next one.
        left = torch.cat([past.to(rows), rows[:, :, : self.keep]], 1)  # (B, look_back + C, keep, D)
        chunks = rows.shape[1]
        views = [left[:, i : i + chunks] for i in range(self.look_back)]  # oldest first
        return torch.cat([*views, rows], 2), left[:, -self.look_back :]

    def _attend(self, q, keys, values, mask):
        """Plain products: for 9 queries and 25 keys, a fused kernel is far slower to train."""
        # Chunks do not see one another here: they become items of the batch.
        split = (y.flatten(0, 1).unflatten(-1, (self.heads, -1)) for y in (q, keys, values))
        q, keys, values = (y.transpose(1, 2) for y in split)  # (B C, heads, R or keys, d)
        bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -1e10)
        bias = bias.flatten(0, 1)[:, None, None]  # (B C, 1, 1, keys)
        scores = (q * q.shape[-1] ** -0.5) @ keys.transpose(-1, -2) + bias  # (B C, heads, R, keys)
        y = scores.softmax(-1).to(values.dtype) @ values
        return y.transpose(1, 2).flatten(2).unflatten(0, mask.shape[:2])  # (B, C, R, D)

    def memory(self, v):
        """(B, C, R, D) -> the same shape: each channel filtered along its chunk, plus v."""
        channels = v.flatten(0, 1).transpose(1, 2)  # (B C, D, R): conv1d runs over the last axis
        filtered = self.fsmn_block(F.pad(channels, self.pad))
        return filtered.transpose(1, 2).reshape(v.shape) + v


class EncoderLayer(nn.Module):
    """Pre-norm block; the first has no first residual, as its width changes (560 to D)."""

    def __init__(self, config, in_size):
        super().__init__()
        self.norm1 = nn.LayerNorm(in_size, EPS)
        self.self_attn = SANMAttention(config, in_size)
        self.norm2 = nn.LayerNorm(config.output_size, EPS)
        size, units = config.output_size, config.linear_units
        self.feed_forward = nn.Sequential(OrderedDict(
            w_1=nn.Linear(size, units), relu=nn.ReLU(inplace=True), w_2=nn.Linear(units, size),
        ))  # fmt: skip

    def forward(self, x, mask, valid, past):
        y, past = self.self_attn(self.norm1(x), mask, valid, past)
        x = x + y if x.shape == y.shape else y
        return x + self.feed_forward(self.norm2(x)), past


@dataclass
class EncoderPast:
    """The encoder's state between two calls."""

    n_rows: int  # rows done since the utterance began
    rows: torch.Tensor  # (B, 5, 560) the last ones, scaled and with their positions
    keys: list  # per layer [keys, values], each (B, look_back, 4, D)


class SANMEncoder(nn.Module):
    """Rows of 560 features to rows of `output_size`, chunk by chunk or all chunks together."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        sizes = [config.input_size] + [config.output_size] * (config.num_blocks - 1)
        first, *others = (EncoderLayer(config, size) for size in sizes)
        self.encoders0 = nn.ModuleList([first])  # in a list of its own, as in the published file
        self.encoders = nn.ModuleList(others)
        self.after_norm = nn.LayerNorm(config.output_size, EPS)

    def start(self, batch, device):
        """The past before the first chunk: zero rows, and keys that the mask will hide."""
        c = self.config
        rows = torch.zeros(batch, c.overlap_rows, c.input_size, device=device)
        empty = torch.zeros(batch, c.look_back, c.chunk_rows, c.output_size, device=device)
        return EncoderPast(0, rows, [[empty, empty]] * c.num_blocks)

    def forward(self, rows, lengths, past):
        """rows (B, T, 560), lengths (B,), past -> (B, T, output_size) and the next past.

        Only the last call of a stream may have a T that is no multiple of four; rows beyond a
        length change nothing before it.
        """
        c, (batch, n_rows, _) = self.config, rows.shape
        chunks = math.ceil(n_rows / c.chunk_rows)
        padded = chunks * c.chunk_rows
        present = torch.arange(padded, device=rows.device) < lengths[:, None]  # (B, 4 C)
        rows = F.pad(rows, (0, 0, 0, padded - n_rows)).masked_fill(~present[..., None], 0)
        rows = rows * c.output_size**0.5 + positions(past.n_rows, padded, c.input_size, rows.device)

        # Windows of nine rows, four apart: five that were there before, four new ones.
        stream = torch.cat([past.rows, rows], 1)  # (B, 5 + 4 C, 560)
        size = c.overlap_rows + c.chunk_rows
        x = stream.unfold(1, size, c.chunk_rows).transpose(2, 3)  # (B, C, 9, 560)

        # Zero rows before the first one count as present, as officially; absent chunks do not.
        valid = present.unflatten(1, (chunks, -1))
        valid = F.pad(valid, (c.overlap_rows, 0), value=True)  # (B, C, 9)
        # Of the keys that four earlier chunks would have left, those before the first do not exist.
        place = torch.arange(c.look_back + chunks - 1, device=rows.device).unfold(0, c.look_back, 1)
        behind = place >= c.look_back - past.n_rows // c.chunk_rows  # (C, look_back)
        behind = behind.repeat_interleave(c.chunk_rows, 1).expand(batch, -1, -1)
        mask = torch.cat([behind, valid], 2)  # (B, C, 25)

        keys = []
        for layer, layer_past in zip((*self.encoders0, *self.encoders), past.keys):
            x, layer_past = layer(x, mask, valid[..., None], layer_past)
            keys.append(layer_past)
        y = self.after_norm(x[:, :, c.overlap_rows :])  # the five rows before were context only
        y = y.flatten(1, 2)[:, :n_rows]  # (B, T, D)
        return y, EncoderPast(past.n_rows + n_rows, stream[:, -c.overlap_rows :], keys)


def positions(start, count, depth, device):
    """(count, depth): [sin | cos] of the positions start + 1, start + 2, ..."""
    half = depth // 2
    rates = torch.exp(torch.arange(half, device=device) * -(math.log(10000) / (half - 1)))
    angles = torch.arange(start + 1, start + count + 1, device=device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)


@dataclass
class LinguisticState:
    """A listening session; `push` returns a new one and leaves the old one as it was."""

    past: EncoderPast
    n_samples: int = 0  # pushed so far
    samples: torch.Tensor = field(default_factory=lambda: torch.zeros(0))  # not yet in a frame
    frames: torch.Tensor = None  # fbank frames that the next row still needs
    ended: bool = False


class LinguisticTokenizer(nn.Module):
    """Speech to linguistic codes. Parameter names are those of the published checkpoint."""

    def __init__(self, config=None):
        super().__init__()
        self.config = c = config or LinguisticConfig()
        self.encoder = SANMEncoder(c)
        self.register_buffer("centroids", torch.zeros(c.codebook_size, c.output_size))
        self.register_buffer("add_shift", torch.zeros(c.input_size))
        self.register_buffer("rescale", torch.ones(c.input_size))

    def features(self, wav):
        """(N,) samples at 16 kHz -> (T, 560): fbank, seven frames stacked every six, normalised."""
        return self._rows(self._frames(wav), row_count(len(wav)), -(self.config.lfr_m // 2))

    def _frames(self, wav):
        """(N,) -> (frames, 80): the official recipe takes samples as 16-bit integers are."""
        return audio.fbank(wav * 32768, self.config.n_mels, dither=self.config.dither)

    def _rows(self, frames, rows, start=0):
        """`rows` windows of the frames, the first at `start`; the ends repeat beyond either end."""
        c = self.config
        if rows == 0:
            return frames.new_zeros(0, c.input_size)
        place = torch.arange(rows, device=frames.device)[:, None] * c.lfr_n
        place = place + torch.arange(start, start + c.lfr_m, device=frames.device)  # (T, 7)
        stacked = frames[place.clamp(0, len(frames) - 1)].flatten(1)  # (T, 560)
        return (stacked + self.add_shift) * self.rescale

    def forward(self, rows, lengths=None):
        """(B, T, 560) features, lengths (B,) -> (B, T, output_size), differentiable.

        Padding beyond a length changes no valid row.
        """
        batch, n_rows, _ = rows.shape
        if n_rows == 0:
            return rows.new_zeros(batch, 0, self.config.output_size)
        lengths = torch.full((batch,), n_rows) if lengths is None else lengths
        past = self.encoder.start(batch, rows.device)
        return self.encoder(rows, lengths.to(rows.device), past)[0]

    def quantize(self, hidden):
        """(..., T, output_size) -> (..., T) codes: the nearest centroid."""
        flat = hidden.flatten(0, -2).float()
        return torch.cdist(flat, self.centroids.float()).argmin(-1).view(hidden.shape[:-1])

    @torch.no_grad()
    def encode(self, wav, energy_norm=True):
        """(N,) samples at 16 kHz -> (T,) int64 codes, one for every 60 ms; none below 55 ms."""
        return self.encode_batch([wav], energy_norm)[0]

    @torch.no_grad()
    def encode_batch(self, wavs, energy_norm=True):
        """A list of waves -> a list of codes, in one pass and equal to those of `encode`."""
        device = self.centroids.device
        rows = [self.features(wav) for wav in audio.levelled(wavs, energy_norm, device)]
        if not rows:
            return []
        lengths = torch.tensor([len(r) for r in rows])
        hidden = self(nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths)
        return [codes[:n] for codes, n in zip(self.quantize(hidden), lengths)]

    def start(self):
        """A new listening session."""
        device = self.centroids.device
        past = self.encoder.start(1, device)
        return LinguisticState(past, samples=torch.zeros(0, device=device))

    @torch.no_grad()
    def push(self, state, samples, final=False):
        """Take more samples (n,): (new codes, new state).

        Codes come every 240 ms; `final` gives the rest. However the packets are cut, the codes of a
        session are those of `encode(wav, energy_norm=False)`: the peak is not known yet.
        """
        hidden, state = self.push_hidden(state, samples, final)
        return self.quantize(hidden), state

    @torch.no_grad()
    def push_hidden(self, state, samples, final=False):
        """As `push`, before the centroids: ((T, output_size), state). ValueError after `final`."""
        if state.ended:
            raise ValueError("this session has had its final packet: begin another with start().")
        waiting = torch.cat([state.samples, torch.as_tensor(samples).to(state.samples)])
        n_samples = state.n_samples + len(samples)
        total = row_count(n_samples) if final else n_samples // STRIDE * 4
        rows = total - state.past.n_rows

        # A frame straddles two strides: as in the official session, only whole strides are framed.
        usable = len(waiting) if final else len(waiting) - n_samples % STRIDE
        frames = self._frames(waiting[:usable])  # (new frames, 80)
        waiting = waiting[len(frames) * 160 :]
        if state.frames is not None:
            frames = torch.cat([state.frames, frames])
        elif len(frames):  # the first row is centred on the first frame, which repeats before it
            frames = torch.cat([frames[:1].expand(self.config.lfr_m // 2, -1), frames])

        past, hidden = state.past, frames.new_zeros(1, 0, self.config.output_size)
        if rows > 0:
            features = self._rows(frames, rows)[None]  # (1, rows, 560)
            lengths = torch.tensor([rows], device=frames.device)
            hidden, past = self.encoder(features, lengths, past)
        kept = frames[rows * self.config.lfr_n :] if len(frames) else state.frames
        return hidden[0], LinguisticState(past, n_samples, waiting, kept, final)
