"""What a backbone needs on given GPUs: sums against published tables, verdicts, bad input, recorded runs."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aqaa import cli
from aqaa.backbone import memory
from aqaa.config import BackboneConfig, preset
from aqaa.scale import plan as sums
from aqaa.scale import plan_table as words

ROOT = words.Path(__file__).resolve().parent.parent
B130 = BackboneConfig()

# GPUs, format, least ms by bytes, tokens/s that they allow: worked out by hand for 130 B at 2,048 ids of context; the
# rows of 8 GPUs with int4 count scales of groups of 128.
TABLE = [
    ("1xH200", "fp8", 27.6, 36.2), ("1xH200", "int4", 14.5, 68.9), ("2xH200", "bf16", 27.4, 36.5),
    ("2xH200", "fp8", 13.8, 72), ("2xH200", "int4", 7.3, 138), ("4xH100-80", "bf16", 19.6, 51),
    ("4xH100-80", "fp8", 9.9, 101), ("4xH100-80", "int4", 5.2, 192), ("8xH100-80", "bf16", 9.8, 102),
    ("8xH100-80", "fp8", 5.0, 202), ("8xH100-80", "int4", 2.6, 385), ("8xH200", "bf16", 6.8, 146),
    ("8xH200", "fp8", 3.5, 289), ("8xH200", "int4", 1.8, 551),
]  # fmt: skip
DELAY = {45: (0.84, 1.34, 2.32), 50: (0.68, 1.06, 1.76), 55: (0.55, 0.83, 1.31), 60: (0.47, 0.64, 0.93),
         70: (0.36, 0.36, 0.36)}  # fmt: skip


def one(gpus, weights, **options):
    (setup,) = words.setups("130b", [gpus], weights, **options)
    return sums.plan(setup)


def test_bytes_are_those_of_the_published_model():
    assert memory.resident_bytes(B130, "bf16") == 263_893_180_416  # the total_size of its index
    assert memory.cache_bytes(B130) == 352 * 1024
    sizes = {  # GB: linear layers, everything, what a step reads
        ("bf16", None): (260.2, 263.9, 262.1), ("fp8", None): (130.1, 133.8, 131.9),
        ("int8", None): (130.1, 133.8, 131.9), ("int4", 128): (67.1, 70.8, 68.9),
    }  # fmt: skip
    for how, expected in sizes.items():
        found = (f(B130, *how) / 1e9 for f in (memory.linear_bytes, memory.resident_bytes, sums.streamed_bytes))
        assert list(found) == pytest.approx(expected, abs=0.08), how  # 8 bits: 0.02 of it scales
    assert memory.linear_bytes(B130, "int4", 32) > memory.linear_bytes(B130, "int4", 64)


def test_3b_and_mini_are_counted_as_they_are_built():
    import torch

    from aqaa.backbone import step1

    assert memory.resident_bytes(words.read_model("3b")[1], "bf16") == 7_059_412_992
    mini = preset("mini").backbone
    with torch.device("meta"):
        model = step1.build(mini)
    assert memory.resident_bytes(mini, "bf16") == 2 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]} {row[1]}")
def test_the_feasibility_table(row):
    gpus, weights, least, ceiling = row
    found = one(gpus, weights)
    floor = found.least["bytes"]
    if weights == "int4" and gpus.startswith("8"):
        assert found.setup.group == 64
        floor = sums.least_seconds(replace(found.setup, group=128))["bytes"]  # half as many scales
        assert sums.streamed_bytes(B130, "int4", 64) - sums.streamed_bytes(B130, "int4", 128) == pytest.approx(
            memory.n_linear(B130)[0] / 64
        )
    assert 1000 * floor == pytest.approx(least, abs=0.051) and 1 / floor == pytest.approx(ceiling, abs=0.51)
    assert found.fits and found.rate is None and found.parameters == 131_946_590_208


def test_instructions_by_hand():
    """130.1 B weights, 1.51 instructions each, on 132 multiprocessors of 128 lanes at 1.98 GHz; of them 0.96 on the
    integer units, which are half as many."""
    lanes = 132 * 128 * 1.98e9
    assert one("1xH200", "int4").least["instructions"] == pytest.approx(130.1e9 * 2 * 0.96 / lanes, rel=0.01)
    fp8 = one("1xH200", "fp8")
    assert fp8.least["instructions"] == pytest.approx(130.1e9 * 9.0 / lanes, rel=0.01)
    assert fp8.floor == fp8.least["instructions"] > fp8.least["bytes"] and fp8.ceiling < 30
    old = replace(one("1xH200", "int4").setup, listeners=2)  # another engine's kernels: only their bytes are known
    assert sums.least_seconds(old)["instructions"] == 0 == one("1xMI300X", "int4").least["instructions"]


def test_verdicts_are_of_what_was_measured_or_open():
    slow, open_, fast = (sums.plan(one("1xH200", "int4").setup, sums.Measured("x", share)) if share else
                         one("1xH200", "int4") for share in (0.4, None, 0.7))  # fmt: skip
    assert (slow.steady, open_.steady, fast.steady) == (False, None, True)
    assert (slow.interleave, open_.interleave, fast.interleave) == (False, False, False)  # the ceiling is 68.9
    assert slow.rate == pytest.approx(0.4 * slow.ceiling) and open_.rate is None
    assert slow.first_sound[3] > fast.first_sound[3] > open_.first_sound[3] and slow.delay[10] > open_.delay[10]
    assert open_.to_dict()["rate"] is None and slow.to_dict()["measured"] == "x" and open_.to_dict()["steady"] is None


def test_many_listeners_share_a_reading_of_the_weights():
    single, many = one("1xH200", "int4", price=4.0), one("1xH200", "int4", listeners=16, price=4.0)
    cache = 16 * 2048 * 360_448
    assert many.memory["cache"] == pytest.approx(cache / memory.GIB) == pytest.approx(16 * single.memory["cache"])
    assert many.streamed - single.streamed == pytest.approx(15 / 16 * cache / 1e9)
    assert many.least["operations"] == pytest.approx(16 * single.least["operations"])
    assert many.ceiling < single.ceiling and many.cost < single.cost / 10
    assert single.cost == pytest.approx(4.0 * sums.SPOKEN_RATE / single.ceiling)
    most = single.most_listeners
    assert most == many.most_listeners > 16
    edge = [one("1xH200", "int4", listeners=count) for count in (most, most + 1)]
    assert [p.fits and max(p.least["bytes"], p.least["operations"]) <= 1 / sums.SPOKEN_RATE for p in edge] == [1, 0]
    assert one("1xH100-80", "fp8").most_listeners == 0 == one("1xH200", "fp8").most_listeners


def test_nodes_in_a_row_hold_a_part_of_the_layers_each():
    whole, two, three = (one("4xH100-80", "bf16", nodes=n, listeners=12) for n in (1, 2, 3))
    linear = memory.linear_bytes(B130, "bf16") / memory.GIB
    for p, layers in ((two, 44), (three, 30)):  # of 88: the fullest node has 30 of three
        assert p.memory["weights"] == pytest.approx(layers / 88 * linear / 4, rel=1e-4)
        assert p.memory["cache"] == pytest.approx(layers / 88 * whole.memory["cache"])
        assert p.setup.rows == 12 // p.setup.nodes
    assert one("4xH100-80", "bf16", nodes=2).floor == one("4xH100-80", "bf16").floor  # one listener gains nothing
    assert two.ceiling > whole.ceiling and two.most_listeners > whole.most_listeners
    with pytest.raises(ValueError, match="89 nodes cannot share 88 layers"):
        one("4xH100-80", "bf16", nodes=89)


def test_what_is_spare_on_one_h200():
    for weights, spare in (("fp8", 14), ("int4", 73)):
        found = one("1xH200", weights)
        weights_alone = found.memory["weights"] + found.memory["embedding"]
        assert found.setup.gpu.memory - weights_alone == pytest.approx(spare, abs=1.5)
        assert 0 < found.spare < found.setup.gpu.memory - weights_alone
    tight = one("2xH200", "bf16")
    assert tight.fits and tight.spare < 0.1 * tight.setup.gpu.memory
    assert not one("1xH200", "bf16").fits and not one("1xH100-80", "fp8").fits


def test_the_recommended_four_a800_cannot_talk_in_real_time():
    found = one("4xA800-80", "bf16")
    assert found.fits and 25 < found.ceiling < 35 and found.steady is False


def test_the_table_of_delays():
    for rate, delays in DELAY.items():
        assert [sums.start_delay(rate, seconds) for seconds in (5, 10, 20)] == pytest.approx(delays, abs=0.006)


@settings(max_examples=30, deadline=None)
@given(rate=st.floats(20, 200), seconds=st.floats(0.4, 30))
def test_the_delay_is_what_playing_block_by_block_needs(rate, seconds):
    """The pipeline's own count of gaps, given blocks that come at `rate`, says the same."""
    from aqaa.answer import playout

    text, pieces, made = 5.0 * seconds, [], 0.0
    for _ in range(sums.ceil(seconds / 0.36 - 1e-9)):
        words_now = min(10.0, text)
        text, made = text - words_now, made + words_now + 15
        pieces.append((made / rate, 0.36))
    assert sums.start_delay(rate, seconds) == pytest.approx(playout(pieces).delay, abs=1e-9)
    assert sums.start_delay(rate, seconds) >= sums.start_delay(rate + 1, seconds)


def test_prefill_and_first_sound():
    long = 520  # ids: ten seconds of question and its prompt
    setup = one("1xH200", "bf16").setup
    assert sums.prefill_seconds(setup, long) == pytest.approx(0.135, abs=0.005)
    assert sums.prefill_seconds(one("1xH200", "fp8").setup, long) == pytest.approx(0.07, abs=0.01)
    unpacking = sums.prefill_seconds(one("1xH200", "int4").setup, long) - sums.prefill_seconds(setup, long)
    assert unpacking == pytest.approx(0.12, abs=0.01)
    assert sums.prefill_seconds(one("8xH200", "bf16").setup, long) == pytest.approx(0.017, abs=0.003)
    assert sums.prefill_seconds(setup, 1) == pytest.approx(260.2e9 / 4.8e12, rel=0.01)  # every weight is read
    measured = words.plans([one("1xH200", "int4").setup])[0]
    assert measured.first_sound[3] == pytest.approx(1.4541, abs=0.2)  # as the same run found
    assert one("1xH200", "int4").first_sound[3] < measured.first_sound[3]


@settings(max_examples=40, deadline=None)
@given(
    gpu=st.sampled_from(list(sums.GPUS)), count=st.sampled_from([1, 2, 4, 8]),
    weights=st.sampled_from(list(memory.BITS)), context=st.integers(1, 16_000), listeners=st.integers(1, 40),
    nodes=st.integers(1, 5),
)  # fmt: skip
def test_what_holds_for_every_plan(gpu, count, weights, context, listeners, nodes):
    options = {"listeners": listeners, "nodes": nodes, "price": 2.0}
    found = one(f"{count}x{gpu}", weights, context=context, **options)
    assert found.spare == pytest.approx(found.setup.gpu.memory - found.total) and found.rate is None
    more = one(f"{count}x{gpu}", weights, context=context + 384, **options)
    assert more.total > found.total and more.ceiling <= found.ceiling and more.least["bytes"] > found.least["bytes"]
    assert found.floor == max(found.least.values()) == pytest.approx(1 / found.ceiling)
    given = json.loads(json.dumps(found.to_dict()))
    assert given["fits"] == found.fits and given["parameters"] == 131_946_590_208 and given["nodes"] == nodes


def test_names_of_gpus():
    for text, name, count in (
        ("4xH100-80", "H100-80", 4), ("h200", "H200", 1), ("8 x h200", "H200", 8), ("2×A100 80", "A100-80", 2),
        ("1xRTX 4090", "RTX-4090", 1),
    ):  # fmt: skip
        assert words.parse_gpus(text) == (sums.GPUS[name], count)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--gpus", "4xV100"], ("unknown GPUs '4xV100'", "H100-80")),
        (["--gpus", "0xH200"], ("unknown GPUs",)),
        (["--gpus", "1xH200+1xH100-80"], ("mixes GPUs", "slowest")),
        (["--gpus", "3xH200"], ("3 GPUs cannot share 96 attention heads", "use 1, 2, 4, 8")),
        (["--gpus", "16xH200"], ("16 GPUs cannot share", "8 key-value groups", "--nodes")),
        (["--nodes", "100"], ("100 nodes cannot share 88 layers",)),
        (["--gpus", "1xH100-80", "--weights", "int4", "--listeners", "99"], ("99 listeners", "would fit")),
        (["--gpus", "8xH200", "--weights", "int4", "--group", "128"], ("128", "down_proj", "3904", "groups of 64")),
        (["--context", "40000"], ("40000", "32768")),
        (["nowhere"], ("'nowhere'", "130b")),
        (["--gpus", "1xL40S"], ("needs", "GiB", "int4 g128 on 2xL40S would fit")),
        (["--gpus", "1xH200", "--weights", "bf16"], ("250.3", "139.8", "fp8 on 1xH200 would fit")),
        (["--gpus", "8xRTX-4090", "--weights", "bf16"], ("fp8 on 8xRTX-4090 would fit",)),
        (["--gpus", "2xRTX-4090", "--weights", "fp8"], ("int4 g128 on 4xRTX-4090 would fit",)),
    ],
)
def test_what_cannot_be_is_one_sentence(arguments, said, capsys):
    assert cli.main(["plan", *arguments]) == 1
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and "Traceback" not in shown.err
    assert all(part in shown.err for part in said), shown.err


def test_what_would_fit_is_told():
    (setup,) = words.setups("130b", ["1xH100-80"], "int4")
    assert sums.plan(setup).fits
    refused = words.what_would_fit(replace(setup, weights="fp8", group=None))
    assert re.search("needs .* GiB on each of 1xH100-80, which has 79.1: .* would fit", refused)


def test_a_folder_is_read_in_either_form(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(preset("mini").to_dict()), encoding="utf-8")
    assert words.read_model(tmp_path)[1] == preset("mini").backbone
    sizes = {k: v for k, v in vars(B130).items() if not k.endswith("_id")}
    nested = {"model_type": "mmgpt_step1_v2", "text_config": {**sizes, "hidden_act": "silu"}}
    (tmp_path / "config.json").write_text(json.dumps(nested), encoding="utf-8")
    assert words.read_model(tmp_path)[1] == B130
    flat = {"model_type": "step1", **sizes, "quantization": {"weights": "int4", "group": 64, "method": "rtn"}}
    (tmp_path / "config.json").write_text(json.dumps(flat), encoding="utf-8")
    (setup,) = words.setups(tmp_path, ["2xH200"])
    assert (setup.weights, setup.group) == ("int4", 64)
    for broken in ("{", "[]", '{"model_type": "llama", "hidden_size": 8}', '{"text_config": 3}'):
        (tmp_path / "config.json").write_text(broken, encoding="utf-8")
        with pytest.raises(ValueError, match="config.json"):
            words.read_model(tmp_path)


def test_the_command_without_arguments_shows_the_usual_setups(capsys):
    assert cli.main(["plan"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name} " in shown for name in sums.USUAL) and "does not fit" in shown and "1xH100-80" in sums.USUAL
    assert "131,946,590,208 parameters" in shown and "not measured" in shown and "h200-130b-int4.json" in shown
    line = next(line for line in shown.splitlines() if line.split()[:2] == ["1xH200", "int4"])
    assert line.split()[8:11] == ["69", "28", "no"]  # its ceiling, as measured, audio in real time
    assert cli.main(["plan", "3b", "--json", "--gpus", "1xL40S", "--gpus", "1xH200"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 8 and {row["gpus"] for row in rows} == {"1xL40S", "1xH200"} and all(row["fits"] for row in rows)


def test_a_plan_needs_no_torch():
    code = "import sys; from aqaa import cli; cli.main(['plan']); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.splitlines()[-1] == "False"


def test_the_command_for_many_listeners_on_several_nodes(capsys):
    asked = ["plan", "--gpus", "8xH100-80", "--weights", "int4", "--nodes", "2", "--listeners", "32", "--price", "2.5"]
    assert cli.main(asked) == 0
    shown = capsys.readouterr().out
    (wanted,) = words.plans(words.setups("130b", ["8xH100-80"], "int4", listeners=32, nodes=2, price=2.5))
    assert "32 listeners, 2 nodes in a row" in shown and f">={wanted.cost:.2f}\n" in shown
    assert shown.splitlines()[2].split()[-2] == str(wanted.most_listeners)
    assert cli.main([*asked, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row == wanted.to_dict() and row["cost"] == pytest.approx(wanted.cost, abs=1e-5)


def record(rates, **other):
    """A record that no run has made."""
    setup = {"model": "130b", "gpus": "1xH200", "weights": "int4", "group": 128}
    decode = [{"context": context, "tokens_per_s": rate} for context, rate in rates.items()]
    return {"what": "scale", "setup": setup, "decode": decode, **other}


def test_a_recorded_run_is_held_against_its_limits(tmp_path):
    invented = record({512: 51.0, 8192: 47.0}, prefill=[{"ids": 520, "seconds": 0.5}],
                      fp8={"decode": [{"context": 512, "tokens_per_s": 20.0}]})  # fmt: skip
    (tmp_path / "invented.json").write_text(json.dumps(invented), encoding="utf-8")
    (tmp_path / "speed.json").write_text('{"what": "speed"}', encoding="utf-8")
    rows = words.check(tmp_path)
    whats = ["int4 tokens/s at 512", "int4 tokens/s at 8192", "fp8 tokens/s at 512", "int4 prefill of 520, s"]
    assert [row["what"] for row in rows] == whats
    assert all(row["possible"] and row["file"] == "invented.json" for row in rows)
    assert rows[0]["share"] == pytest.approx(51 / one("1xH200", "int4", context=512).ceiling, abs=1e-3)
    (tmp_path / "invented.json").write_text(json.dumps(record({512: 90.0})), encoding="utf-8")  # more than bytes allow
    assert [row["possible"] for row in words.check(tmp_path)] == [False]
    (tmp_path / "invented.json").write_text('{"what": "scale", "setup": {}}', encoding="utf-8")
    with pytest.raises(ValueError, match="invented.json is not a whole record"):
        words.check(tmp_path)


def test_a_share_goes_to_the_setup_that_was_measured_alone(tmp_path):
    invented = record({512: 51.0, 8192: 40.0}, vocoder={"rtf": 0.1}, note="of a dream")
    (tmp_path / "invented.json").write_text(json.dumps(invented), encoding="utf-8")
    plain = one("1xH200", "int4", context=600).setup
    found = words.measured(plain, words.records(tmp_path))
    assert found.rate == pytest.approx(51 / one("1xH200", "int4", context=512).ceiling)  # the nearest context
    assert (found.file, found.vocoder, found.prefill, found.note) == ("invented.json", 0.1, None, "of a dream")
    assert words.measured(replace(plain, context=9000), words.records(tmp_path)).rate < found.rate
    for other in ({"listeners": 2}, {"nodes": 2}, {"count": 2}, {"group": 64}, {"weights": "int8", "group": None},
                  {"gpu": sums.GPUS["H100-80"]}, {"backbone": preset("mini").backbone}):  # fmt: skip
        assert words.measured(replace(plain, **other), words.records(tmp_path)) is None, other
    assert words.measured(plain, words.records(tmp_path / "nowhere")) is None
    assert words.plans([plain], tmp_path)[0].rate == pytest.approx(found.rate * sums.plan(plain).ceiling)


def test_every_recorded_run_is_possible():
    rows = words.check(ROOT / "data" / "runs")
    assert rows and all(row["possible"] and 0.2 < row["share"] < 1 for row in rows), rows
