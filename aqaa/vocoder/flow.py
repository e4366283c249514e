"""Audio ids to mel by conditional flow matching (AQAA paper 2.3; CosyVoice 1.0 section 2.3).

Ids are read by a conformer and stretched to mel frames (mu); a U-Net carries noise to speech along
mu in a few Euler steps. A prompt (ids and their mel) is continued: so chunks of an answer join.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from aqaa.vocoder.conformer import ConformerEncoder
from aqaa.vocoder.unet import MaskedGroupNorm, UNet, masked


class InterpolateRegulator(nn.Module):
    """Stretches token features to mel frames by linear interpolation, then convolves them."""

    def __init__(self, channels, layers=4):
        super().__init__()
        stack = []
        for _ in range(layers):
            conv = nn.Conv1d(channels, channels, 3, padding=1)
            stack += [conv, MaskedGroupNorm(1, channels), nn.Mish()]
        self.model = nn.Sequential(*stack, nn.Conv1d(channels, channels, 1))

    def forward(self, parts, lengths):
        """parts: (B, N_i, C) features side by side; lengths: the frames of each -> (B, C, T).

        Each part is interpolated by itself, so that a prompt's features end where its mel ends;
        the convolutions run across the seams. A part may be empty.
        """
        return self.smooth(torch.cat([stretch(x, n) for x, n in zip(parts, lengths)], -1))

    def smooth(self, x, mask=None):
        """x (B, C, T), mask (B, 1, T) or None -> (B, C, T)."""
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
    """Optimal-transport conditional flow matching (Lipman et al. 2023): straight paths."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        n = config.output_size
        self.estimator = UNet(4 * n, n, config)

    def time_steps(self, n, like):
        """0 = t_0 < ... < t_n = 1, denser at the start, in the dtype of `like`, as published."""
        t = torch.linspace(0, 1, n + 1, dtype=like.dtype, device=like.device)
        return 1 - torch.cos(t * 0.5 * torch.pi)

    def velocity(self, x, mask, mu, t, speaker, cond, rate):
        """dx/dt at t (a scalar tensor), guided away from the unconditional field by `rate`."""
        if not rate:
            return self.estimator(x, mask, mu, t.expand(len(x)), speaker, cond)
        # classifier-free guidance: one batch holds each row with its conditions and without
        x = x.repeat(2, 1, 1)  # (2 B, n_mels, T)
        mask = None if mask is None else mask.repeat(2, 1, 1)
        mu, speaker, cond = (torch.cat([c, torch.zeros_like(c)]) for c in (mu, speaker, cond))
        v = self.estimator(x, mask, mu, t.expand(len(x)), speaker, cond)
        conditional, unconditional = v.chunk(2)
        return (1 + rate) * conditional - rate * unconditional

    def forward(self, x, mask, mu, speaker, cond, n_timesteps, rate):
        """Euler from noise x (B, n_mels, T) at t = 0 to the mel at t = 1."""
        for t, following in pairwise(self.time_steps(n_timesteps, mu)):
            x = x + (following - t) * self.velocity(x, mask, mu, t, speaker, cond, rate)
        return x

    def compute_loss(self, x1, mask, mu, speaker, cond):
        """Mean square error of the velocity at random times, a scalar. x1 (B, n_mels, T)."""
        b = len(x1)
        shrink = 1 - self.config.sigma_min  # what is left of the noise at t = 1
        t = 1 - torch.cos(torch.rand(b, 1, 1, device=x1.device) * 0.5 * torch.pi)
        noise = torch.randn_like(x1)
        path = (1 - shrink * t) * noise + t * x1  # a straight line from noise to mel
        # some rows lose their conditions, so that guidance has an unconditional field
        keep = torch.rand(b, 1, 1, device=x1.device) >= self.config.training_cfg_rate
        keep = keep.to(x1.dtype)
        speaker = speaker * keep[..., 0]
        v = self.estimator(path, mask, mu * keep, t.flatten(), speaker, cond * keep)
        return _mean((v.float() - (x1 - shrink * noise)).square(), mask)


class Flow(nn.Module):
    """Audio ids (0-based, linguistic below semantic, interleaved 2:3) to log-mel frames.

    config: FlowConfig; mel: MelConfig, for the frame rate. Parameter names are those of flow.pt.
    """

    MAX_PREFIX = 0.7  # of an utterance, given as prompt in training

    def __init__(self, config, mel):
        super().__init__()
        self.config = config
        self.frames_per_token = mel.sampling_rate / mel.hop_size / config.input_frame_rate
        n = config.output_size
        self.input_embedding = nn.Embedding(config.vocab_size, config.input_size)
        self.spk_embed_affine_layer = nn.Linear(config.spk_embed_dim, n)
        self.encoder = ConformerEncoder(
            config.input_size, config.encoder_size, config.encoder_heads, config.encoder_units,
            config.encoder_blocks,
        )  # fmt: skip
        self.encoder_proj = nn.Linear(config.encoder_size, n)
        self.length_regulator = InterpolateRegulator(n)
        self.decoder = ConditionalCFM(config)

    def frames(self, n_tokens):
        """Whole mel frames in the time of n tokens. Chunks take differences of it: they add up."""
        return int(n_tokens * self.frames_per_token + 1e-6)

    def encode(self, token, token_len=None):
        """token (B, N) -> features (B, N, n_mels) before stretching. Negative ids count as 0, as
        published. Raises ValueError for an id that the embedding does not have."""
        size = self.config.vocab_size
        if token.numel() and (largest := int(token.max())) >= size:
            fault = f"audio id {largest} is outside the flow's vocabulary of {size}"
            raise ValueError(f"{fault}: take tokens and vocoder from one model")
        if token.shape[1] == 0:
            return self.encoder_proj.weight.new_zeros(len(token), 0, self.config.output_size)
        mask = None if token_len is None else _before(token_len, token.shape[1])
        hidden = self.encoder(self.input_embedding(token.clamp(min=0)), mask)
        return self.encoder_proj(hidden)

    def speaker(self, embedding, batch):
        """Raw speaker vectors (B, spk_embed_dim) -> (B, n_mels); None: zeros (one-voice models)."""
        weight = self.spk_embed_affine_layer.weight
        if embedding is None:
            embedding = weight.new_zeros(batch, self.config.spk_embed_dim)
        return self.spk_embed_affine_layer(F.normalize(embedding.to(weight), dim=1))

    def guide(self, token, token_len, mel_len, frames, prompt=(0, 0)):
        """(mu (B, n_mels, T), mask (B, 1, T) or None): ids (B, N) stretched to T = frames.

        Row i holds token_len[i] ids in mel_len[i] frames, then padding; its first prompt[0] ids
        fill its first prompt[1] frames exactly.
        """
        p, t_p = prompt
        if bool((token_len == token.shape[1]).all() and (mel_len == frames).all()):
            hidden = self.encode(token)
            return self.length_regulator((hidden[:, :p], hidden[:, p:]), (t_p, frames - t_p)), None
        hidden = self.encode(token, token_len)
        mask = _before(mel_len, frames)[:, None].to(self.encoder_proj.weight)
        rows = []
        for row, n, t in zip(hidden[:, None], token_len.tolist(), mel_len.tolist()):
            row = torch.cat([stretch(row[:, :p], t_p), stretch(row[:, p:n], t - t_p)], -1)
            rows.append(F.pad(row, (0, frames - t)))  # (1, n_mels, T), zeros after its end
        return self.length_regulator.smooth(torch.cat(rows), mask), mask

    @torch.inference_mode()
    def inference(
        self, token, token_len=None, *, prompt_token=None, prompt_feat=None, embedding=None,
        noise=None, n_timesteps=None, temperature=None, cfg_rate=None, first=0,
    ):  # fmt: skip
        """token (B, N) -> log-mel (B, n_mels, T), T = frames(N); zeros follow frames(token_len).

        prompt_token (B, P) and prompt_feat (B, T_p, n_mels), its log-mel, are continued and not
        returned. embedding (B, spk_embed_dim). noise (B, n_mels, T_p + T) standard normal. first:
        tokens of the utterance before `token`: frames of chunks add up to those of the whole.
        """
        config = self.config
        weight = self.encoder_proj.weight
        b, n = token.shape
        if prompt_token is None:
            prompt_token = token[:, :0]
            prompt_feat = weight.new_zeros(b, 0, config.output_size)
        prompt = self.normalise(prompt_feat.to(weight)).transpose(1, 2)  # (B, n_mels, T_p)
        p, t_p = prompt_token.shape[1], prompt.shape[2]
        token_len = torch.full((b,), n) if token_len is None else token_len
        begin = self.frames(first)
        mel_len = torch.tensor([self.frames(first + int(k)) - begin for k in token_len])
        frames = self.frames(first + n) - begin
        # 1. what is to be said, frame by frame: the prompt's ids, then these
        token = torch.cat([prompt_token, token], 1)  # (B, P + N)
        mu, mask = self.guide(token, token_len + p, mel_len + t_p, frames + t_p, (p, t_p))
        # 2. the prompt's mel as the beginning that is given: it sets voice, pitch and loudness
        cond = F.pad(prompt, (0, frames))  # (B, n_mels, T_p + T)
        # 3. from noise to mel; noise below 1 gives a calmer, more probable voice
        noise = torch.randn_like(mu) if noise is None else noise.to(mu)
        noise = noise * (config.temperature if temperature is None else temperature)
        rate = config.inference_cfg_rate if cfg_rate is None else cfg_rate
        steps = n_timesteps or config.n_timesteps
        x = self.decoder(noise, mask, mu, self.speaker(embedding, b), cond, steps, rate)
        # 4. without the prompt, on the scale of a log-mel
        mel = x[..., t_p:] * config.mel_std + config.mel_mean
        return masked(mel, None if mask is None else mask[..., t_p:])

    def normalise(self, mel):
        """Log-mel to the scale the flow works in."""
        return (mel - self.config.mel_mean) / self.config.mel_std

    def compute_loss(
        self, token, token_len, mel, mel_len, embedding=None, *, mu_weight=0.0, token_noise=0.0
    ):
        """Training loss and its parts: (scalar, dict).

        token (B, N), mel (B, n_mels, T) log-mel, both padded. mu_weight: of an L1 loss that draws
        mu itself to the mel. token_noise: share of ids replaced by random ones.
        """
        b = len(token)
        frames = mel.shape[2]
        if token_noise:
            other = torch.randint_like(token, self.config.vocab_size)
            chosen = torch.rand(token.shape, device=token.device) < token_noise
            token = torch.where(chosen, other, token)
        mu, mask = self.guide(token, token_len, mel_len, frames)
        x1 = masked(self.normalise(mel), mask)
        # half of the rows are given a random prefix of their mel, to learn to continue a prompt
        prefix = torch.rand(b, device=mel.device) * self.MAX_PREFIX
        prefix = prefix * (torch.rand(b, device=mel.device) < 0.5)
        cond = x1 * _before((prefix * mel_len).long(), frames)[:, None]
        loss = self.decoder.compute_loss(x1, mask, mu, self.speaker(embedding, b), cond)
        logs = {"matching": loss.item()}
        if mu_weight:
            distance = _mean((mu.float() - x1).abs(), mask)
            logs["mu"] = distance.item()
            loss = loss + mu_weight * distance
        return loss, logs


def _mean(error, mask):
    """Mean of (B, C, T) over valid frames."""
    return error.mean() if mask is None else (error * mask).sum() / (mask.sum() * error.shape[1])


def _before(lengths, n):
    """(B,) -> (B, n) bool, True before each length."""
    return torch.arange(n, device=lengths.device) < lengths[:, None]
