"""The systems by name, in the order of their papers; nothing heavy is imported."""

from pkgutil import resolve_name

SYSTEMS = {
    "aqaa": "aqaa.lineage.system:Aqaa",
    "audiogpt": "aqaa.lineage.audiogpt:AudioGPT",
    "hugginggpt": "aqaa.lineage.hugginggpt:HuggingGPT",
    "vall-e": "aqaa.lineage.valle:VALLE",
    "speechgpt": "aqaa.lineage.speechgpt:SpeechGPT",
    "audiopalm": "aqaa.lineage.audiopalm:AudioPaLM",
    "qwen2-audio": "aqaa.lineage.qwen2_audio:Qwen2Audio",
    "kimi-audio": "aqaa.lineage.kimi_audio:KimiAudio",
    "qwen-omni": "aqaa.lineage.qwen_omni:QwenOmni",
}
TRAINED = tuple(name for name in SYSTEMS if name != "aqaa")  # by `aqaa train lineage NAME`


def system(name):
    """The class of a system."""
    return resolve_name(SYSTEMS[name])
