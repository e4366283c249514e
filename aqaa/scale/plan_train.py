"""What training a backbone needs on given GPUs, from first principles; `aqaa plan --train METHOD`.

As `aqaa train full` does it. full: all weights learn, by AdamW in mixed precision: weights, their
gradients and two moments in fp32, multiplied in bf16. lora: small fp32 matrices, whole on every
GPU, beside frozen bf16 weights. qlora: the same beside int4 that every GPU holds whole. What can be
is shared by all GPUs (FSDP2) and gathered a layer at a time; inputs of layers are kept, what is
inside is computed again. Preference training reads two rows for each of these. No torch here."""

from dataclasses import dataclass, replace

from aqaa.backbone import memory
from aqaa.scale import plan as sums

METHODS = {"full": "bf16", "lora": "bf16", "qlora": "int4"}  # and how what is frozen is stored
FP32, MOMENTS = 4, 8  # bytes of a weight that learns, as many of its gradient; of two moments
USUAL = {"full": (("8xH100-80", 1), ("8xH100-80", 4), ("8xH100-80", 5), ("8xH200", 2)),
         "lora": (("8xH100-80", 1), ("8xH100-80", 4)), "qlora": (("1xH200", 1),)}  # fmt: skip
COLUMNS = ("method", "GPUs", "nodes", "learn", "weights", "gradients", "moments", "gathered",
           "activations", "logits", "GiB each", "spare", "ids/s at most")  # fmt: skip


@dataclass(frozen=True)
class Training:
    """A method on nodes of `count` GPUs each, with rows of `context` ids on every GPU at a time."""

    method: str
    setup: sums.Setup  # its weights, group and listeners do not count
    rows: int = 1
    rank: int = 16  # of the small matrices

    @property
    def gpus(self):
        return self.setup.count * self.setup.nodes


def widths(backbone):
    """(of the stream, inside the feed-forward layer, of the keys that groups of heads share)."""
    width = backbone.hidden_size
    shared = width // backbone.num_attention_heads * backbone.num_attention_groups
    return width, backbone.intermediate_size, shared


def learning(backbone, method, rank):
    """How many weights learn: all, or two matrices of `rank` beside each linear layer."""
    if method == "full":
        return int(memory.resident_bytes(backbone, "bf16")) // 2
    width, inner, shared = widths(backbone)
    sides = 2 * (width + width) + 2 * (width + shared) + 3 * (width + inner)  # q o, k v, the rest
    return backbone.num_hidden_layers * rank * sides


def inside_layer(backbone, rows, ids):
    """Bytes that one layer keeps for its gradient, bf16, and the distance bias (rows, H, T, T) in
    fp32 and bf16 that all layers share."""
    width, inner, shared = widths(backbone)
    # Streams and their norms, also in fp32 (14 widths), keys and values, gate, up, both products.
    values = rows * ids * (14 * width + 2 * shared + 4 * inner)
    return 2 * values, 6 * rows * backbone.num_attention_heads * ids**2


def parts(training):
    """{part: bytes} of each GPU. Raises ValueError for a method or a row that cannot be."""
    setup, rows = training.setup, training.rows
    backbone, ids, gpus = setup.backbone, setup.context, training.gpus
    if training.method not in METHODS:
        raise ValueError(f"there is no method {training.method!r}: choose {', '.join(METHODS)}.")
    if not 0 < ids <= backbone.max_seq_len:
        raise ValueError(f"rows of {ids} ids are impossible: the model takes 1 to "
                         f"{backbone.max_seq_len}.")  # fmt: skip
    learn, whole = learning(backbone, training.method, training.rank), training.method == "full"
    frozen = METHODS[training.method]
    group = sums.largest_group(backbone, 1) if frozen == "int4" else None
    held = FP32 * learn if whole else memory.resident_bytes(backbone, frozen, group)
    shared = 1 if frozen == "int4" else gpus
    layer = memory.linear_bytes(backbone, "bf16") / backbone.num_hidden_layers
    # FSDP2 gathers the next layer while one works; the tables stay gathered from head to tail.
    gathered = 2 * layer + 2 * memory.table_bytes(backbone) if shared > 1 else 0
    if frozen == "int4":
        gathered = backbone.hidden_size * backbone.intermediate_size * 2  # a matrix, unpacked
    if whole and gpus > 1:  # gradients, before they are summed and shared
        gathered += layer + 2 * memory.table_bytes(backbone)
    inside, bias = inside_layer(backbone, rows, ids)
    streams = backbone.num_hidden_layers * rows * ids * backbone.hidden_size * 2
    own = learn / gpus if whole else learn
    return {
        "weights": held / shared + (0 if whole else FP32 * learn),
        "gradients": FP32 * own,
        "moments": MOMENTS * own,
        "gathered": gathered,
        "activations": streams + inside + bias,
        "logits": rows * ids * backbone.vocab_size * (2 + 4 + 4),  # bf16, fp32, their gradient
        "reserved": sums.RESERVED * memory.GIB,
    }


def ids_per_second(training):
    """What all GPUs together could read at the peak of their tensor cores: each weight multiplies
    twice an id forward and twice when it is computed again, twice more for the gradient of what
    came in and, where it learns, twice for its own."""
    setup = training.setup
    products = memory.n_linear(setup.backbone)[0] + memory.table_bytes(setup.backbone) / 2
    times = 8 if training.method == "full" else 6
    return training.gpus * setup.gpu.bf16 * 1e12 / (times * products)


def to_dict(training):
    """The plan of a Training as JSON wants it; sizes in GiB of each GPU."""
    setup = training.setup
    sizes = {name: size / memory.GIB for name, size in parts(training).items()}
    total = sum(sizes.values())
    return {
        "model": setup.model, "method": training.method, "gpus": setup.gpus, "nodes": setup.nodes,
        "rows": training.rows, "context": setup.context,
        "learn": learning(setup.backbone, training.method, training.rank),
        "memory": {name: round(size, 3) for name, size in sizes.items()}, "total": round(total, 3),
        "spare": round(setup.gpu.memory - total, 3), "fits": total <= setup.gpu.memory,
        "rate": None, "ceiling": round(ids_per_second(training), 1),
    }  # fmt: skip


def table(planned):
    """Plans of to_dict as lines of text."""
    first = planned[0]
    lines = [COLUMNS]
    for one in planned:
        sizes = [f"{one['memory'][name]:.1f}" for name in COLUMNS[4:10]]
        pace = f"{one['ceiling']:,.0f}" if one["fits"] else "does not fit"
        lines.append((one["method"], one["gpus"], str(one["nodes"]), f"{one['learn']:,}", *sizes,
                      f"{one['total']:.1f}", f"{one['spare']:.1f}", pace))  # fmt: skip
    return f"""\
{first['model']}, {first['rows']} x {first['context']} ids on each GPU at a time; parts in GiB.
{sums.aligned(lines)}
learn: weights that change. gathered: of other GPUs' shares. ids/s at most: all GPUs at the peak of
their tensor cores; what is reached was not measured. Preference training takes two rows for one."""


def what_would_fit(training):
    """A sentence: how many such nodes would do, or that they would not."""
    setup = training.setup
    for nodes in range(setup.nodes, 65):
        more = replace(training, setup=replace(setup, nodes=nodes))
        if sum(parts(more).values()) <= setup.gpu.memory * memory.GIB:
            return f"{training.method} on {nodes} nodes of {setup.gpus} would fit."
    return f"no number of {setup.gpus} is enough for {training.method}: take fewer ids in a row."
