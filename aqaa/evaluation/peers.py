"""The implementations that the parts come from, at the same sizes and with our weights.

Each function takes one of our modules and gives a function of the same inputs, which runs the
peer's classes the way their authors do. Raises ModuleNotFoundError without the extra `peers`."""

import contextlib
import io
import logging
from dataclasses import asdict
from importlib.util import find_spec
from itertools import pairwise

import torch

from aqaa.tokenizers.linguistic import STRIDE

# To install: to import.
PACKAGES = {"s3tokenizer": "s3tokenizer", "funasr": "funasr", "matcha-tts": "matcha"}


def installed(package):
    """Whether a package of PACKAGES is here."""
    return find_spec(PACKAGES[package]) is not None


def s3tokenizer(tokenizer):
    """SemanticTokenizer -> a function of (N,), up to 30 s: (hidden (T, D), codes (T,))."""
    from s3tokenizer import log_mel_spectrogram
    from s3tokenizer.model import ModelConfig, S3Tokenizer

    config = ModelConfig(**asdict(tokenizer.config))
    peer = S3Tokenizer("speech_tokenizer_v1_25hz", config).eval()
    peer.load_state_dict(tokenizer.state_dict())

    @torch.inference_mode()
    def encode(wav):
        mel = log_mel_spectrogram(wav, tokenizer.config.n_mels)[None]
        hidden, _ = peer.encoder(mel, torch.tensor([mel.shape[2]]))
        return hidden[0], peer.quantizer.encode(hidden)[0]

    return encode


def funasr(tokenizer):
    """LinguisticTokenizer -> a function of (N,), in chunks: (hidden (T, D), codes (T,))."""
    with contextlib.redirect_stdout(io.StringIO()):
        from funasr.frontends.wav_frontend import WavFrontendOnline
        from funasr.models.scama.encoder import SANMEncoderChunkOpt
    logging.getLogger().setLevel(logging.WARNING)  # it speaks to the root logger
    c = tokenizer.config
    peer = SANMEncoderChunkOpt(
        c.input_size, c.output_size, c.attention_heads, c.linear_units, c.num_blocks,
        input_layer="pe_online", kernel_size=c.kernel_size,
    ).eval()  # fmt: skip
    peer.load_state_dict(tokenizer.encoder.state_dict())
    front = WavFrontendOnline(n_mels=c.n_mels, lfr_m=c.lfr_m, lfr_n=c.lfr_n, dither=c.dither)

    @torch.inference_mode()
    def encode(wav):
        front_cache, rows = {}, []
        cache = {
            "start_idx": 0, "chunk_size": [0, c.chunk_rows, c.overlap_rows], "opt": None,
            "feats": torch.zeros(1, c.overlap_rows, c.input_size),
            "encoder_chunk_look_back": c.look_back, "tail_chunk": False,
        }  # fmt: skip
        pieces = wav.split(STRIDE)
        for i, piece in enumerate(pieces, 1):
            final, lengths = i == len(pieces), torch.tensor([len(piece)])
            features, _ = front(piece[None], lengths, cache=front_cache, is_final=final)
            if features.numel():
                features = (features + tokenizer.add_shift) * tokenizer.rescale
                hidden, *_ = peer.forward_chunk(features, lengths, cache, is_final=final)
                rows.append(hidden[0, -features.shape[1] :])
        hidden = torch.cat(rows)
        return hidden, tokenizer.quantize(hidden)

    return encode


def matcha(flow):
    """Flow -> a function as its decoder: its arguments -> mel (B, n_mels, T). The estimator is
    matcha's; around it stands the Euler loop of CosyVoice, which has no package: both branches of
    the guidance in one batch, everything anew in every step."""
    from matcha.models.components.decoder import Decoder

    c = flow.config
    peer = Decoder(
        4 * c.output_size, c.output_size, c.channels, 0.0, c.attention_head_dim, c.n_blocks,
        c.num_mid_blocks, c.num_heads, act_fn="gelu",
    ).eval().to(flow.encoder_proj.weight.dtype)  # fmt: skip
    peer.load_state_dict(flow.decoder.estimator.state_dict())
    # As CosyVoice does: the wave of the time in the dtype of the network.
    peer.time_embeddings.register_forward_hook(lambda _, args, wave: wave.to(args[0].dtype))

    @torch.inference_mode()
    def decode(noise, mask, mu, speaker, cond, n_timesteps, rate):
        told = torch.cat([mu, speaker[..., None].expand_as(mu), cond], 1)
        told = torch.cat([told, torch.zeros_like(told)])  # (2B, C, T): conditional, unconditional
        mask = torch.ones_like(told[:, :1]) if mask is None else mask.repeat(2, 1, 1)
        x = noise
        for t, after in pairwise(flow.decoder.time_steps(n_timesteps, mu)):
            conditional, free = peer(x.repeat(2, 1, 1), mask, told, t.expand(len(told))).chunk(2)
            x = x + (after - t) * ((1 + rate) * conditional - rate * free)
        return x

    return decode
