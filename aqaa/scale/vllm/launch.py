"""The command that serves a released language model with vLLM, checked before it is given."""

import json
import shlex
from pathlib import Path

from aqaa.files import read_json
from aqaa.scale.plan import Setup, check_ranks
from aqaa.scale.plan_table import MODELS, parse_gpus, read_model
from aqaa.scale.vllm.client import ATTENTION, LISTED, PROCESSOR, overrides

# Made while loading:
FORMATS = {"bf16": None, "fp8": "fp8_per_channel", "int8": "int8_per_channel_weight_only"}
PACKED = ("compressed-tensors", "gptq", "awq")  # 4-bit checkpoints that vLLM reads
HEAD = "HEAD"  # stands for the address of machine 0
RAY_PORT = 6379
COPIES_PORT = 13345  # where machine 0 hands requests to the copies on the others


def serve_command(folder, gpus=1, weights="bf16", *, port=8000, max_len=8192, **more):
    """The line that serves a released language model, to be run in vLLM's own environment.

    weights: bf16, fp8, int8 (made while loading) or int4 (the folder must be so). more: flags of
    vLLM, with _ for -; True for one without a value, None for none. Raises ValueError for heads or
    4-bit groups that the GPUs cannot share, or a folder of another format."""
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
    stages = more.get("pipeline_parallel_size") or 1
    card = parse_gpus("H100-80")[0]
    check_ranks(Setup(name, backbone, card, gpus, weights, group, nodes=stages))
    flags = {
        "port": port, "tensor-parallel-size": gpus, "dtype": "bfloat16",
        "quantization": FORMATS.get(weights), "max-model-len": min(max_len, backbone.max_seq_len),
        "attention-backend": ATTENTION, "hf-overrides": json.dumps(overrides(config)),
        "generation-config": "vllm", "logits-processors": PROCESSOR, "max-logprobs": LISTED,
        **{flag.replace("_", "-"): value for flag, value in more.items()},
        "skip-tokenizer-init": True,
    }  # fmt: skip
    words = ["vllm", "serve", str(folder)]
    for flag, value in flags.items():
        if value is not None:
            words += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    return shlex.join(words)


def serve_lines(folder, gpus=1, weights=None, *, nodes=1, copies=1, ray=False, head=HEAD, **more):
    """[(number of the machine, line)]: all that has to be typed, on one machine or on several.

    gpus: that share a layer (tensor parallel), on each machine; weights: by default what the folder
    holds. nodes: machines in a row, each with a part of the layers (pipeline parallel), by vLLM's
    own processes or, if asked, by Ray. copies: of the model (data parallel), each on GPUs of its
    own, behind one address; with several nodes each machine holds as many. head: address of machine
    0. Raises ValueError as serve_command, and for copies that do not divide among the machines."""
    if weights is None:
        weights = read_model(str(folder))[2].get("weights", "bf16")
    if copies > 1 and copies % nodes:
        raise ValueError(f"{nodes} machines cannot hold {copies} copies evenly: give a multiple of "
                         "--nodes, or start each copy that fills several as a server of its own.")
    started = []
    if ray:
        started = [(0, f"ray start --head --port {RAY_PORT}")]
        started += [(i, f"ray start --address {head}:{RAY_PORT} --block") for i in range(1, nodes)]
    # Flags that every line has; those of lines that start machine by machine, without Ray; those in
    # which the line of each machine differs.
    backend = "ray" if ray else None
    if copies > 1:
        local = copies // nodes
        shared = {"data_parallel_size": copies, "data_parallel_backend": backend,
                  "data_parallel_size_local": local if nodes > 1 else None}  # fmt: skip
        apart = {"data_parallel_address": head, "data_parallel_rpc_port": COPIES_PORT}
        # a start rank on machine 0 would ask for a balancer of requests outside vLLM
        own = [{}, *({"data_parallel_start_rank": rank * local} for rank in range(1, nodes))]
    else:
        shared = {"pipeline_parallel_size": nodes if nodes > 1 else None,
                  "distributed_executor_backend": backend}  # fmt: skip
        apart = {"nnodes": nodes, "master_addr": head, "distributed_executor_backend": "mp"}
        own = [{"node_rank": rank} for rank in range(nodes)]
    if nodes == 1 or ray:  # one line for all: Ray starts what the other machines need
        return [*started, (0, serve_command(folder, gpus, weights, **shared, **more))]
    lines = [{**shared, **apart, **one, **more, "headless": bool(rank) or None}
             for rank, one in enumerate(own)]  # fmt: skip
    return list(enumerate(serve_command(folder, gpus, weights, **line) for line in lines))


def main(args):
    """`aqaa plan FOLDER --serve`; args: model, gpus, weights, nodes, copies, ray, context."""
    asked = [parse_gpus(text)[1] for text in args.gpus] or [1]
    if len(asked) > 1:
        raise ValueError("several sets of GPUs cannot be one server: name one with --gpus.")
    lines = serve_lines(args.model, asked[0], args.weights, nodes=args.nodes, copies=args.copies,
                        ray=args.ray, max_len=max(args.context, 8192))  # fmt: skip
    if args.json:
        return print(json.dumps([{"machine": number, "line": line} for number, line in lines]))
    several = args.nodes > 1
    for number, line in lines:
        place = f"on machine {number}, " if several else ""
        print(f"# {place}in vLLM's environment\n{line}")
    print("# beside it, for each listener: tokenizers and vocoder, which need no vLLM")
    host = HEAD if several else "127.0.0.1"
    print(f"aqaa ask QUESTION.wav --stream --engine http://{host}:8000")


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
