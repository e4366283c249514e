"""Phone heads: what a tokenizer heard, with times; a part that a folder may lack."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from aqaa import cli, loading
from aqaa.pipeline import AQAA
from aqaa.tokenizers import phones
from aqaa.weights import model_folder
from tests.conftest import RATE, fails, tiny_config, tone

CONFIG = tiny_config()


@pytest.fixture(scope="module")
def heads():
    torch.manual_seed(0)
    return phones.PhoneHeads(CONFIG).eval()


@pytest.fixture(scope="module")
def hearing(tiny, heads, tmp_path_factory):
    """A folder of weights with phone heads."""
    parts = {name: getattr(tiny, name) for name in ("text", *model_folder.PARTS)} | {"heads": heads}
    folder = tmp_path_factory.mktemp("hearing") / "tiny"
    model_folder.save(AQAA(CONFIG, parts.__getitem__), folder)
    return folder


def path_of(ids):
    """CTC log-probs (T, CLASSES) of one id a frame."""
    return F.one_hot(torch.tensor(ids), phones.CLASSES).float().log()


@pytest.mark.parametrize("factor, context", [(3, 1), (2, 7)])
def test_a_head_gives_its_outputs_in_the_order_of_time(factor, context):
    head, rows = phones.PhoneHead(8, factor, context), torch.randn(2, 5, 8)
    log_probs = head.log_probs(rows)
    assert log_probs.shape == (2, 5 * factor, phones.CLASSES)
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(2, 5 * factor))
    assert torch.allclose(log_probs[:, 2 * factor], head(rows)[:, 2, : phones.CLASSES].log_softmax(-1), atol=1e-6)


@pytest.mark.parametrize("context, reach", [(1, 0), (7, 3)])
def test_a_head_sees_its_context_and_no_further(context, reach):
    head, rows = phones.PhoneHead(8, 2, context), torch.randn(1, 12, 8, requires_grad=True)
    head(rows)[0, 5].sum().backward()
    assert rows.grad[0].abs().sum(-1).nonzero().flatten().tolist() == list(range(5 - reach, 6 + reach))


def test_phones_last_to_the_middle_of_the_gap_between_them():
    k, ae, t = (phones.PHONE_IDS[name] for name in ("k", "ae", "t"))
    found = phones.timed(path_of([0, 0, k, 0, 0, ae, ae, t, 0]), start=1.0)
    assert [phone.name for phone in found] == ["k", "ae", "t"]
    assert [phone.start for phone in found] == pytest.approx([1.04, 1.08, 1.14])
    assert [phone.end for phone in found] == pytest.approx([1.08, 1.14, 1.16])
    assert phones.timed(path_of([0, 0])) == []
    assert [phone.name for phone in phones.timed(path_of([t, t, 0, t]))] == ["t", "t"]


def test_a_folder_with_heads_tells_what_was_heard(hearing, heads):
    model = loading.load(hearing)
    found = model.phones((tone(0.9), RATE))
    assert list(found) == ["linguistic", "semantic"]
    names, times = (lambda part: [getattr(phone, part) for phone in found["semantic"]]), []
    assert names("name") and set(names("name")) <= set(phones.PHONES)
    times = [*names("start"), *names("end")[-1:]]
    assert times == sorted(times) and 0 <= times[0] and times[-1] <= 0.95
    assert torch.equal(model.heads.state_dict()["semantic.context.weight"], heads.semantic.context.weight)
    assert model_folder.inspect(hearing)["heads"]["as_recorded"]


def test_semantic_phones_come_from_the_codes_alone(tiny, heads, monkeypatch):
    wav, other = torch.from_numpy(tone(0.9)), torch.from_numpy(tone(0.9, pitch=99))
    before, codes = heads.heard(wav, tiny.linguistic, tiny.semantic), tiny.semantic.encode(wav)
    monkeypatch.setattr(tiny.semantic, "encode", lambda wav, energy_norm: codes)
    after = heads.heard(other, tiny.linguistic, tiny.semantic)
    assert after["semantic"] == before["semantic"] != [] and after["linguistic"] != before["linguistic"]


def test_code_vectors_are_zero_beyond_an_end(tiny):
    vectors = phones.code_vectors(tiny.semantic, torch.tensor([[3, 1, 2]]), torch.tensor([[True, True, False]]))
    embed = tiny.semantic.quantizer._codebook.embed
    assert torch.equal(vectors[0, 1], embed[1] * 4.0) and not vectors[0, 2].any()


def test_the_silence_that_is_cut_counts_in_the_times(hearing):
    model, wav = loading.load(hearing), torch.from_numpy(tone(0.9))
    late = model.phones((torch.cat([torch.zeros(3 * RATE), wav]), RATE))["linguistic"]
    assert late and all(phone.start >= 3 - 0.75 for phone in late)


def test_a_folder_without_heads_loads_and_says_how_to_get_them(tiny_folder):
    model = loading.load(tiny_folder)
    assert model.heads is None and "heads" not in model_folder.inspect(tiny_folder)
    with fails("no phone heads", "aqaa train"):
        model.phones((tone(), RATE))


def test_a_broken_head_is_told_at_once_and_other_heads_are_not_kept(hearing, tiny_folder, tmp_path):
    broken = shutil.copytree(hearing, tmp_path / "broken")
    (broken / "heads.safetensors").write_bytes(b"1234")
    with fails("heads.safetensors", "cut short"):
        loading.load(broken)
    files = {name: tiny_folder / f"{name}.safetensors" for name in model_folder.PARTS}
    model_folder.gather(broken, CONFIG, tiny_folder / "tokenizer.json", files, {})
    assert not (broken / "heads.safetensors").exists() and loading.load(broken).heads is None


def test_listen_prints_what_each_tokenizer_heard(hearing, tiny_folder, question, capsys):
    assert cli.main(["listen", str(question), "--preset", str(hearing)]) == 0
    assert "\nlinguistic_phones (" in (shown := capsys.readouterr().out) and "\nsemantic_phones (" in shown
    assert cli.main(["listen", str(question), "--preset", str(hearing), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["semantic_phones"]
    assert all(name in phones.PHONES and 0 <= start < end for name, start, end in rows)
    assert cli.main(["listen", str(question), "--preset", str(tiny_folder)]) == 0
    assert "phones" not in capsys.readouterr().out
