"""Run as `python -m tests.two_processes FOLDER` with the variables of torchrun set: what test_parallel.py looks at.

FOLDER holds a model; rank 0 writes found.pt with the logits and greedy answers of each way to share it.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from aqaa.backbone import step1  # noqa: F401  registers the model
from aqaa.fast.graph_decoder import Engine
from aqaa.scale import parallel
from aqaa.scale.quantize import quantize_
from tests.test_parallel import GROUP, IDS, LAYOUT, PROMPT, greedy


@torch.inference_mode()
def main(folder):
    torch.set_num_threads(1)
    rank, ranks, _ = parallel.join("cpu")
    ids, found = torch.tensor([PROMPT]), {}
    shared = parallel.load(folder, ranks)
    found["transformers"] = shared(ids).logits, greedy(shared, ids)
    for name in ("ours", "int4"):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        parallel.shard(quantize_(model, "int4", GROUP) if name == "int4" else model, rank, ranks)
        steps = Engine(model, 100).generate(PROMPT, IDS, LAYOUT, temperature=0.0, max_tokens=20)
        found[name] = model(ids).logits, [step.id for step in steps]
    assert model.model.layers[0].self_attn.q_proj.qweight.shape[0] == 96 * 8 // ranks
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")


if __name__ == "__main__":
    main(sys.argv[1])
