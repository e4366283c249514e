"""Released peers: real classes of transformers with tiny random weights; Kimi-Audio's interface by a stand-in."""

import json
import sys
import types

import numpy as np
import pytest
import soundfile
import torch

from aqaa import cli
from aqaa.evaluation import released_peers as R
from aqaa.evaluation import systems
from aqaa.files import ModelError
from tests.conftest import RATE, tone

transformers = pytest.importorskip("transformers")
TOKENS = {
    "image_token": "<|IMAGE|>", "audio_token": "<|AUDIO|>", "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>",
}  # fmt: skip
MARKS = (*TOKENS.values(), "<|im_start|>", "<|im_end|>", "user", "assistant", "system")
IDS = {word: i for i, word in enumerate(("<unk>", "<pad>", *MARKS, *"abcdefghijklmnopqrstuvwxyz"))}
MELS = 16
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {% for c in m.content %}{% if c.type == 'audio' %}"
    "<|audio_bos|><|AUDIO|><|audio_eos|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "<|im_start|>assistant "
)
AUDIO = {"num_mel_bins": MELS, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "d_model": 16}
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(R, "LONGEST", 4)
    monkeypatch.setattr(R, "SPOKEN", 8)
    torch.manual_seed(0)


def parts(kind):
    """A processor of transformers that hears; the parts for pictures, which need torchvision, are left out."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(list(MARKS))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>")
    features = transformers.WhisperFeatureExtractor(feature_size=MELS)
    if kind is transformers.Qwen2AudioProcessor:
        return kind(features, tokenizer, chat_template=TEMPLATE)
    made = kind.__new__(kind)
    made.feature_extractor, made.tokenizer, made.chat_template = features, tokenizer, TEMPLATE
    for name, token in TOKENS.items():
        for one in (made, tokenizer):
            setattr(one, name, token)
            setattr(one, f"{name}_id", IDS[token])
    return made


def named(*names, end="_token_id"):
    known = {"audio": "<|AUDIO|>", "image": "<|IMAGE|>", "video": "<|VIDEO|>", "audio_start": "<|audio_bos|>",
             "audio_end": "<|audio_eos|>", "vision_start": "<|vision_bos|>", "vision_end": "<|vision_eos|>",
             "im_start": "<|im_start|>", "im_end": "<|im_end|>"}  # fmt: skip
    return {f"{name}{end}": IDS[known.get(name, name)] for name in names}


def qwen2_audio():
    text = {"model_type": "qwen2", "vocab_size": len(IDS), **SIZES}
    config = transformers.Qwen2AudioConfig(audio_config={**AUDIO, "max_source_positions": 1500}, text_config=text,
                                           audio_token_index=IDS["<|AUDIO|>"])  # fmt: skip
    return transformers.Qwen2AudioForConditionalGeneration(config)


def qwen25_omni():
    kinds = named("audio", "image", "video", end="_token_index")
    ends = named("audio_start", "audio_end", "vision_start", "vision_end")
    thinker = {"audio_config": {**AUDIO, "output_dim": 16}, "vision_config": {**VISION, "fullatt_block_indexes": [0]},
               "text_config": {"vocab_size": len(IDS), **SIZES, **ROPE}, **kinds, **ends}  # fmt: skip
    marks = dict(zip(("text_start", "text_end", "text_pad", "codec_start", "codec_end", "codec_pad", "codec_mask"),
                     (2, 3, 4, 33, 34, 32, 36)))  # fmt: skip
    talker = {"vocab_size": 40, "embedding_size": 16, **SIZES, **ROPE, **kinds, **ends,
              **{f"tts_{name}_token_id": mark for name, mark in marks.items()}}  # fmt: skip
    dit = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ff_mult": 1, "emb_dim": 8,
           "head_dim": 8, "num_embeds": 40, "mel_dim": MELS, "block_size": 8, "look_ahead_layers": [0],
           "look_backward_layers": [0], "enc_emb_dim": 8, "enc_dim": 8, "enc_channels": [8, 8, 8, 8, 24],
           "enc_kernel_sizes": [5, 3, 3, 3, 1], "enc_dilations": [1, 2, 3, 4, 1], "enc_attention_channels": 4,
           "enc_res2net_scale": 2, "enc_se_channels": 4, "enc_lin_neurons": 8, "repeats": 2}  # fmt: skip
    vocoder = {"mel_dim": MELS, "upsample_initial_channel": 16, "resblock_kernel_sizes": [3], "upsample_rates": [2, 2],
               "resblock_dilation_sizes": [[1, 3, 5]], "upsample_kernel_sizes": [4, 4]}  # fmt: skip
    config = transformers.Qwen2_5OmniConfig(
        thinker_config=thinker, talker_config=talker,
        token2wav_config={"dit_config": dit, "bigvgan_config": vocoder})  # fmt: skip
    model = transformers.Qwen2_5OmniForConditionalGeneration(config)
    model.speaker_map["Chelsie"] = SPEAKER
    return model


SPEAKER = {"bos_token": 2, "cond": torch.zeros(1, 8), "ref_mel": torch.zeros(1, 30, MELS)}


def qwen3_omni():
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    kinds = named("audio", "image", "video", "audio_start", "vision_start")
    thinker = {"audio_config": {**AUDIO, "output_dim": 16, "downsample_hidden_size": 8}, **kinds, **named("user"),
               "vision_config": {**VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
               "text_config": {"vocab_size": len(IDS), **SIZES, **ROPE, **experts}}  # fmt: skip
    codes = {f"codec_{name}_id": 34 + i for i, name in enumerate(("nothink", "think_bos", "think_eos", "pad", "bos"))}
    talker = {"thinker_hidden_size": 16, "accept_hidden_layer": 1, "num_code_groups": 2, "codec_eos_token_id": 33,
              "speaker_id": {"ethan": 39}, "spatial_merge_size": 2, **codes, **kinds,
              "text_config": {**SIZES, **ROPE, **experts, "vocab_size": 1100, "shared_expert_intermediate_size": 16},
              "code_predictor_config": {**SIZES, "vocab_size": 32, "num_code_groups": 2}}  # fmt: skip
    code2wav = {**SIZES, "num_key_value_heads": 2, "codebook_size": 40, "num_quantizers": 2, "upsample_rates": [2, 2],
                "upsampling_ratios": [2], "decoder_dim": 16}  # fmt: skip
    code2wav.pop("head_dim")
    config = transformers.Qwen3OmniMoeConfig(
        thinker_config=thinker, talker_config=talker, code2wav_config=code2wav, tts_pad_token_id=2, tts_bos_token_id=3,
        tts_eos_token_id=4, **named("im_start", "im_end", "user", "assistant", "system"))  # fmt: skip
    return transformers.Qwen3OmniMoeForConditionalGeneration(config)


def test_qwen2_audio_is_loaded_from_a_folder_and_only_writes(tmp_path, capsys):
    qwen2_audio().save_pretrained(tmp_path)
    parts(transformers.Qwen2AudioProcessor).save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    system = systems.make(f"qwen2-audio:{tmp_path}", None)
    assert "qwen2-audio: 0.0 GB of weights, licence mit" in capsys.readouterr().err
    assert system.name == "released-qwen2-audio" and not system.speaks
    seen = []
    apply = system.processor.apply_chat_template
    system.processor.apply_chat_template = lambda messages, **more: seen.append(json.dumps(messages)) or apply(
        messages, **more)  # fmt: skip
    one, two = system.answer([tone()]), system.answer([tone(), tone()[:8000]])
    assert one.text and set(one.text.split()) <= set(IDS) and not len(one.audio) and two.seconds > 0
    told = json.loads(seen[2])
    assert [message["role"] for message in told] == ["user", "assistant", "user"]
    assert told[1]["content"][0]["text"] == one.text  # what it said itself


@pytest.mark.parametrize("name, model, kind", [
    ("qwen2.5-omni", qwen25_omni, "Qwen2_5OmniProcessor"), ("qwen3-omni", qwen3_omni, "Qwen3OmniMoeProcessor"),
])  # fmt: skip
def test_the_omni_write_and_speak(name, model, kind, tmp_path, monkeypatch):
    made, processor = model(), parts(getattr(transformers, kind))
    for parameter in made.parameters():  # some of the classes leave room for weights unfilled
        torch.nn.init.normal_(parameter, 0, 0.02)
    made.save_pretrained(tmp_path)
    torch.save({"Chelsie": SPEAKER}, tmp_path / "spk_dict.pt")
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda folder: processor)
    system = R.make(name, str(tmp_path))
    assert type(system.model).__name__ == R.PEERS[name].kind and system.speaks
    one, same = system.answer([tone()]), system.answer([tone()])
    assert one.rate == 24_000 and one.audio.dtype == np.float32 and one.audio.ndim == 1 and len(one.audio) > 20
    assert one.text == same.text and np.array_equal(one.audio, same.audio)
    assert np.isfinite(one.audio).all() and len(system.answer([tone(), tone()[:8000]]).audio)


def test_kimi_audio_is_asked_by_its_package(tmp_path, monkeypatch):
    asked = []

    class KimiAudio:
        def __init__(self, model_path, load_detokenizer):
            assert model_path == str(tmp_path) and load_detokenizer

        def generate(self, messages, output_type):
            wavs = [soundfile.read(one["content"]) for one in messages if one["message_type"] == "audio"]
            asked.append((output_type, [one["role"] for one in messages], [len(wav) for wav, _ in wavs]))
            assert all(rate == RATE for _, rate in wavs)
            return (torch.ones(1, 1, 2400) if output_type == "both" else None), f" answer {len(messages)} "

    module = types.SimpleNamespace(KimiAudio=KimiAudio)
    for name in ("kimia_infer", "kimia_infer.api"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "kimia_infer.api.kimia", module)
    reply = systems.make(f"kimi-audio:{tmp_path}", None).answer([tone(), tone()[:800]])
    assert reply.text == "answer 3" and reply.rate == 24_000 and reply.audio.shape == (2400,)
    assert asked == [("text", ["user"], [len(tone())]), ("both", ["user", "assistant", "user"], [len(tone()), 800])]


@pytest.mark.parametrize("name", list(R.PEERS))
def test_nothing_is_fetched_unasked_and_size_and_licence_come_first(name, capsys, monkeypatch):
    peer = R.PEERS[name]
    for place in ("", "/nowhere"):
        with pytest.raises(ModelError, match=f"{peer.size} GB of weights, licence {peer.licence}.*{peer.repository}"):
            systems.make(f"{name}:{place}", None)
    assert capsys.readouterr().err == ""

    def refuses(place, **_):
        assert f"{peer.size} GB of weights, licence {peer.licence}" in capsys.readouterr().err
        raise OSError("no network")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", refuses)
    with pytest.raises(ModelError, match=f"{name} cannot be loaded from {peer.repository}"):
        systems.make(f"{name}:{peer.repository}", None)


def test_a_folder_of_something_else_is_one_sentence(tmp_path, capsys):
    assert cli.main(["eval", "--system", f"qwen2-audio:{tmp_path}", "--out", str(tmp_path / "a.jsonl")]) == 1
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aqaa: ")]
    assert len(err) == 1 and "cannot be loaded" in err[0] and not (tmp_path / "a.jsonl").exists()


def test_a_peer_that_only_writes_has_no_scores_of_sound(tmp_path):
    pytest.importorskip("pocketsphinx")
    from aqaa.evaluation import sets, stepeval

    soundfile.write(tmp_path / "q.wav", tone(), RATE)
    read = (tmp_path / "q.wav").read_bytes
    question = sets.Question("q", "Sing", ["sing"], "a", files=["q.wav"], read=lambda name: read())
    system = R.Released("qwen2-audio", qwen2_audio(), parts(transformers.Qwen2AudioProcessor))
    (row,) = stepeval.evaluate(system, [question], tmp_path / "a.jsonl", quiet=True)
    assert row["text"] is False and row["spoken"] is row["agrees"] is row["quality"] is row["manner"] is None
    assert "spoken" not in stepeval.summarise([row])["all"]
