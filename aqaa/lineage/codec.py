"""A residual codec of speech: VALL-E's EnCodec at mini size (2301.02111, section 3).

STACK frames of the vocoder's log-mel, 40 ms, are one vector. Each level of the quantiser has a
codebook by k-means of what the levels before it left over, so the sum of one centroid a level comes
closer with each of them: 25 x LEVELS codes a second. HiFT makes a wave of the decoded mel. Shapes:
N vectors of D = STACK * n_mels values, L levels of K centroids."""

import torch
from torch import nn

from aqaa import audio

STACK = 4  # mel frames, 10 ms each, in a vector
RATE = 25  # vectors a second
LEVELS, SIZE = 4, 512
FLOOR = -8.0  # of the log-mel: 65 dB below full scale nobody hears anything


class ResidualCodec(nn.Module):
    """mel: MelConfig. `centroids` (L, K, D) and `counts` (L, K), how often each was the nearest of
    late, are learnt by `learn`."""

    def __init__(self, mel, levels=LEVELS, size=SIZE):
        super().__init__()
        self.config = mel
        self.register_buffer("centroids", torch.zeros(levels, size, STACK * mel.num_mels))
        self.register_buffer("counts", torch.zeros(levels, size))

    def clip(self, wav):
        """(n,) samples at 16 kHz, not silent -> the part that is no silence, at full level."""
        return audio.trim_silence(audio.energy_norm(torch.as_tensor(wav, dtype=torch.float32)))

    def read(self, wav):
        """(n,) samples at 16 kHz -> vectors (N, D) of their `clip`."""
        return self.stacked(audio.mel(self.clip(wav), self.config))

    def stacked(self, mel):
        """Log-mel (…, n_mels, T) -> vectors (…, T // STACK, D)."""
        whole = mel[..., : mel.shape[-1] // STACK * STACK].clamp(min=FLOOR)
        return whole.unflatten(-1, (-1, STACK)).movedim(-2, -3).flatten(-2)

    def mel(self, vectors):
        """Vectors (…, N, D) -> log-mel (…, n_mels, N * STACK)."""
        return vectors.unflatten(-1, (-1, STACK)).movedim(-3, -2).flatten(-2)

    def encode(self, vectors):
        """Vectors (…, D) -> codes (…, L)."""
        codes, rest = [], vectors
        for table in self.centroids:
            codes.append(nearest(rest, table))
            rest = rest - table[codes[-1]]
        return torch.stack(codes, -1)

    def decode(self, codes):
        """Codes (…, L') of the first L' levels -> vectors (…, D)."""
        return sum(self.centroids[level][one] for level, one in enumerate(codes.unbind(-1)))

    @property
    def size(self):
        return self.centroids.shape[1]

    @property
    def levels(self):
        return len(self.centroids)

    @torch.no_grad()
    def learn(self, vectors, decay=0.98):
        """A step of k-means on a batch of vectors (N, D); returns the mean error (L,) that is left
        behind each level. A centroid is the mean of what was nearest to it, the newest batch
        counting 1 - decay; one that hardly serves begins anew at what some vector left over."""
        rest, errors = vectors, []
        for table, counts in zip(self.centroids, self.counts, strict=True):
            idle = counts < 0.1 * counts.mean() if counts.any() else counts == 0
            table[idle] = rest[torch.randint(len(rest), (int(idle.sum()),))]
            counts[idle] = max(float(counts.mean()), 1.0)
            codes = nearest(rest, table)
            new = torch.bincount(codes, minlength=len(table)).to(table)
            sums = torch.zeros_like(table).index_add_(0, codes, rest)
            held = decay * counts
            table.copy_((held[:, None] * table + (1 - decay) * sums)
                        / (held + (1 - decay) * new)[:, None])  # fmt: skip
            counts.copy_(held + (1 - decay) * new)
            rest = rest - table[codes]
            errors.append(rest.abs().mean())
        return torch.stack(errors)


def nearest(vectors, table):
    """Index (…,) of the row of `table` (K, D) that is nearest to each of vectors (…, D)."""
    # |x - c|² without |x|², which is the same for all
    return (table.square().sum(1) - 2 * vectors @ table.T).argmin(-1)
