"""`aqaa bench codes`: are the codes healthy, and do the two streams help each other?

The paper's reason for two codebooks is that the next token is easier to predict when linguistic and
semantic tokens are interleaved than for either alone (AQAA paper 2.1, after Step-Audio 3.1).
`streams` repeats that with one small language model trained three times, on the same utterances in
the same order."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange

from aqaa import files
from aqaa.config import LINGUISTIC_PER_GROUP, SEMANTIC_PER_GROUP, BackboneConfig
from aqaa.corpus.codes import load_codes, usage
from aqaa.corpus.plan import plan

START = 0  # the id before the first code; linguistic codes follow it, then semantic ones
IGNORED = -1
STEPS = 3000  # of 24 utterances each: about two passes
TINY = dict(hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_attention_groups=1, max_seq_len=4096)  # fmt: skip
KINDS = ("linguistic", "semantic")
ARRANGEMENTS = (*KINDS, "interleaved")


def measure(model, preset="mini", device="cpu", seed=0, limit=None):
    """Codebook use of both tokenizers of an AQAA, and next-code perplexity alone and interleaved.
    The codes are those that lie beside the weights, of every utterance of the training run; the
    test is on questions that training never heard, `limit` at most."""
    beside = files.data_folder() if preset == "mini" else Path(preset).parent
    items = [item for item in plan(seed=seed) if item.role != "answer"]
    pairs = list(zip(items, load_codes(beside / "codes", items), strict=True))
    train = [pair for item, pair in pairs if item.split == "train"]
    test = [pair for item, pair in pairs if item.split == "eval"][:limit]
    sizes = (model.ids.n_linguistic, model.ids.n_semantic)
    use = {kind: usage(*codes) for kind, *codes in zip(KINDS, zip(*train, *test), sizes)}
    perplexity = streams(train, test, *sizes, steps=STEPS, seed=seed, device=device)
    counts = {"utterances": len(train), "test_utterances": len(test), "steps": STEPS}
    return {**use, **counts, "next_code_perplexity": perplexity}


def arrange(linguistic, semantic, how, n_linguistic):
    """Codes of one utterance as ids of the small model, START first: (1 + N,) int64. how:
    "linguistic" or "semantic" takes one stream, "interleaved" both, 2:3, over the same groups."""
    groups = min(len(linguistic) // LINGUISTIC_PER_GROUP, len(semantic) // SEMANTIC_PER_GROUP)
    first = 1 + np.asarray(linguistic[: groups * LINGUISTIC_PER_GROUP], dtype=np.int64)
    second = np.asarray(semantic[: groups * SEMANTIC_PER_GROUP], dtype=np.int64) + 1 + n_linguistic
    both = np.concatenate([first.reshape(groups, -1), second.reshape(groups, -1)], axis=1)
    codes = {"linguistic": first, "semantic": second, "interleaved": both.reshape(-1)}
    return np.concatenate([[START], codes[how]])


def streams(
    train, test, n_linguistic, n_semantic, *, steps=300, batch=24, lr=3e-3, seed=0, device="cpu",
    quiet=False,
):  # fmt: skip
    """Perplexity of the next code on `test` after training one small model on each arrangement.

    train, test: lists of (linguistic (2G,), semantic (3G,)) code arrays. Returns {arrangement:
    {kind: perplexity}} and, under "change", the relative change of each kind from alone to
    interleaved (negative: interleaving helps). At every position only codes of the right kind
    compete, so the alternation itself earns nothing. Raises ValueError for no utterances."""
    if not train or not test:
        raise ValueError("streams needs utterances to train on and others to test on")
    result = {}
    for how in ARRANGEMENTS:
        rows = [arrange(*pair, how, n_linguistic) for pair in train]
        label = None if quiet else how
        model = _train(rows, n_linguistic, n_semantic, steps, batch, lr, seed, device, label)
        held_out = [arrange(*pair, how, n_linguistic) for pair in test]
        result[how] = _perplexity(model, held_out, n_linguistic, batch, device)
    both = result["interleaved"]
    result["change"] = {kind: both[kind] / result[kind][kind] - 1 for kind in KINDS}
    return result


def _train(rows, n_linguistic, n_semantic, steps, batch, lr, seed, device, label):
    from aqaa.backbone import step1

    torch.manual_seed(seed)
    config = BackboneConfig(vocab_size=1 + n_linguistic + n_semantic, **TINY)
    model = step1.build(config).to(device).train()
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
    """{kind: perplexity} over all rows, each code weighing the same; absent kinds are left out."""
    total = {kind: [] for kind in KINDS}
    for start in range(0, len(rows), batch):
        losses = _losses(model, rows[start : start + batch], n_linguistic, device)
        for kind, loss in losses.items():
            total[kind].append(loss.cpu())
    return {kind: float(torch.cat(parts).mean().exp()) for kind, parts in total.items() if parts}


def _losses(model, rows, n_linguistic, device):
    """{kind: (N,) negative log-likelihood in nats} of every code among the codes of its kind."""
    rows = [torch.from_numpy(row) for row in rows]
    ids = pad_sequence(rows, True, IGNORED).to(device)  # (B, T)
    inputs = ids[:, :-1].clamp_min(0)  # causal: padding on the right changes nothing
    logits = model(input_ids=inputs, use_cache=False).logits.float()  # (B, T - 1, V)
    target, edge = ids[:, 1:], 1 + n_linguistic
    losses = {}
    for kind, low, high in (("linguistic", 1, edge), ("semantic", edge, logits.shape[-1])):
        mask = (target >= low) & (target < high)
        if mask.any():
            scores = logits[mask][:, low:high]
            losses[kind] = F.cross_entropy(scores, target[mask] - low, reduction="none")
    return losses
