"""Semantic tokenizer: how it is said, 25 codes a second (AQAA paper 2.1, CosyVoice 1.0).

S3 tokenizer v1: log-mel, two convolutions that each halve the rate, a transformer that sees the
whole piece, and the nearest codebook entry on the unit sphere.
"""

import torch
import torch.nn.functional as F
from torch import nn

from aqaa import audio
from aqaa.config import SAMPLE_RATE, SemanticConfig

PIECE = 30 * SAMPLE_RATE  # samples encoded together; longer waves are cut, without overlap
SHORTEST = 480  # a piece below it is dropped
FRAME = 640  # samples a code


class MultiHeadAttention(nn.Module):
    def __init__(self, size, heads):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size, bias=False)  # a bias would add the same score to every key
        self.value = nn.Linear(size, size)
        self.out = nn.Linear(size, size)

    def forward(self, x, mask):
        """x (B, T, D), mask None or (B, 1, 1, T), true where a key is real -> (B, T, D)."""
        split = (y(x).unflatten(-1, (self.heads, -1)) for y in (self.query, self.key, self.value))
        q, k, v = (y.transpose(1, 2) for y in split)  # (B, heads, T, d)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block with a fourfold GELU layer."""

    def __init__(self, size, heads):
        super().__init__()
        self.attn = MultiHeadAttention(size, heads)
        self.attn_ln = nn.LayerNorm(size)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))
        self.mlp_ln = nn.LayerNorm(size)

    def forward(self, x, mask):
        x = x + self.attn(self.attn_ln(x), mask)
        return x + self.mlp(self.mlp_ln(x))


class AudioEncoder(nn.Module):
    """Log-mel (B, n_mels, T) to hidden rows (B, ceil(T / 4), n_audio_state)."""

    def __init__(self, config):
        super().__init__()
        size, heads = config.n_audio_state, config.n_audio_head
        self.conv1 = nn.Conv1d(config.n_mels, size, 3, stride=2, padding=1)
        self.conv2 = nn.Conv1d(size, size, 3, stride=2, padding=1)
        self.register_buffer("positional_embedding", sinusoids(config.n_audio_ctx, size))
        blocks = (ResidualAttentionBlock(size, heads) for _ in range(config.n_audio_layer))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x, lengths=None):
        """x (B, n_mels, T), lengths (B,) or None -> rows and their number, lengths or None."""
        for conv in (self.conv1, self.conv2):
            if lengths is not None:
                # The kernel of three reaches beyond an item's end: padding would leak into its
                # last row, so it becomes zero, like the convolution's own padding.
                x = x.masked_fill(~_present(lengths, x.shape[-1])[:, None], 0)
                lengths = (lengths + 1) // 2
            x = F.gelu(conv(x))  # 100 -> 50 -> 25 rows a second
        x = x.transpose(1, 2)  # (B, T / 4, D)
        rows, limit = x.shape[1], len(self.positional_embedding)
        if rows > limit:
            fault = f"{rows} rows are more than the {limit} positions of this tokenizer"
            raise ValueError(f"{fault}: cut the wave.")
        x = x + self.positional_embedding[:rows]
        # Every row attends to all rows of its item, later ones too: this encoder is not causal.
        mask = None if lengths is None else _present(lengths, rows)[:, None, None]
        for block in self.blocks:
            x = block(x, mask)
        return x, lengths


def _present(lengths, size):
    return torch.arange(size, device=lengths.device) < lengths[:, None]  # (B, size)


def sinusoids(length, channels, longest=10000.0):
    """(length, channels): [sin | cos] table of Whisper."""
    half = channels // 2
    rates = torch.exp(-torch.arange(half) * (torch.tensor(longest).log() / (half - 1)))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


@audio.full_precision
def distances(hidden, embed):
    """(..., D), (K, D) -> (..., K): squared distance of the unit rows to every entry."""
    x, embed = F.normalize(hidden.float(), dim=-1), embed.float()
    lengths = torch.linalg.vector_norm(embed, dim=-1).square()  # in one pass over the codebook
    # |x - e|^2 written out: one matrix product instead of a difference for every pair.
    return x.square().sum(-1, keepdim=True) - 2 * x @ embed.T + lengths


class SemanticTokenizer(nn.Module):
    """Speech to semantic codes, with the parameter names of `speech_tokenizer_v1_25hz`."""

    def __init__(self, config=None):
        super().__init__()
        self.config = c = config or SemanticConfig()
        self.encoder = AudioEncoder(c)
        entries = torch.zeros(c.n_codebook_size, c.n_audio_state)  # that unit vectors are next to
        self.quantizer = nn.Module()
        self.quantizer._codebook = nn.Module()  # a name of the published file
        self.quantizer._codebook.register_buffer("embed", entries)

    @classmethod
    def from_onnx(cls, path, n_audio_head=None):
        """The tokenizer in a released `speech_tokenizer_v1.onnx`; errors: see s3_onnx.read."""
        from aqaa.tokenizers.s3_onnx import read

        config, state = read(path, n_audio_head)
        model = cls(config)
        model.load_state_dict(state)
        return model.eval()

    def hidden(self, logmel, lengths=None):
        """(B, n_mels, T) log-mels, lengths (B,) in frames -> (B, ceil(T / 4), D), row counts (B,).

        Padding beyond a length changes no valid row. ValueError for more rows than positions.
        """
        if lengths is not None:
            return self.encoder(logmel, torch.as_tensor(lengths, device=logmel.device))
        hidden, _ = self.encoder(logmel)
        return hidden, torch.full((len(hidden),), hidden.shape[1], device=hidden.device)

    def quantize(self, hidden):
        """(..., D) -> (...) int64 codes."""
        return distances(hidden, self.quantizer._codebook.embed).argmin(-1)

    def features(self, wav):
        """(N,) samples at 16 kHz, N > 200 -> (n_mels, N // 160)."""
        return audio.log_mel(wav, self.config.n_mels)

    @torch.no_grad()
    def encode(self, wav, energy_norm=True):
        """(N,) samples at 16 kHz -> codes, one for every 40 ms (rounded up) of each 30 s piece."""
        return self.encode_batch([wav], energy_norm)[0]

    @torch.no_grad()
    def encode_batch(self, wavs, energy_norm=True):
        """A list of waves -> a list of int64 codes, in one pass and equal to those of `encode`."""
        device = self.encoder.conv1.weight.device
        size = min(PIECE, FRAME * self.config.n_audio_ctx)
        mels, owners = [], []  # a piece's wave
        for owner, wav in enumerate(audio.levelled(wavs, energy_norm, device)):
            # Before padding: the loudest bin of a piece sets the floor of its log-mel.
            mels += [self.features(part) for part in wav.split(size) if len(part) >= SHORTEST]
            owners += [owner] * (len(mels) - len(owners))
        codes = [torch.zeros(0, dtype=torch.long, device=device)] * len(wavs)
        if not mels:
            return codes
        lengths = torch.tensor([m.shape[1] for m in mels], device=device)
        batch = nn.utils.rnn.pad_sequence([m.T for m in mels], batch_first=True).transpose(1, 2)
        hidden, rows = self.hidden(batch, lengths if len(mels) > 1 else None)
        for owner, piece, n in zip(owners, self.quantize(hidden), rows.tolist()):
            codes[owner] = torch.cat([codes[owner], piece[:n]])
        return codes
