"""The command that serves a released language model with vLLM, checked before it is given."""

import json
import shlex
from itertools import chain
from pathlib import Path

from aqaa.files import read_json
from aqaa.scale.plan import Setup, check_ranks
from aqaa.scale.plan_table import MODELS, parse_gpus, read_model
from aqaa.scale.vllm.client import ATTENTION, MODEL_CLASS, PROCESSOR

# Made while loading:
FORMATS = {"bf16": None, "fp8": "fp8_per_channel", "int8": "int8_per_channel_weight_only"}
PACKED = ("compressed-tensors", "gptq", "awq")  # 4-bit checkpoints that vLLM reads


def serve_command(folder, gpus=1, weights="bf16", *, port=8000, max_len=8192):
    """The line that serves a released language model, to be run in vLLM's own environment.

    weights: bf16, fp8, int8 (made while loading) or int4 (the folder must be so). Raises ValueError
    for heads or 4-bit groups that the GPUs cannot share, or a folder of another format.
    """
    name, backbone, _ = read_model(str(folder))
    config = {} if str(folder) in MODELS else read_json(Path(folder) / "config.json")
    if not config or config.get("quantization"):
        fact = f"{folder} is in aqaa's own format" if config else f"{folder!r} is no folder"
        raise ValueError(f"{fact}: name that of a released language model, 16 bits or packed "
                         f"({', '.join(PACKED)}).")
    if "backbone" in config:
        raise ValueError(f"{folder} is a whole system of aqaa: save its backbone alone, with "
                         "save_pretrained.")
    group = _group(config, folder) if weights == "int4" else None
    if weights not in (*FORMATS, "int4"):
        raise ValueError(f"weights cannot be {weights!r} in vLLM: choose bf16, fp8, int8 or int4.")
    check_ranks(Setup(name, backbone, parse_gpus("H100-80")[0], gpus, weights, group))
    overrides = {"tie_word_embeddings": False}  # vLLM ties what does not say so, and loses lm_head
    if config.get("model_type") != "step1":
        overrides["architectures"] = [MODEL_CLASS]
    flags = {
        "port": port, "tensor-parallel-size": gpus, "dtype": "bfloat16",
        "quantization": FORMATS.get(weights), "max-model-len": min(max_len, backbone.max_seq_len),
        "attention-backend": ATTENTION, "hf-overrides": json.dumps(overrides),
        "generation-config": "vllm", "logits-processors": PROCESSOR,
    }  # fmt: skip
    given = [(f"--{flag}", str(value)) for flag, value in flags.items() if value is not None]
    return shlex.join(["vllm", "serve", str(folder), *chain(*given), "--skip-tokenizer-init"])


def _group(config, folder):
    """The group size of a 4-bit checkpoint. Raises ValueError if it is none that vLLM reads."""
    packed = config.get("quantization_config")
    packed = packed if isinstance(packed, dict) else {}
    if packed.get("quant_method") not in PACKED:
        raise ValueError(f"{folder} is not a 4-bit checkpoint ({', '.join(PACKED)}): "
                         "vLLM makes fp8 and int8 itself.")
    try:
        groups = packed.get("config_groups") or {}
        sizes = [part["weights"]["group_size"] for part in groups.values() if part.get("weights")]
        size = sizes[0] if sizes else packed.get("group_size")
        return size if size and size > 0 else None  # -1: a scale for each output
    except (LookupError, TypeError, AttributeError):
        raise ValueError(f"{folder} does not say how its weights are packed: "
                         "get its config.json again.") from None
