"""Audio ids to mel by conditional flow matching (AQAA paper 2.3; CosyVoice 1.0 section 2.3, MaskedDiffWithXvec).

Ids are embedded, read by a conformer, stretched to mel frames (mu), and a U-Net carries noise to speech along mu in a
few Euler steps. A prompt (ids and their mel) is continued, which is also how chunks of one answer are joined.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from aqaa.vocoder.conformer import ConformerEncoder
from aqaa.vocoder.unet import MaskedGroupNorm, UNet, masked


class InterpolateRegulator(nn.Module):
    """Stretches token features to mel frames by linear interpolation, then smooths them with convolutions."""

    def __init__(self, channels, layers=4):
        super().__init__()
        stack = []
        for _ in range(layers):
            stack += [nn.Conv1d(channels, channels, 3, padding=1), MaskedGroupNorm(1, channels), nn.Mish()]
        self.model = nn.Sequential(*stack, nn.Conv1d(channels, channels, 1))

    def forward(self, parts, lengths, mask=None):
        """parts: (B, N_i, C) features side by side; lengths: the frames of each -> (B, C, sum of lengths).

        Each part is interpolated by itself; the convolutions run across the seams. A part may be empty.
        """
        return self.smooth(torch.cat([stretch(x, n) for x, n in zip(parts, lengths)], -1), mask)

    def smooth(self, x, mask=None):
        """x (B, C, T), mask (B, 1, T) or None."""
        x = masked(x, mask)
        for layer in self.model:
            x = layer(x, mask) if isinstance(layer, MaskedGroupNorm) else layer(x)
            x = masked(x, mask)
        return x


def stretch(x, frames):
    """(B, N, C) -> (B, C, frames); an empty part stays empty."""
    x = x.transpose(1, 2)
    return F.interpolate(x, size=frames, mode="linear") if x.shape[-1] and frames else x[..., :0]


class ConditionalCFM(nn.Module):
    """Optimal-transport conditional flow matching (Lipman et al. 2023): straight paths from noise to mel."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        n = config.output_size
        self.estimator = UNet(4 * n, n, config.channels, config.n_blocks, config.num_mid_blocks, config.num_heads,
                              config.attention_head_dim)

    def time_steps(self, n, like):
        """0 = t_0 < ... < t_n = 1, denser at the start; evaluated in the dtype of `like`, as published."""
        t = torch.linspace(0, 1, n + 1, dtype=like.dtype, device=like.device)
        return 1 - torch.cos(t * 0.5 * torch.pi)

    def velocity(self, x, mask, mu, t, speaker, cond, rate):
        """dx/dt at t (a scalar tensor), guided away from the unconditional field by `rate`."""
        if rate:
            zero = torch.zeros_like
            x, mu = x.repeat(2, 1, 1), torch.cat([mu, zero(mu)])
            speaker, cond = torch.cat([speaker, zero(speaker)]), torch.cat([cond, zero(cond)])
            mask = None if mask is None else mask.repeat(2, 1, 1)
        v = self.estimator(x, mask, mu, t.expand(len(x)), speaker, cond)
        if rate:
            conditional, free = v.chunk(2)
            v = (1 + rate) * conditional - rate * free
        return v

    def forward(self, noise, mask, mu, speaker, cond, n_timesteps, rate):
        """Euler from noise (B, n_mels, T) at t = 0 to the mel at t = 1."""
        steps = self.time_steps(n_timesteps, mu)
        x = noise
        for t, after in pairwise(steps):
            x = x + (after - t) * self.velocity(x, mask, mu, t, speaker, cond, rate)
        return x

    def compute_loss(self, x1, mask, mu, speaker, cond):
        """Mean square error of the velocity at random times; conditions dropped with training_cfg_rate. Scalar."""
        config, b = self.config, len(x1)
        t = 1 - torch.cos(torch.rand(b, 1, 1, device=x1.device) * 0.5 * torch.pi)
        noise = torch.randn_like(x1)
        path = (1 - (1 - config.sigma_min) * t) * noise + t * x1
        keep = (torch.rand(b, 1, 1, device=x1.device) >= config.training_cfg_rate).to(x1.dtype)
        v = self.estimator(path, mask, mu * keep, t.flatten(), speaker * keep[..., 0], cond * keep)
        return _mean((v.float() - (x1 - (1 - config.sigma_min) * noise)).square(), mask)


class Flow(nn.Module):
    """Audio ids (0-based, linguistic below semantic, interleaved 2:3) to log-mel frames.

    config: FlowConfig; mel: MelConfig, for the frame rate. Parameter names are those of the published flow.pt.
    """

    MAX_PREFIX = 0.7  # of an utterance, given as prompt in training

    def __init__(self, config, mel):
        super().__init__()
        self.config = config
        self.frames_per_token = mel.sampling_rate / mel.hop_size / config.input_frame_rate
        n = config.output_size
        self.input_embedding = nn.Embedding(config.vocab_size, config.input_size)
        self.spk_embed_affine_layer = nn.Linear(config.spk_embed_dim, n)
        self.encoder = ConformerEncoder(config.input_size, config.encoder_size, config.encoder_heads,
                                        config.encoder_units, config.encoder_blocks)
        self.encoder_proj = nn.Linear(config.encoder_size, n)
        self.length_regulator = InterpolateRegulator(n)
        self.decoder = ConditionalCFM(config)

    def frames(self, n_tokens):
        """Whole mel frames in the time of n tokens. Take differences of it, or chunks drift from the whole."""
        return int(n_tokens * self.frames_per_token + 1e-6)

    def encode(self, token, token_len=None):
        """token (B, N) -> features (B, N, n_mels) before stretching. Negative ids count as 0, as published.

        Raises ValueError for an id the embedding does not have.
        """
        if token.numel() and int(token.max()) >= self.config.vocab_size:
            raise ValueError(f"audio id {int(token.max())} is outside the flow's vocabulary of "
                             f"{self.config.vocab_size}: do tokens and vocoder belong together?")
        if token.shape[1] == 0:
            return self.encoder_proj.weight.new_zeros(len(token), 0, self.config.output_size)
        x = self.input_embedding(token.clamp(min=0))
        valid = None if token_len is None else _valid(token_len, token.shape[1])
        return self.encoder_proj(self.encoder(x, valid))

    def speaker(self, embedding, batch):
        """Raw speaker vectors (B, spk_embed_dim) -> (B, n_mels); None means the zero vector (one-voice models)."""
        weight = self.spk_embed_affine_layer.weight
        if embedding is None:
            embedding = weight.new_zeros(batch, self.config.spk_embed_dim)
        return self.spk_embed_affine_layer(F.normalize(embedding.to(weight), dim=1))

    @torch.inference_mode()
    def inference(self, token, token_len=None, *, prompt_token=None, prompt_feat=None, embedding=None, noise=None,
                  n_timesteps=None, temperature=None, cfg_rate=None, first=0):
        """token (B, N) -> log-mel (B, n_mels, T), T = frames(N); rows end at frames(token_len), zeros follow.

        prompt_token (B, P) and prompt_feat (B, T_p, n_mels), its log-mel, are continued and not returned.
        embedding (B, spk_embed_dim). noise (B, n_mels, T_p + T) standard normal. The rest defaults to the config.
        first: tokens of the utterance before `token`, so that the frames of chunks add up to those of the whole.
        """
        config, weight = self.config, self.encoder_proj.weight
        b, n = token.shape
        frames = self.frames(first + n) - self.frames(first)
        if prompt_token is None:
            prompt_token, prompt_feat = token[:, :0], weight.new_zeros(b, 0, config.output_size)
        prompt = self.normalise(prompt_feat.to(weight)).transpose(1, 2)  # (B, n_mels, T_p)
        p, t_p = prompt_token.shape[1], prompt.shape[2]
        mask = None
        if token_len is None or bool((token_len == n).all()):
            hidden = self.encode(torch.cat([prompt_token, token], 1))
            mu = self.length_regulator((hidden[:, :p], hidden[:, p:]), (t_p, frames))
        else:
            hidden = self.encode(torch.cat([prompt_token, token], 1), token_len + p)
            ends = torch.tensor([self.frames(first + int(k)) - self.frames(first) for k in token_len])
            mask = _valid(ends + t_p, t_p + frames)[:, None].to(weight)
            rows = [torch.cat([stretch(h[None, :p], t_p), stretch(h[None, p : p + k], e)], -1)
                    for h, k, e in zip(hidden, token_len.tolist(), ends.tolist())]
            mu = self.length_regulator.smooth(_stack(rows, t_p + frames), mask)
        if noise is None:
            noise = torch.randn_like(mu)
        cond = F.pad(prompt, (0, frames))
        noise = noise.to(mu) * (config.temperature if temperature is None else temperature)
        rate = config.inference_cfg_rate if cfg_rate is None else cfg_rate
        steps = n_timesteps or config.n_timesteps
        x = self.decoder(noise, mask, mu, self.speaker(embedding, b), cond, steps, rate)
        return masked(x[..., t_p:] * config.mel_std + config.mel_mean, None if mask is None else mask[..., t_p:])

    def normalise(self, mel):
        """Log-mel to the scale the flow works in."""
        return (mel - self.config.mel_mean) / self.config.mel_std

    def compute_loss(self, token, token_len, mel, mel_len, embedding=None, *, mu_weight=0.0, token_noise=0.0):
        """Training loss and its parts: (scalar, dict).

        token (B, N), mel (B, n_mels, T) log-mel, both padded; half of the rows are given a random prefix of their mel
        as prompt. mu_weight: of an L1 loss that draws mu itself to the mel. token_noise: share of ids replaced.
        """
        b, frames = len(token), mel.shape[2]
        if token_noise:
            other = torch.randint_like(token, self.config.vocab_size)
            token = torch.where(torch.rand(token.shape, device=token.device) < token_noise, other, token)
        if bool((token_len == token.shape[1]).all() and (mel_len == frames).all()):
            mask, x1 = None, self.normalise(mel)
            mu = self.length_regulator((self.encode(token),), (frames,))
        else:
            hidden = self.encode(token, token_len)
            rows = [stretch(h[None, :n], t) for h, n, t in zip(hidden, token_len.tolist(), mel_len.tolist())]
            mask = _valid(mel_len, frames)[:, None].to(mel.dtype)  # (B, 1, T)
            mu = self.length_regulator.smooth(_stack(rows, frames), mask)
            x1 = self.normalise(mel) * mask
        prefix = torch.rand(b, device=mel.device) * self.MAX_PREFIX * (torch.rand(b, device=mel.device) < 0.5)
        cond = x1 * _valid((prefix * mel_len).long(), frames)[:, None]
        matching = self.decoder.compute_loss(x1, mask, mu, self.speaker(embedding, b), cond)
        logs = {"matching": matching.item()}
        loss = matching
        if mu_weight:
            distance = _mean((mu.float() - x1).abs(), mask)
            logs["mu"] = distance.item()
            loss = loss + mu_weight * distance
        return loss, logs


def _mean(error, mask):
    """Mean of (B, C, T) over valid frames."""
    return error.mean() if mask is None else (error * mask).sum() / (mask.sum() * error.shape[1])


def _valid(lengths, n):
    """(B,) -> (B, n) bool, True before each length."""
    return torch.arange(n, device=lengths.device) < lengths[:, None]


def _stack(rows, frames):
    """(1, C, T_i) each -> (B, C, frames), zeros after each row."""
    return torch.cat([F.pad(row, (0, frames - row.shape[-1])) for row in rows])
