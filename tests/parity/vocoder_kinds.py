"""Fixtures of the vocoder: length_regulator, cfm_estimator, flow, hift."""

from types import SimpleNamespace

import torch

from aqaa.config import FlowConfig, HiftConfig, MelConfig
from aqaa.vocoder.flow import Flow, InterpolateRegulator
from aqaa.vocoder.hift import HiFT
from aqaa.vocoder.unet import UNet
from tests.parity.common import compare, load, ready


def tags(given, name):
    """The endings of the inputs called <name>_<tag>."""
    start = f"{name}_"
    return sorted((k[len(start) :] for k in given if k.startswith(start)), key=int)


def length_regulator(path):
    """Prompt and target stretched by themselves, smoothed together."""
    meta, sd, given, wanted = load(path)
    model = ready(InterpolateRegulator(meta["config"]["channels"], len(meta["config"]["sampling_ratios"])))
    model.load_state_dict(sd)
    for tag in tags(given, "x1"):
        frames = meta["config"]["cases_t1_t2_mel1_mel2"][int(tag)][2:]
        y = model((given[f"x1_{tag}"], given[f"x2_{tag}"]), frames)
        yield from _errors(meta, wanted, {f"y_{tag}": y.mT})


def unet(c, channels_in):
    """UNet from the constructor arguments of an estimator fixture."""
    return ready(UNet(channels_in, c["out_channels"], SimpleNamespace(**c)))


def cfm_estimator(path):
    """One call of the U-Net, several lengths; with an all-ones mask and with none."""
    meta, sd, given, wanted = load(path)
    model = unet(meta["config"], meta["config"]["in_channels"])
    model.load_state_dict(sd)
    for tag in tags(given, "x"):
        x, mask, mu, t, speaker, cond = (given[f"{k}_{tag}"] for k in ("x", "mask", "mu", "t", "spks", "cond"))
        yield from _errors(meta, wanted, {f"dphi_{tag}": model(x, None, mu, t, speaker, cond)})
        yield from _errors(meta, wanted, {f"dphi_{tag}": model(x, mask, mu, t, speaker, cond)})


def flow_model(c):
    """Flow from the constructor arguments of a flow fixture."""
    encoder, estimator, cfm = c["encoder"], c["estimator"], c["cfm"]["cfm_params"]
    same = ("input_size", "output_size", "spk_embed_dim", "vocab_size", "input_frame_rate")
    config = FlowConfig(
        **{k: c[k] for k in same}, encoder_size=encoder["output_size"], encoder_heads=encoder["attention_heads"],
        encoder_units=encoder["linear_units"], encoder_blocks=encoder["num_blocks"],
        **{k: estimator[k] for k in ("channels", "attention_head_dim", "n_blocks", "num_mid_blocks", "num_heads")},
        **{k: cfm[k] for k in ("sigma_min", "training_cfg_rate", "inference_cfg_rate")},
    )
    return ready(Flow(config, MelConfig(**c["mel_feat_conf"])))


def flow(path):
    """The whole inference with its intermediate tensors, in the dtype of the fixture's weights."""
    meta, sd, given, wanted = load(path)
    model = flow_model(meta["config"])
    model.to(next(iter(sd.values())).dtype).load_state_dict(sd)
    taken = {}

    def keep(name):
        return lambda module, args, out: taken.setdefault(name, []).append((args, out))

    model.encoder.register_forward_hook(keep("encoder"))
    model.decoder.estimator.register_forward_hook(keep("estimator"))
    token, prompt, feat, speaker, noise = (
        given[k] for k in ("token", "prompt_token", "prompt_feat", "embedding", "noise")
    )
    mel = model.inference(token, prompt_token=prompt, prompt_feat=feat, embedding=speaker, noise=noise)
    calls = taken["estimator"]
    yield from _errors(meta, wanted, {
        "encoder_out": taken["encoder"][0][1],
        "mu": calls[0][0][2][:1],
        "t_steps": torch.stack([args[3][0] for args, _ in calls]),
        "dphi_step1_cond_uncond": calls[0][1],
        "x_after_step1": calls[1][0][0][:1],
        "mel": mel,
    })


def hift_config(c):
    """HiftConfig from the constructor arguments of a hift fixture."""
    same = {k: v for k, v in c.items() if k not in ("istft_params", "f0")}
    return HiftConfig(**same, istft_n_fft=c["istft_params"]["n_fft"], istft_hop=c["istft_params"]["hop_len"],
                      f0_channels=c["f0"]["cond_channels"])


def hift(path):
    """f0, source, STFT, spectrum and wave, end to end and from the fixture's own source (the tight gate)."""
    meta, sd, given, wanted = load(path)
    model = ready(HiFT(hift_config(meta["config"])))
    model.load_state_dict(sd)
    for tag in tags(given, "mel"):
        mel = given[f"mel_{tag}"]
        state = model.m_source.start(offset=given[f"phase_{tag}"])
        got = {"f0": model.f0_predictor(mel)}
        got["source"] = model.source(got["f0"], state, given[f"noise_{tag}"])
        got["stft"] = model.source_spectrum(got["source"])
        got["magnitude"], got["phase"] = model.spectrum(mel, got["source"])
        got["wav"] = model.wave(got["magnitude"], got["phase"])
        spectrum = model.spectrum(mel, given[f"source_{tag}"])
        got["decode_magnitude"], got["decode_phase"] = spectrum
        got["decode_wav"] = model.wave(*spectrum)
        yield from _errors(meta, wanted, {f"{k}_{tag}": v for k, v in got.items()})


def _errors(meta, wanted, outputs):
    """Largest absolute error; in bfloat16 relative RMS, allowed 1.5 times what bfloat16 itself costs."""
    half = meta.get("bf16_vs_fp32_same_weights")
    for name, got in outputs.items():
        if half and got.shape == wanted[name].shape:
            error = (got.float() - wanted[name].float()).norm() / wanted[name].float().norm()
            yield name, error.item(), 1.5 * half["rel_rms"][name]
        else:
            yield compare(name, got, wanted[name], meta)


KINDS = {"length_regulator": length_regulator, "cfm_estimator": cfm_estimator, "flow": flow, "hift": hift}
