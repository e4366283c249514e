"""Products in three of bf16: the rule in plain torch everywhere, the matrix units where the processor has them."""

import os
import stat
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aqaa import cli, files, loading
from aqaa.fast import amx, prepared
from tests.parity import common
from tests.parity.__main__ import main as parity

try:
    amx.compiled()
    HERE = True
except ValueError:
    HERE = False
on_the_units = pytest.mark.skipif(not HERE, reason="needs a processor with AMX and a C compiler")


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(k, n, bias=True, seed=0):
    made = nn.Linear(k, n, bias)
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=seed + i))
    return made


def product(x, weight):
    """x (M, K), weight (N, K) -> x Wᵀ (M, N): what `amx.c` computes, in plain torch."""
    x_hi, x_lo = (half.float() for half in amx.halves(x))
    w_hi, w_lo = (half.float() for half in amx.halves(weight))
    return x_hi @ w_lo.T + x_lo @ w_hi.T + x_hi @ w_hi.T


def error(found, wanted):
    return float((found - wanted).detach().norm() / wanted.detach().norm())


def test_two_bf16_hold_16_bits_of_a_float():
    x = noise(10_000) * torch.logspace(-20, 20, 10_000)
    hi, lo = amx.halves(x)
    assert hi.dtype == lo.dtype == torch.bfloat16
    assert ((hi.double() + lo.double() - x.double()).abs() <= x.double().abs() * 2.0**-17).all()


def test_three_products_are_a_hundred_times_closer_than_one():
    x, weight = noise(40, 256), noise(64, 256, seed=1)
    exact = x.double() @ weight.double().T
    one = error(x.bfloat16().double() @ weight.bfloat16().double().T, exact)
    assert error(product(x, weight).double(), exact) < 1e-5 < one / 100


def test_tiles_hold_every_weight_once():
    weight = torch.arange(64 * 96, dtype=torch.float32).view(64, 96) + 1
    whole = amx.tiles(weight).float().sum(2)  # hi + lo: exact, these numbers are small
    assert sorted(whole.flatten().tolist()) == sorted(weight.flatten().tolist())
    panel, step, half, pair, row, which = 1, 2, 0, 3, 4, 1
    assert whole[panel, step, half, pair, row, which] == weight[32 * panel + row, 32 * step + 2 * pair + which]


@on_the_units
@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 200), k=st.integers(1, 12), n=st.integers(1, 6), bias=st.booleans(), seed=st.integers(0, 99),
    threads=st.integers(1, 3), cache=st.sampled_from([1, 2**15, 2**19]), apart=st.integers(0, 3),
)  # fmt: skip
def test_the_units_compute_the_rule(m, k, n, bias, seed, threads, cache, apart):
    """Whatever the sizes, the blocks of rows, the threads, and the distance of rows in memory."""
    x, plain, before = noise(m, 32 * k + apart, seed=seed)[:, : 32 * k], layer(32 * k, 32 * n, bias), amx.CACHE
    wanted = product(x, plain.weight) + (plain.bias if bias else 0)
    had = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        amx.CACHE = cache
        with torch.no_grad():
            found = amx.use(plain)(x)
    finally:
        amx.CACHE = before
        torch.set_num_threads(had)
    assert found.shape == wanted.shape and error(found, wanted) < 1e-6


@on_the_units
def test_a_row_is_the_same_in_any_company():
    fast, x = amx.use(layer(96, 64)), noise(3, 50, 96)
    with torch.no_grad():
        whole = fast(x)
        assert torch.equal(torch.cat([fast(x[:, :7]), fast(x[:, 7:])], 1), whole)
        assert torch.equal(fast(x.mT.contiguous().mT), whole)  # values of a row apart in memory
        assert torch.equal(fast(x[1, 4]), whole[1, 4]) and fast(x[:0]).shape == (0, 50, 64)


@on_the_units
def test_elsewhere_it_is_a_plain_layer():
    plain, fast, x = layer(64, 32), amx.use(layer(64, 32)), noise(5, 64)
    assert torch.equal(fast(x), plain(x))  # gradients are on
    fast(x).sum().backward()
    assert fast.weight.grad is not None
    with torch.no_grad():
        assert torch.equal(fast.bfloat16()(x.bfloat16()), plain.bfloat16()(x.bfloat16()))


@on_the_units
def test_new_weights_are_noticed():
    fast, x = amx.use(layer(64, 32)), noise(5, 64)
    with torch.no_grad():
        fast(x)
        fast.load_state_dict(layer(64, 32, seed=5).state_dict())
        other = layer(64, 32, seed=5)
        assert error(fast(x), other(x)) < 1e-5


@on_the_units
def test_only_layers_that_fit_are_taken_and_names_stay():
    part = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 33), nn.Linear(33, 32), nn.Conv1d(32, 32, 3))
    names = list(part.state_dict())
    prepared.prepare(part, amx=True)
    assert [type(one) for one in part] == [amx.AmxLinear, nn.Linear, nn.Linear, nn.Conv1d]
    assert list(part.state_dict()) == names


@on_the_units
def test_the_golden_tensors(capsys, monkeypatch):
    monkeypatch.setattr(common, "AMX", False)  # puts the usual way back, whatever main sets
    golden = Path(__file__).parent / "parity" / "golden" / "speech"
    assert parity(["--amx", str(golden)]) == 0, capsys.readouterr().out


@on_the_units
def test_a_model_hears_and_speaks_the_same(tmp_path, capsys):
    question = files.data_folder() / "questions" / "product_q001959.wav"
    plain, fast = (loading.load("mini", amx=on).ask(question, seed=3) for on in (False, True))
    assert plain.tokens == fast.tokens
    assert (plain.audio - fast.audio).abs().max() < 0.02
    assert cli.main(["ask", str(question), "--amx", "-o", str(tmp_path / "a.wav")]) == 0
    assert (tmp_path / "a.wav").stat().st_size > 10_000


# ---- machines that cannot -------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing compiled yet, and a processor that could."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(amx, "cpuinfo", lambda name: " ".join(amx.NEEDED))
    amx.compiled.cache_clear()
    yield tmp_path
    amx.compiled.cache_clear()


def test_another_processor_is_told_so(monkeypatch, capsys, fresh):
    monkeypatch.setattr(amx, "cpuinfo", lambda name: "avx2")
    question = files.data_folder() / "questions" / "product_q001959.wav"
    assert cli.main(["ask", str(question), "--amx"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("aqaa: this processor has no AMX") and said.count("\n") == 1
    with pytest.raises(files.ModelError, match="a part of processors"):
        loading.load("mini", device="meta", amx=True)


@pytest.mark.parametrize("body, why", [
    (None, "is none"),
    ("echo 'amx.c:1: error: such a day' >&2; exit 1", "such a day"),
    ("exit 1", "no reason"),
])
def test_without_a_compiler_one_sentence(monkeypatch, fresh, body, why):
    compiler = fresh / "compiler"
    if body:
        compiler.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(ValueError, match=why):
        amx.compiled()
    assert not [path for path in (fresh / "cache").rglob("*") if path.is_file()]


@on_the_units
def test_it_is_compiled_once(fresh, monkeypatch):
    amx.compiled()
    (made,) = (fresh / "cache" / "aqaa").iterdir()
    amx.compiled.cache_clear()
    monkeypatch.setattr(amx.subprocess, "run", None)
    amx.compiled()
    assert made.suffix == ".so"


# ---- the cache ------------------------------------------------------------------------------------------------------

PLANTED = """
#include <stdlib.h>
__attribute__((constructor)) void run(void) { system("touch %s"); }
int allowed(void) { return 1; }
void linear(void) {}
"""


def works():
    """A product by the code that is loaded now."""
    amx.compiled.cache_clear()
    fast, x = amx.use(layer(64, 32)), noise(5, 64)
    with torch.no_grad():
        return error(fast(x), layer(64, 32)(x)) < 1e-5


@on_the_units
@pytest.mark.parametrize("data", [b"", b"junk", None])
def test_a_damaged_cache_is_compiled_again(fresh, data):
    assert works()
    (made,) = (fresh / "cache" / "aqaa").iterdir()
    whole = made.read_bytes()
    made.unlink()  # this process goes on using the old one
    made.write_bytes(whole[: len(whole) // 2] if data is None else data)
    made.chmod(0o700)
    assert works() and made.read_bytes() == whole


@on_the_units
@pytest.mark.parametrize("file, folder, owner", [
    (0o777, 0o777, True), (0o770, 0o770, False), (0o722, 0o700, False), (0o700, 0o700, True), (0o700, 0o777, True),
])  # fmt: skip
def test_code_that_somebody_else_may_have_written_is_not_run(fresh, file, folder, owner):
    """owner: the file belongs to another user, where this one may say so."""
    path, mark = amx._shared_object(), fresh / "mark"
    (fresh / "planted.c").write_text(PLANTED % mark, encoding="utf-8")
    path.unlink()
    command = ["cc", "-shared", "-fPIC", "-w", "-o", str(fresh / "planted.so"), str(fresh / "planted.c")]
    subprocess.run(command, check=True)
    data = (fresh / "planted.so").read_bytes()
    path = path.with_stem(path.stem.rpartition("-")[0] + "-" + amx._hash(data))  # whole, by its name
    path.write_bytes(data)
    path.chmod(file)
    path.parent.chmod(folder)
    if owner and os.geteuid() == 0:
        os.chown(path, 65534, 65534)
    elif owner:
        path.chmod(0o777)
    assert works() and not mark.exists()
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    kept = [one for one in path.parent.iterdir() if one != path]
    assert [stat.S_IMODE(one.stat().st_mode) for one in kept] == [0o700]


@on_the_units
@pytest.mark.parametrize("place", ["/proc/nowhere", "file", "another's"])
def test_where_nothing_can_be_kept_it_is_compiled_for_this_process(fresh, monkeypatch, place):
    (fresh / "file").write_text("", encoding="utf-8")
    home = fresh / place
    if place == "another's":
        (home / "aqaa").mkdir(parents=True)
        (home / "aqaa").chmod(0o777)
        monkeypatch.setattr(amx.os, "getuid", lambda: 4711)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    assert works()
    assert place != "another's" or not list((home / "aqaa").iterdir())
    assert amx._private().stat().st_mode & 0o077 == 0
