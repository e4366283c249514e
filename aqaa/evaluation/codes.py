"""Are the codes healthy, and do the two streams help each other?

Usage: how many codes occur, and how evenly (perplexity). Streams: the paper's reason for two codebooks is that the
next token is easier to predict when linguistic and semantic tokens are interleaved than for either alone (AQAA paper
2.1, after Step-Audio 3.1). `streams` repeats that with one small language model trained three times, on the same
utterances in the same order.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import trange

from aqaa.config import LINGUISTIC_PER_GROUP, SEMANTIC_PER_GROUP, BackboneConfig
from aqaa.corpus.codes import usage

START = 0  # the id before the first code; linguistic codes follow it, then semantic ones
IGNORED = -1
STEPS = 3000  # of 24 utterances each: about two passes
TINY = dict(hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_attention_groups=1)
KINDS = ("linguistic", "semantic")
ARRANGEMENTS = ("linguistic", "semantic", "interleaved")


def arrange(linguistic, semantic, how, n_linguistic):
    """Codes of one utterance as ids of the small model, START first: (1 + N,) int64.

    how: "linguistic" or "semantic" takes one stream, "interleaved" both, 2:3. All three cover the same groups.
    """
    groups = min(len(linguistic) // LINGUISTIC_PER_GROUP, len(semantic) // SEMANTIC_PER_GROUP)
    first = 1 + np.asarray(linguistic[: groups * LINGUISTIC_PER_GROUP], dtype=np.int64)
    second = 1 + n_linguistic + np.asarray(semantic[: groups * SEMANTIC_PER_GROUP], dtype=np.int64)
    both = np.concatenate([first.reshape(groups, -1), second.reshape(groups, -1)], axis=1).reshape(-1)
    return np.concatenate([[START], {"linguistic": first, "semantic": second, "interleaved": both}[how]])


def streams(train, test, n_linguistic, n_semantic, *, steps=300, batch=24, lr=3e-3, seed=0, device="cpu", quiet=False):
    """Perplexity of the next code on `test` after training the same small model on each arrangement of `train`.

    train, test: lists of (linguistic (2G,), semantic (3G,)) code arrays. Returns {arrangement: {kind: perplexity}} and,
    under "change", the relative change of each kind from alone to interleaved (negative: interleaving helps). At every
    position only codes of the right kind compete, so the alternation itself earns nothing.
    """
    if not train or not test:
        raise ValueError("streams needs utterances to train on and others to test on")
    result = {}
    for how in ARRANGEMENTS:
        rows = [arrange(*pair, how, n_linguistic) for pair in train]
        model = _train(rows, n_linguistic, n_semantic, steps, batch, lr, seed, device, None if quiet else how)
        held_out = [arrange(*pair, how, n_linguistic) for pair in test]
        result[how] = _perplexity(model, held_out, n_linguistic, batch, device)
    result["change"] = {kind: result["interleaved"][kind] / result[kind][kind] - 1 for kind in KINDS}
    return result


def _train(rows, n_linguistic, n_semantic, steps, batch, lr, seed, device, label):
    from aqaa.backbone.step1 import Step1Config, Step1ForCausalLM

    torch.manual_seed(seed)
    config = BackboneConfig(vocab_size=1 + n_linguistic + n_semantic, max_seq_len=4096, **TINY)
    model = Step1ForCausalLM(Step1Config(**vars(config))).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.1)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.05)
    rng = np.random.default_rng(seed)
    for _ in trange(steps, desc=f"small model, {label}", disable=label is None, leave=False):
        chosen = [rows[i] for i in rng.choice(len(rows), min(batch, len(rows)), replace=False)]
        losses = _losses(model, chosen, n_linguistic, device)
        loss = torch.cat(list(losses.values())).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
    return model.eval()


@torch.no_grad()
def _perplexity(model, rows, n_linguistic, batch, device):
    """{kind: perplexity} over all rows, each code weighing the same; kinds that do not occur are left out."""
    total = {kind: [] for kind in KINDS}
    for start in range(0, len(rows), batch):
        for kind, loss in _losses(model, rows[start : start + batch], n_linguistic, device).items():
            total[kind].append(loss.cpu())
    return {kind: float(torch.cat(parts).mean().exp()) for kind, parts in total.items() if parts}


def _losses(model, rows, n_linguistic, device):
    """{kind: (N,) negative log-likelihood in nats} of every code, the softmax running over codes of its kind."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), IGNORED)  # (B, T)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = torch.from_numpy(values)
    ids = ids.to(device)
    inputs = ids[:, :-1].clamp_min(0)  # causal: padding on the right changes nothing
    logits = model(input_ids=inputs, use_cache=False).logits.float()
    target, edge = ids[:, 1:], 1 + n_linguistic
    masks = {"linguistic": (target > START) & (target < edge), "semantic": target >= edge}
    ranges = {"linguistic": (1, edge), "semantic": (edge, logits.shape[-1])}
    return {
        kind: F.cross_entropy(logits[mask][:, slice(*ranges[kind])], target[mask] - ranges[kind][0], reduction="none")
        for kind, mask in masks.items()
        if mask.any()
    }


def main(args):
    """`aqaa bench codes`: codebook use of both tokenizers, and next-code perplexity alone and interleaved.

    The codes are those that lie beside the weights, of every utterance of the training run; the test is on questions
    that training never heard.
    """
    from aqaa import files, loading, records
    from aqaa.corpus.codes import load_codes
    from aqaa.corpus.plan import plan
    from aqaa.records import about

    model = loading.load(args.preset, device=args.device)
    beside = files.data_folder() if args.preset == "mini" else Path(args.preset).parent
    items = [item for item in plan(seed=args.seed) if item.role != "answer"]
    pairs = list(zip(items, load_codes(beside / "codes", items), strict=True))
    train = [pair for item, pair in pairs if item.split == "train"]
    test = [pair for item, pair in pairs if item.split == "eval"][: args.limit]
    sizes = (model.ids.n_linguistic, model.ids.n_semantic)
    result = {kind: usage([pair[i] for pair in train + test], sizes[i]) for i, kind in enumerate(KINDS)}
    result |= {"utterances": len(train), "test_utterances": len(test), "steps": STEPS}
    result["next_code_perplexity"] = streams(train, test, *sizes, steps=STEPS, seed=args.seed, device=args.device)
    result = {**about("codes", args.device), **result}
    records.report(args, result, [f"{name:24} {value}" for name, value in result.items()])
