"""Linguistic tokenizer: what is said, 16.67 codes a second (AQAA paper 2.1; FunASR SANMEncoderChunkOpt, then k-means).

The published encoder works in chunks of 240 ms: four new rows, run together with the five rows before them, which may
look at the keys and values that the four chunks before have left in the same layer. That last fact lets all chunks of
an utterance go through a layer at once: `SANMEncoder.forward` takes any number of chunks and what came before
them, so training, offline encoding and live streaming are one computation.
"""

import math
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
    q, r = divmod(n_samples, STRIDE)
    if q:
        frames = (r - 80) // 160 + 1 if r >= 80 else 0
        return 4 * q + (math.ceil((frames - 2) / 6) if frames >= 6 else 0)
    frames = (r - 400) // 160 + 1
    return math.ceil(frames / 6) if frames >= 4 else 0


def read_mvn(path):
    """(AddShift, Rescale), two tensors, of a Kaldi `am.mvn` text file. Raises ValueError when they are not in it."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    found = {}
    for tag, line in pairwise(lines):
        if tag.startswith(("<AddShift>", "<Rescale>")) and line.startswith("<LearnRateCoef>"):
            found[tag.split(">")[0] + ">"] = torch.tensor([float(v) for v in line.split()[3:-1]])
    if len(found) != 2:
        raise ValueError(f"{path} is no Kaldi normalisation file: <AddShift> and <Rescale> are missing.")
    return found["<AddShift>"], found["<Rescale>"]


class SANMAttention(nn.Module):
    """Self-attention plus FSMN memory, a depthwise convolution over the values of the chunk itself."""

    def __init__(self, config, in_size):
        super().__init__()
        size = config.output_size
        self.heads, self.look_back, self.keep = config.attention_heads, config.look_back, config.chunk_rows
        self.linear_q_k_v = nn.Linear(in_size, 3 * size)
        self.linear_out = nn.Linear(size, size)
        self.fsmn_block = nn.Conv1d(size, size, config.kernel_size, groups=size, bias=False)
        self.pad = (config.kernel_size - 1) // 2, config.kernel_size // 2

    def forward(self, x, mask, valid, past):
        """x (B, C, R, in_size), mask (B, C, keys), valid (B, C, R, 1), past two (B, look_back, keep, D).

        Returns (B, C, R, D) and the past for the chunks to come.
        """
        q, k, v = self.linear_q_k_v(x).chunk(3, -1)  # (B, C, R, D)
        kept = [torch.cat([p.to(t), t[:, :, : self.keep]], 1) for p, t in zip(past, (k, v))]
        keys, values = (torch.cat([*self._windows(kept_t), t], 2) for kept_t, t in zip(kept, (k, v)))
        y = self._attend(q, keys, values, mask)
        return self.linear_out(y) + self._memory(v * valid), [t[:, -self.look_back :] for t in kept]

    def _attend(self, q, keys, values, mask):
        """Plain products: with 9 queries and 25 keys a fused kernel has nothing to gain (it is far slower to train)."""
        q, keys, values = (t.flatten(0, 1).unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, keys, values))
        bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -1e10).flatten(0, 1)[:, None, None]
        score = (q * q.shape[-1] ** -0.5) @ keys.transpose(-1, -2) + bias  # (B C, heads, R, keys)
        y = score.softmax(-1).to(values.dtype) @ values
        return y.transpose(1, 2).flatten(2).unflatten(0, mask.shape[:2])

    def _windows(self, kept):
        """(B, look_back + C, keep, D) -> look_back views (B, C, keep, D): what each chunk looks back at."""
        chunks = kept.shape[1] - self.look_back
        return [kept[:, i : i + chunks] for i in range(self.look_back)]

    def _memory(self, v):
        """Depthwise convolution over the rows of a chunk, plus the rows themselves.

        Written as one small product per channel: the gradient of a depthwise conv1d over thousands of nine-row
        signals costs more than the rest of the layer.
        """
        rows = v.shape[2]
        taps = F.pad(self.fsmn_block.weight[:, 0], (rows, rows))  # (D, kernel + 2 R)
        place = torch.arange(rows, device=v.device)
        toeplitz = taps[:, place[:, None] - place + self.pad[0] + rows]  # (D, R in, R out)
        rows_first = v.flatten(0, 1).permute(2, 0, 1).contiguous()  # (D, B C, R); only then the products are one call
        y = rows_first @ toeplitz.to(v.dtype)
        return y.permute(1, 2, 0).view_as(v) + v


class FeedForward(nn.Module):
    def __init__(self, size, units):
        super().__init__()
        self.w_1 = nn.Linear(size, units)
        self.w_2 = nn.Linear(units, size)

    def forward(self, x):
        return self.w_2(F.relu(self.w_1(x), inplace=True))


class EncoderLayer(nn.Module):
    """Pre-norm block; without the first residual where the width changes (560 to output_size)."""

    def __init__(self, config, in_size):
        super().__init__()
        self.norm1 = nn.LayerNorm(in_size, EPS)
        self.self_attn = SANMAttention(config, in_size)
        self.norm2 = nn.LayerNorm(config.output_size, EPS)
        self.feed_forward = FeedForward(config.output_size, config.linear_units)

    def forward(self, x, mask, valid, past):
        y, past = self.self_attn(self.norm1(x), mask, valid, past)
        x = x + y if x.shape == y.shape else y
        return x + self.feed_forward(self.norm2(x)), past


class SANMEncoder(nn.Module):
    """Rows of 560 features to rows of `output_size`, chunk by chunk or all chunks together (SPEECH k4)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoders0 = nn.ModuleList([EncoderLayer(config, config.input_size)])
        self.encoders = nn.ModuleList(EncoderLayer(config, config.output_size) for _ in range(config.num_blocks - 1))
        self.after_norm = nn.LayerNorm(config.output_size, EPS)

    def start(self, batch, device):
        """The past before the first chunk: zero rows, and no keys (their number is in the mask)."""
        c = self.config
        rows = torch.zeros(batch, c.overlap_rows, c.input_size, device=device)
        empty = torch.zeros(batch, c.look_back, c.chunk_rows, c.output_size, device=device)
        return EncoderPast(0, rows, [[empty, empty]] * c.num_blocks)

    def forward(self, rows, lengths, past):
        """rows (B, T, 560), lengths (B,), past -> (B, T, output_size) and the next past.

        T need not be a multiple of four in the last call; rows beyond a length change nothing before it.
        """
        c, (batch, n_rows, _) = self.config, rows.shape
        chunks = math.ceil(n_rows / c.chunk_rows)
        present = torch.arange(chunks * c.chunk_rows, device=rows.device) < lengths[:, None]  # (B, 4 C)
        rows = F.pad(rows, (0, 0, 0, chunks * c.chunk_rows - n_rows)).masked_fill(~present[..., None], 0)
        rows = rows * c.output_size**0.5 + positions(past.n_rows, rows.shape[1], c.input_size, rows.device)
        stream = torch.cat([past.rows, rows], 1)
        size = c.overlap_rows + c.chunk_rows
        x = stream.unfold(1, size, c.chunk_rows).transpose(2, 3)  # (B, C, 9, 560)
        valid = F.pad(present.unflatten(1, (chunks, -1)), (c.overlap_rows, 0), value=True)  # (B, C, 9)
        behind = torch.arange(chunks, device=rows.device)[:, None] + torch.arange(c.look_back, device=rows.device)
        behind = (behind >= c.look_back - past.n_rows // c.chunk_rows).repeat_interleave(c.chunk_rows, 1)
        mask = torch.cat([behind.expand(batch, -1, -1), valid], 2)  # (B, C, 25)
        keys = []
        for layer, layer_past in zip((*self.encoders0, *self.encoders), past.keys):
            x, layer_past = layer(x, mask, valid[..., None], layer_past)
            keys.append(layer_past)
        y = self.after_norm(x[:, :, c.overlap_rows :]).flatten(1, 2)[:, :n_rows]
        return y, EncoderPast(past.n_rows + n_rows, stream[:, -c.overlap_rows :], keys)


@dataclass
class EncoderPast:
    """What an encoder remembers between two calls."""

    n_rows: int  # rows done since the utterance began
    rows: torch.Tensor  # (B, 5, 560) the last ones, scaled and with their positions
    keys: list  # per layer [keys, values], each (B, look_back, 4, D)


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
    n_samples: int = 0  # heard so far
    samples: torch.Tensor = field(default_factory=lambda: torch.zeros(0))  # not yet turned into fbank frames
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
        """(N,) samples at 16 kHz -> (T, 560): fbank, seven frames stacked every six, normalised (CMVN)."""
        rows = row_count(wav.shape[-1])
        return self._rows(self._frames(wav), rows, -(self.config.lfr_m // 2))

    def _frames(self, wav):
        return audio.fbank(wav * 32768, self.config.n_mels, dither=self.config.dither)

    def _rows(self, frames, rows, start=0):
        """`rows` windows of the frames, the first at `start`; beyond either end the frame at that end repeats."""
        c = self.config
        if rows == 0:
            return frames.new_zeros(0, c.input_size)
        place = torch.arange(rows, device=frames.device)[:, None] * c.lfr_n
        place = place + torch.arange(start, start + c.lfr_m, device=frames.device)
        stacked = frames[place.clamp(0, len(frames) - 1)].flatten(1)  # (T, 560)
        return (stacked + self.add_shift) * self.rescale

    def forward(self, rows, lengths=None):
        """(B, T, 560) features, lengths (B,) -> (B, T, output_size); differentiable, padding changes no valid row."""
        if lengths is None:
            lengths = torch.full((rows.shape[0],), rows.shape[1], device=rows.device)
        if rows.shape[1] == 0:
            return rows.new_zeros(rows.shape[0], 0, self.config.output_size)
        return self.encoder(rows, lengths.to(rows.device), self.encoder.start(rows.shape[0], rows.device))[0]

    def quantize(self, hidden):
        """(..., T, output_size) -> (..., T) codes: the nearest centroid."""
        flat = hidden.reshape(-1, hidden.shape[-1]).float()
        return torch.cdist(flat, self.centroids.float()).argmin(-1).reshape(hidden.shape[:-1])

    @torch.no_grad()
    def encode(self, wav, energy_norm=True):
        """(N,) samples at 16 kHz -> (T,) int64 codes, one for every 60 ms; none below 55 ms."""
        return self.encode_batch([wav], energy_norm)[0]

    @torch.no_grad()
    def encode_batch(self, wavs, energy_norm=True):
        """A list of waves -> a list of codes, in one pass and equal to those of `encode`."""
        wavs = [torch.as_tensor(w, dtype=torch.float32, device=self.centroids.device) for w in wavs]
        rows = [self.features(audio.energy_norm(w) if energy_norm and len(w) else w) for w in wavs]
        if not rows:
            return []
        lengths = torch.tensor([len(r) for r in rows])
        codes = self.quantize(self(nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths))
        return [c[:n] for c, n in zip(codes, lengths)]

    # ---- live ----

    def start(self):
        """A new listening session."""
        device = self.centroids.device
        return LinguisticState(self.encoder.start(1, device), samples=torch.zeros(0, device=device))

    @torch.no_grad()
    def push(self, state, samples, final=False):
        """Hear more samples (n,): (new codes, new state).

        Codes come every 240 ms; `final` gives the rest. Whatever the packets, the codes of a session are those of
        `encode(wav, energy_norm=False)`: loudness is not evened out, as the peak is not known yet.
        """
        hidden, state = self.push_hidden(state, samples, final)
        return self.quantize(hidden), state

    @torch.no_grad()
    def push_hidden(self, state, samples, final=False):
        """As `push`, before the centroids: ((T, output_size), state). Raises ValueError after the final packet."""
        if state.ended:
            raise ValueError("this session has had its final packet: begin another with start().")
        heard = torch.cat([state.samples, torch.as_tensor(samples).to(state.samples)])
        n_samples = state.n_samples + len(samples)
        rows = (row_count(n_samples) if final else n_samples // STRIDE * 4) - state.past.n_rows
        # A frame straddles two strides: only whole strides are turned into frames, as the official session does.
        usable = len(heard) if final else len(heard) - n_samples % STRIDE
        fresh = self._frames(heard[:usable])
        heard = heard[len(fresh) * 160 :]
        frames = fresh if state.frames is None else torch.cat([state.frames, fresh])
        if state.frames is None and len(fresh):
            frames = torch.cat([fresh[:1].expand(self.config.lfr_m // 2, -1), fresh])
        past, hidden = state.past, frames.new_zeros(0, self.config.output_size)
        if rows > 0:
            features = self._rows(frames, rows)[None]
            hidden, past = self.encoder(features, torch.tensor([rows], device=frames.device), past)
            hidden = hidden[0]
        kept = frames[rows * self.config.lfr_n :] if len(frames) else state.frames
        return hidden, LinguisticState(past, n_samples, heard, kept, final)
