"""Sizes of every part, twice: `mini` (trained by this repository) and `full` (as published).

One frozen dataclass a part. The same classes are built from either preset, so what a reader learns
on the mini holds for the published model. Sources are paper sections, or the class that they feed.
"""

from dataclasses import asdict, dataclass, field, fields, is_dataclass

# Step-1's control tokens: one of them right after bos asks for another task than spoken answers.
TTS = 35  # text -> its speech
ASR_MARKER = 36  # speech -> its words
TQAA = 37  # text question -> audio answer
AQTA = 38  # audio question -> text answer

SAMPLE_RATE = 16_000  # Hz, of everything that is tokenized (AQAA paper 2.1)
LINGUISTIC_PER_GROUP = 2  # 16.67 Hz
SEMANTIC_PER_GROUP = 3  # 25 Hz
GROUP_SIZE = LINGUISTIC_PER_GROUP + SEMANTIC_PER_GROUP  # tokens in 120 ms
GROUP_SECONDS = 0.12
TOKENS_PER_SECOND = GROUP_SIZE / GROUP_SECONDS  # 41.67
INT4_GROUPS = (128, 64, 32)  # inputs that share a scale in int4 weights, the preferred number first


@dataclass(frozen=True)
class LinguisticConfig:
    """Streaming SANM encoder, then k-means (AQAA paper 2.1; FunASR SANMEncoderChunkOpt)."""

    codebook_size: int = 1024
    output_size: int = 512  # width of the encoder
    attention_heads: int = 4
    linear_units: int = 2048  # width of the feed-forward layers
    num_blocks: int = 50  # counts the first block, which maps 560 to output_size
    kernel_size: int = 11  # FSMN memory, rows
    n_mels: int = 80
    lfr_m: int = 7  # fbank frames stacked in one row
    lfr_n: int = 6  # fbank frames between two rows: 60 ms
    chunk_rows: int = 4  # new rows in a chunk: 240 ms
    overlap_rows: int = 5  # rows of the past that are run again with each chunk
    look_back: int = 4  # chunks whose keys and values are kept
    dither: float = 0.0  # noise added by the front end; the official tokenizer leaves it at 1.0

    @property
    def input_size(self):
        return self.n_mels * self.lfr_m


@dataclass(frozen=True)
class SemanticConfig:
    """S3 tokenizer, version 1 at 25 Hz (CosyVoice 1.0 section 2.1; s3tokenizer ModelConfig)."""

    n_codebook_size: int = 4096
    n_mels: int = 128
    n_audio_ctx: int = 1500  # rows of the positional table: 60 s
    n_audio_state: int = 1280
    n_audio_head: int = 20
    n_audio_layer: int = 6


@dataclass(frozen=True)
class MelConfig:
    """Mel spectrogram of the vocoder (matcha: Slaney bank, natural log, floor 1e-5)."""

    n_fft: int = 1024
    num_mels: int = 80
    sampling_rate: int = 22_050
    hop_size: int = 256
    win_size: int = 1024
    fmin: int = 0
    fmax: int = 8000


@dataclass(frozen=True)
class FlowConfig:
    """Token to mel: conformer, length regulator, conditional flow matching (AQAA paper 2.3)."""

    vocab_size: int = 5121  # audio ids, and a pad row in the published file
    input_size: int = 512
    output_size: int = 80
    spk_embed_dim: int = 192
    input_frame_rate: float = 125 / 3  # tokens per second
    encoder_size: int = 512
    encoder_heads: int = 8
    encoder_units: int = 2048
    encoder_blocks: int = 6
    channels: tuple = (256, 256)  # of the U-Net
    attention_head_dim: int = 64
    num_heads: int = 8
    n_blocks: int = 4  # transformer blocks after each resnet
    num_mid_blocks: int = 12
    n_timesteps: int = 10  # Euler steps
    inference_cfg_rate: float = 0.7
    training_cfg_rate: float = 0.2
    sigma_min: float = 1e-6
    temperature: float = 1.0  # scale of the starting noise
    mel_mean: float = 0.0  # the flow shifts and scales log-mels; the published one takes them raw
    mel_std: float = 1.0


@dataclass(frozen=True)
class HiftConfig:
    """Neural source filter with an inverse STFT (HiFT, CosyVoice hifigan/generator)."""

    in_channels: int = 80
    base_channels: int = 512
    nb_harmonics: int = 8
    sampling_rate: int = 22_050
    nsf_alpha: float = 0.1
    nsf_sigma: float = 0.003
    nsf_voiced_threshold: float = 10  # Hz
    upsample_rates: tuple = (8, 8)
    upsample_kernel_sizes: tuple = (16, 16)
    istft_n_fft: int = 16
    istft_hop: int = 4
    resblock_kernel_sizes: tuple = (3, 7, 11)
    resblock_dilation_sizes: tuple = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    source_resblock_kernel_sizes: tuple = (7, 11)
    source_resblock_dilation_sizes: tuple = ((1, 3, 5), (1, 3, 5))
    lrelu_slope: float = 0.1
    audio_limit: float = 0.99
    f0_channels: int = 512


@dataclass(frozen=True)
class IdsConfig:
    """Where each kind of token lives in the backbone's one vocabulary; markers as in Step-1."""

    n_text: int = 65_536
    n_linguistic: int = 1024
    n_semantic: int = 4096
    bos: int = 1
    eot: int = 3
    bot: int = 4
    im_patch: int = 13  # stands where a row of a picture goes
    im_start: int = 14
    im_end: int = 15
    audio_start: int = 31  # opens a piece that keeps one manner of speaking (AQAA Table 2)
    audio_end: int = 32  # closes it
    text_start: int = 33  # the answer's audio is complete; text goes on
    text_end: int = 34  # the answer's text is complete; audio goes on
    first_text: int = 68  # everything below is a marker or unused

    @property
    def semantic_start(self):
        return self.n_text + self.n_linguistic

    @property
    def n_audio(self):
        return self.n_linguistic + self.n_semantic

    @property
    def end(self):
        """One past the last audio id."""
        return self.n_text + self.n_audio


@dataclass(frozen=True)
class BackboneConfig:
    """Fields that Step1Config takes (BACKBONE: 88 layers, 130 B, the published language model)."""

    vocab_size: int = 74_752
    hidden_size: int = 12_288
    intermediate_size: int = 31_232
    num_hidden_layers: int = 88
    num_attention_heads: int = 96
    num_attention_groups: int = 8
    max_seq_len: int = 32_768
    rms_norm_eps: float = 1e-5
    bos_token_id: int = 1
    eos_token_id: int = 3
    pad_token_id: int = 0


@dataclass(frozen=True)
class VisionConfig:
    """CLIP-ViT, two convolutions, a projector (AQAA paper 2.2: Step-Omni sees, too). AQAA's own
    sizes are not known; these are of a published sister with the same parts, Step-3."""

    image_size: int = 728
    patch_size: int = 14
    hidden_size: int = 1792
    intermediate_size: int = 3072
    num_hidden_layers: int = 63
    num_attention_heads: int = 16
    output_hidden_size: int = 4096  # channels behind the first convolution
    understand_projector_stride: int = 2  # of that convolution
    lora_rank: int = 0  # of what the backbone changes where it sees; 0: it learnt it with the rest

    @property
    def rows(self):
        """Ids of a prompt that a picture takes."""
        side = (self.image_size // self.patch_size - 2) // self.understand_projector_stride + 1
        return ((side - 1) // 2 + 1) ** 2


@dataclass(frozen=True)
class ConfidenceConfig:
    """What makes a probability of being right of the mean probability c of an answer's words:
    sigmoid(slope * logit(c) + offset), fitted by `aqaa bench calibration` on questions that no
    weights have learnt from. As it stands here, c itself. An answer whose first words are less
    probably right than `again` hears its question again, see hearings.py; 0: none does."""

    slope: float = 1.0
    offset: float = 0.0
    again: float = 0.0


@dataclass(frozen=True)
class AQAAConfig:
    """The whole system."""

    name: str = "full"
    linguistic: LinguisticConfig = field(default_factory=LinguisticConfig)
    semantic: SemanticConfig = field(default_factory=SemanticConfig)
    ids: IdsConfig = field(default_factory=IdsConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    mel: MelConfig = field(default_factory=MelConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    hift: HiftConfig = field(default_factory=HiftConfig)
    confidence: ConfidenceConfig = field(default_factory=ConfidenceConfig)

    def to_dict(self):
        return asdict(self)

    @classmethod
    def from_dict(cls, data):
        """The inverse of to_dict, also after a trip through JSON (lists become tuples again)."""
        return _build(cls, data)


RETIRED = {"shortcut_steps"}  # settings that earlier folders still name


def _build(cls, data):
    parts = {f.name: f.default_factory for f in fields(cls)}
    if unknown := set(data) - set(parts) - RETIRED:
        raise ValueError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}")
    return cls(**{
        name: _build(parts[name], value) if is_dataclass(parts[name]) else _tuples(value)
        for name, value in data.items() if name in parts
    })  # fmt: skip


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def _mini():
    ids = IdsConfig(n_text=512, n_linguistic=512, n_semantic=1024, first_text=42)  # tags are text
    return AQAAConfig(
        name="mini",
        ids=ids,
        linguistic=LinguisticConfig(
            codebook_size=ids.n_linguistic, output_size=192, linear_units=768, num_blocks=5,
        ),
        semantic=SemanticConfig(
            n_codebook_size=ids.n_semantic, n_audio_state=192, n_audio_head=4, n_audio_layer=4,
        ),
        backbone=BackboneConfig(
            vocab_size=ids.end, hidden_size=256, intermediate_size=704, num_hidden_layers=6,
            num_attention_heads=8, num_attention_groups=2, max_seq_len=4096,
        ),
        vision=VisionConfig(
            image_size=64, patch_size=8, hidden_size=80, intermediate_size=160, num_hidden_layers=4,
            num_attention_heads=4, output_hidden_size=80, understand_projector_stride=1,
            lora_rank=8,
        ),
        mel=MelConfig(n_fft=640, sampling_rate=16_000, hop_size=160, win_size=640),
        flow=FlowConfig(
            vocab_size=ids.n_audio, input_size=160, spk_embed_dim=16, encoder_size=160,
            encoder_heads=4, encoder_units=640, encoder_blocks=4, channels=(128, 128), num_heads=2,
            n_blocks=1, num_mid_blocks=4, inference_cfg_rate=0.0, temperature=0.7, mel_mean=-6.1,
            mel_std=2.4,
        ),
        hift=HiftConfig(
            base_channels=192, sampling_rate=16_000, upsample_rates=(5, 4), f0_channels=128,
            upsample_kernel_sizes=(15, 8), istft_n_fft=32, istft_hop=8,
        ),
        confidence=ConfidenceConfig(again=0.9),
    )  # fmt: skip


PRESETS = {"mini": _mini, "full": AQAAConfig}


def preset(name):
    """The configuration called `name` ("mini" or "full"). Raises ValueError for any other."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]()


def largest_group(widths, ranks=1):
    """The largest usual int4 group that divides all `widths` / ranks; None if there is none."""
    fitting = (g for g in INT4_GROUPS if all(width % (ranks * g) == 0 for width in widths))
    return next(fitting, None)


def check_group(in_features, group, ranks=1, what="an input", beside=()):
    """Raise ValueError if groups of `group` do not fill the inputs that each of `ranks` GPUs holds.

    beside: widths of the model's other layers, which the group that is advised has to divide too.
    """
    if group > 0 and in_features % (ranks * group) == 0:
        return
    fitting = largest_group((in_features, *beside), ranks)
    shared = f" over {ranks} GPUs, {in_features / ranks:g} each" if ranks > 1 else ""
    remedy = f"use groups of {fitting}" if fitting else "use int8 or fp8"
    if ranks > 1 and not fitting:
        remedy += ", or fewer GPUs"
    fault = f"groups of {group} do not divide {what} of {in_features} inputs{shared}"
    raise ValueError(f"{fault}: {remedy}.")
