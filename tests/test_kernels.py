"""Each kernel, run by Triton's interpreter on the CPU, against its twin in plain torch."""

import subprocess
import sys

import pytest
import torch

import tests.interpreter  # noqa: F401  first: it sets the interpreter up
from aqaa.backbone.attention import slopes
from aqaa.backbone.quantized_linear import Fp8Linear, Int4Linear, Int8Linear
from aqaa.fast import attention_kernels, triton_kernels
from aqaa.fast.graph_decoder import linear


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """Few large programs: the interpreter runs them one by one."""
    monkeypatch.setattr(triton_kernels, "TILE", (128, 32, 1, 1))
    monkeypatch.setattr(triton_kernels, "SUMS", 1024)


@pytest.fixture
def exact(monkeypatch):
    """Activations of three digits: as good as fp32."""
    monkeypatch.setattr(triton_kernels, "DIGITS", 3)


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found, wanted, limit=1e-5):
    assert (found - wanted).abs().max() <= limit * wanted.abs().max()


def attention_inputs(batch, n_query, heads, groups, width, size, first, dtype=torch.float32):
    query = noise(batch, n_query, heads, width, dtype=dtype)
    keys, values = (noise(batch, groups, size, width, seed=seed, dtype=dtype) for seed in (1, 2))
    return query, keys, values, slopes(heads), torch.tensor([first]), width**-0.5


@pytest.mark.parametrize(
    "sizes, splits",
    [
        ((1, 1, 12, 1, 16, 100, 70), None),  # more runs than keys: most are empty
        ((1, 1, 96, 8, 16, 40, 36), 4),  # as in the published model, narrower
        ((2, 1, 12, 2, 64, 300, 256), 4),
        ((1, 1, 6, 2, 16, 8, 0), 2),  # the very first id
        ((1, 23, 12, 2, 16, 100, 41), None),  # part of a prompt: tiles of several queries, causal
    ],
)
def test_attention(sizes, splits):
    inputs = attention_inputs(*sizes)
    close(attention_kernels.attend(*inputs, splits=splits), attention_kernels.attend_eager(*inputs))


def test_attention_in_half_precision_and_in_fp32_for_the_next_product():
    inputs = attention_inputs(2, 1, 12, 2, 16, 90, 77, dtype=torch.float16)
    wide = (x.float() if x.is_floating_point() else x for x in inputs[:-1])
    wanted = attention_kernels.attend_eager(*wide, inputs[-1])
    close(attention_kernels.attend(*inputs).float(), wanted, 2e-3)
    out = torch.empty(2, 12 * 16)
    attention_kernels.attend(*inputs, out=out)
    close(out, wanted.reshape(2, -1), 2e-3)


def test_attention_sees_nothing_beyond_the_newest_id():
    query, keys, values, *others = attention_inputs(1, 3, 12, 1, 16, 64, 20)
    before = attention_kernels.attend(query, keys, values, *others)
    keys[:, :, 23:], values[:, :, 23:] = torch.nan, torch.nan
    assert torch.equal(attention_kernels.attend(query, keys, values, *others), before)


def test_the_bias_is_exact_at_a_distance_of_32_thousand():
    """Scores are the bias alone; in bf16 it would be off by up to 0.5, a factor of 1.6 in the weights."""
    size = 32_768
    query, keys = torch.zeros(1, 1, 2, 16), torch.zeros(1, 1, size, 16)
    values, slope = noise(1, 1, size, 16), torch.tensor([0.917, 0.0039063])
    out = attention_kernels.attend(query, keys, values, slope, torch.tensor([size - 1]), 0.25, splits=4)
    distance = torch.arange(size - 1, -1, -1, dtype=torch.float64)
    for head, value in enumerate(slope.double()):
        weights = (-value * distance.sqrt()).softmax(0)
        close(out[0, 0, head].double(), weights @ values[0, 0].double(), 2e-6)


def unpacked(packed, group, size):
    """What `pack` made of activations: (B, K), by its docstring."""
    run, (batch, blocks) = min(32, group), packed.shape[:2]
    digits = (packed.shape[2] - 2) * 4 // run
    planes = packed.view(torch.int8).view(batch, blocks, -1, triton_kernels.BLOCK, 4)  # bytes
    codes = sum(planes[:, :, : -2].unflatten(2, (digits, run // 8, 2))[:, :, d].double() * 256 ** (digits - 1 - d)
                for d in range(digits))  # fmt: skip
    codes = codes.permute(0, 1, 4, 2, 5, 3).flatten(3)  # batch, block, run; word, byte, even or odd
    assert torch.equal(packed[:, :, -2].double(), -8 * codes.sum(-1))
    return (codes * packed[:, :, -1].view(torch.float32)[..., None]).flatten(1)[:, :size]


@pytest.mark.parametrize("size, group", [(64, 16), (1088, 32), (1280, 128)])
@pytest.mark.parametrize("digits, step", [(2, 1 / 65_000), (3, 1 / 4e6)])
def test_packed_activations_are_as_exact_as_their_digits(size, group, digits, step, monkeypatch):
    monkeypatch.setattr(triton_kernels, "DIGITS", digits)
    x = noise(3, size) * 10 ** noise(3, size, seed=1)  # large values beside small ones
    x[1, : size // 2] = 0
    largest = x.unflatten(1, (-1, min(32, group))).abs().amax(-1, keepdim=True).expand(-1, -1, min(32, group))
    error = (unpacked(triton_kernels.pack(x, group), group, size) - x).abs()
    assert (error <= 1.01 * step * largest.flatten(1)).all()
    norm = 1 + noise(size, seed=2) / 9
    wanted = torch.nn.functional.rms_norm(x, (size,), norm, 1e-5)
    close(unpacked(triton_kernels.pack(x, group, norm, 1e-5), group, size), wanted, 2 * step)


@pytest.mark.parametrize("outputs, inputs, group, batch", [
    (70, 256, 64, 1), (33, 384, 128, 3), (17, 640, 128, 8), (16, 32, 16, 2), (9, 1152, 128, 1), (12, 1056, 32, 13),
])  # fmt: skip
def test_int4_product(outputs, inputs, group, batch, exact):
    layer, x = Int4Linear.from_weights(noise(outputs, inputs), group), noise(batch, inputs, seed=1)
    close(linear(layer, x), layer(x))
    more = noise(triton_kernels.FEW + 1, inputs, seed=2)
    close(linear(layer, more), layer(more))  # unpacked first
    assert torch.equal(triton_kernels.unpack(layer, torch.float32), layer.dequantized())


@pytest.mark.parametrize("outputs, inputs, group, batch", [(40, 512, 128, 1), (40, 1024, 32, 2), (24, 192, 64, 5)])
def test_two_digits_are_far_finer_than_the_bf16_of_the_model(outputs, inputs, group, batch):
    layer, x = Int4Linear.from_weights(noise(outputs, inputs), group), noise(batch, inputs, seed=1)
    wanted = x.double() @ layer.dequantized(torch.float64).T
    close(linear(layer, x).double(), wanted, 1e-4)
    x[:, 7] *= 1000  # an input that stands out
    close(linear(layer, x).double(), x.double() @ layer.dequantized(torch.float64).T, 1e-4)


def test_every_code_and_every_tile(exact):
    layer = Int4Linear(128, 8, 16)
    layer.qweight.copy_(torch.arange(512).remainder(256).view(8, 64))
    layer.scale.copy_(noise(8, 8))
    x = noise(1, 128)
    try:
        for tile in (*triton_kernels.CANDIDATES, triton_kernels.TILE):
            triton_kernels.TILES["heads", 8, 128] = tile
            close(linear(layer, x), layer(x))
    finally:
        triton_kernels.TILES.clear()


@pytest.mark.parametrize("cls", [Int8Linear, Fp8Linear])
@pytest.mark.parametrize("batch", [1, 5, 9])
def test_products_with_weights_of_a_byte(cls, batch):
    layer, x = cls.from_weights(noise(33, 600)), noise(batch, 600, seed=1)
    close(linear(layer, x), layer(x))
    if cls is Fp8Linear:  # every byte that is a number
        layer = cls(256, 1)
        layer.qweight.copy_(torch.where(torch.arange(256) % 128 == 127, 0, torch.arange(256)))
        layer.scale.fill_(0.5)
        x = torch.eye(256)
        close(torch.cat([linear(layer, row) for row in x.split(8)]), layer(x), 0)


def test_query_key_and_value_in_one_launch(exact):
    group, inputs, (heads, groups, width) = 16, 64, (4, 2, 8)
    layers = [Int4Linear.from_weights(noise(n, inputs, seed=n), group) for n in (heads * width, 16, 16)]
    alone = [layer.dequantized() for layer in layers]
    rows = triton_kernels.Rows(*layers)
    assert all(torch.equal(layer.dequantized(), one) for layer, one in zip(layers, alone))  # views still work
    x, norm, cache = noise(2, inputs), 1 + noise(inputs) / 9, [torch.zeros(2, groups, 5, width) for _ in range(2)]
    packed = triton_kernels.pack(x, group, norm, 1e-5)
    out = rows.multiply("heads", packed, torch.empty(2, heads * width), cache, torch.tensor([3]))
    y = torch.nn.functional.rms_norm(x, (inputs,), norm, 1e-5)
    for found, weight in zip((out, cache[0][:, :, 3].flatten(1), cache[1][:, :, 3].flatten(1)), alone):
        close(found, y @ weight.T)
    assert not cache[0][:, :, [0, 1, 2, 4]].any() and not cache[1][:, :, [0, 1, 2, 4]].any()


def test_gate_and_up_with_their_product_and_the_sum_with_the_residual_stream(exact):
    sizes = ((48, 64), (48, 64), (64, 48))
    gate, up, down = (Int4Linear.from_weights(noise(*size, seed=i) / 8, 16) for i, size in enumerate(sizes))
    x = noise(2, 64)
    wanted = torch.nn.functional.silu(gate(x)) * up(x)
    inner = triton_kernels.Rows(gate, up).multiply("gated", triton_kernels.pack(x, 16), torch.empty(2, 48))
    close(inner, wanted)
    stream = noise(2, 64, seed=5)
    total = stream + down(wanted)
    triton_kernels.Rows(down).multiply("added", triton_kernels.pack(inner, 16), stream)
    close(stream, total)


def test_layers_that_do_not_fit():
    with pytest.raises(ValueError, match="does not fit the kernels"):
        triton_kernels.Rows(Int8Linear.from_weights(noise(8, 32)))
    odd = Int4Linear.from_weights(noise(8, 48), 48)
    assert not triton_kernels.fits(odd)
    assert torch.equal(linear(odd, noise(2, 48)), odd(noise(2, 48)))


def test_kernels_can_be_imported_without_triton():
    code = """
import sys
sys.modules["triton"] = None
from aqaa.fast import graph_decoder
from aqaa.fast import triton_kernels
assert triton_kernels.triton is None and not triton_kernels.usable("cpu") and not triton_kernels.usable("cuda")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


GPU = r"""
import re
import subprocess
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aqaa.fast import triton_kernels
from aqaa.fast import attention_kernels
from aqaa.scale import plan

INTEGER = ("IDP", "LOP3", "SHF", "IADD3", "LEA", "PRMT", "SEL", "ISETP")  # on units that are half as many
POINTERS = {"words": "*i32", "scale": "*bf16", "first": "*i64", "query": "*bf16", "keys": "*bf16", "values": "*bf16",
            "norm": "*bf16", "weight": "*u8"}
NUMBERS = {"n_rows", "n_out", "n_runs", "n_items", "size", "n_query"}
CUOBJDUMP = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")

def build(name, warps=4, types={}, **constants):
    kernel = getattr(triton_kernels, name, None) or getattr(attention_kernels, name)
    kinds = {}
    for argument in kernel.arg_names:
        number = "i32" if argument in NUMBERS else "fp32" if argument == "eps" else None
        kind = types.get(argument) or number or POINTERS.get(argument, "*fp32")
        kinds[argument] = "constexpr" if argument in constants else kind
    aligned = {(i,): [["tt.divisibility", 16]] for i, (argument, kind) in enumerate(kinds.items())
               if kind[0] == "*" or kind == "i32" and argument not in ("n_items", "n_query")}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    Path("kernel.cubin").write_bytes(built.asm["cubin"])
    usage = subprocess.check_output([CUOBJDUMP, "-res-usage", "kernel.cubin"], stderr=subprocess.STDOUT, text=True)
    assert "STACK:0 " in usage and "LOCAL:0 " in usage, (name, constants, usage)
    return built

def loop():
    text = subprocess.check_output([CUOBJDUMP, "-sass", "kernel.cubin"], text=True)
    code = {int(at, 16): line for at, line in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", text)}
    back = {(int(m[1], 16), at) for at, line in code.items() if (m := re.search(r"BRA.*?0x([0-9a-f]+)", line))}
    start, end = max((pair for pair in back if pair[0] < pair[1]), key=lambda pair: pair[1] - pair[0])
    return [line for at, line in code.items() if start <= at <= end]

def as_planned(weights, lane):
    # the planner counts as the loop compiled last has them, for `lane` weights a lane
    lines = [line.split("@")[-1].split() for line in loop()]
    integer = sum(any(word.split(".")[0] in INTEGER for word in line[:2]) for line in lines)
    for found, planned in zip((len(lines), integer), plan.INSTRUCTIONS[weights]):
        assert abs(found / lane - planned) < 0.08 * planned, (weights, found / lane, planned)

def product(kind, tile, most, batch=1, groups=0):
    rows, runs, warps, stages = tile
    others = {"n_items": 1} if batch == 1 else {}  # Triton makes a 1 a constant
    others |= {"WIDTH": 128} if groups else {"WIDTH": 1, "first": None}
    types = {"x": "*i32", "out": "*bf16" if kind == "heads" else "*fp32"}
    built = build("_matrix", warps, types, KIND=kind, GROUP=128, ROWS=rows, RUNS=runs, BATCH=batch, WORDS=4,
                  DIGITS=triton_kernels.DIGITS, STAGES=stages, HEADS=groups, **others)
    a_weight = len(loop()) / (rows * runs // warps)  # a lane multiplies 32 weights of each of its runs
    assert a_weight <= most, f"{kind} {tile} for {batch} rows: {a_weight:.2f} instructions a weight, at most {most}"
    return built.asm["ptx"]

for tile in triton_kernels.CANDIDATES:
    product("added", tile, 2)
product("added", triton_kernels.TILE, 2)
as_planned("int4", 8 * 32)
ptx = product("gated", triton_kernels.TILE, 1.6)
assert ptx.count("evict_first.L2::cache_hint.v4.b32") == 8, "weights are read 16 bytes a thread"
product("heads", triton_kernels.TILE, 1.6, groups=8)
product("heads", triton_kernels.TILE, 4, batch=4)
product("heads", (4, *triton_kernels.TILE[1:]), 8, batch=8)  # one read for eight rows
for x in ("*fp32", "*bf16"):
    build("_pack", 8, {"x": x, "out": "*i32"}, NORM=x == "*fp32", WORDS=4, DIGITS=2, LIMIT=32639.0, COLUMNS=16384)
types = {"scale": "fp32"}
build("_attend", types=types, n_query=1, GROUPS=8, RATIO=12, WIDTH=128, ROWS=16, KEYS=32, SPLITS=32)
build("_attend", types=types, GROUPS=8, RATIO=12, WIDTH=128, ROWS=64, KEYS=32, SPLITS=1)
build("_combine", WIDTH=128, SPLITS=32)
for name, kind in (("fp8", "*u8"), ("int8", "*i8")):
    build("_bytes", 1, {"x": "*bf16", "weight": kind}, SIZE=12288, FP8=name == "fp8", ROWS=4, COLUMNS=512)
    as_planned(name, 4 * 512 // 32)
build("_unpack", types={"out": "*bf16"}, SIZE=12288, GROUP=128, ROWS=4, WIDE=1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the compiler comes with triton, which is made for Linux")
def test_every_kernel_compiles_for_a_gpu_at_the_published_sizes(tmp_path):
    """Down to the instructions of an H100 or H200, which are counted; no GPU is needed for that."""
    import os

    paths = {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    env = {**os.environ, "TRITON_INTERPRET": "0", **paths}
    result = subprocess.run([sys.executable, "-c", GPU], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
