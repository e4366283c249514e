"""Pictures: drawn scenes and their questions, the encoder and its place in the prompt, faults of files, the bench."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import aqaa
from aqaa import cli
from aqaa.backbone import generation, vision
from aqaa.backbone.layers import PlainStep1
from aqaa.config import AQTA, preset
from aqaa.corpus import pictures as P
from aqaa.corpus.codes import stored_codes
from aqaa.evaluation import pictures as bench
from aqaa.files import ModelError, data_folder
from aqaa.tokenizers import dialogue
from aqaa.training import sight
from aqaa.training.run import Run
from tests.conftest import losses_of

MINI = preset("mini")


@pytest.fixture(scope="module")
def eyes():
    torch.manual_seed(0)
    made = vision.Vision(MINI).eval()
    for up in made.lora.up.values():  # as if it had learnt something
        torch.nn.init.normal_(up, std=0.1)
    return made


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(1)
    return PlainStep1(MINI.backbone).eval()


def scenes(count=300, seed=0):
    rng = np.random.default_rng(seed)
    return [P.scene(rng) for _ in range(count)]


# ---- what is drawn and asked ----


def test_a_scene_has_what_its_answers_say():
    for scene in scenes():
        for kind, thing in P.asked(scene):
            text = P.answer(scene, kind, thing)
            assert text in P.answers(kind, thing)
            if kind == "count":
                word = P.NUMBERS[sum(one.name == thing for one in scene.things)]
                assert f" {word} {thing}" in text and text.endswith("s") == (word != "one")
            elif kind == "is_there":
                assert text.startswith("yes") == any(one.name == thing for one in scene.things)
            elif kind == "colour" and thing != P.NUMBER:
                assert {one.colour for one in scene.of(thing)} == {text.split()[-1]}
            elif kind == "where":
                (one,) = scene.of(thing)
                low, high = {"left": (0, 0.3), "right": (0.7, 1)}.get(text.split()[-1], (0.3, 0.7))
                assert low <= one.x <= high


def test_things_lie_inside_and_apart_and_differ_in_what_is_seen():
    for scene in scenes():
        spots = [(thing.x, thing.y) for thing in scene.things]
        for i, thing in enumerate(scene.things):
            assert thing.r <= min(thing.x, thing.y, 1 - thing.x, 1 - thing.y) + 0.01
            apart = [np.hypot(thing.x - x, thing.y - y) for j, (x, y) in enumerate(spots) if j != i]
            assert not apart or min(apart) > 0.15
    one, two = scenes(2)
    assert np.any(np.asarray(P.draw(one, 64)) != np.asarray(P.draw(two, 64)))
    assert np.array_equal(np.asarray(P.draw(one, 64)), np.asarray(P.draw(one, 64)))


@pytest.mark.parametrize("name", [*P.SHAPES, *P.DIGITS])
def test_every_thing_is_drawn_in_its_colour_where_it_is(name):
    picture = np.asarray(P.draw(P.Scene((P.Thing(name, "red", 0.3, 0.6, 0.25),)), 64)).astype(int)
    red = (picture[..., 0] > 180) & (picture[..., 1] < 90)
    rows, columns = np.nonzero(red)
    assert 40 < red.sum() < 1100
    assert abs(columns.mean() / 64 - 0.3) < 0.05 and abs(rows.mean() / 64 - 0.6) < 0.06


def test_training_evaluation_and_development_hold_no_wording_or_voice_in_common_where_they_shall_not():
    items = [item for item in P.plan() if item.role == "picture"]
    by = {name: [item for item in items if (item.cell or item.split) == name]
          for name in ("train", "dev", "picture_seen", "picture_new", "picture_natural")}  # fmt: skip
    heard = {item.text for item in by["train"]}
    assert not heard & {item.text for item in by["picture_new"]}
    assert not {item.voice for item in by["train"]} & {item.voice for item in by["picture_natural"]}
    assert {item.intent for item in by["train"]} == {f"picture_{kind}" for kind in P.KINDS}
    ids = [item.id for item in P.plan()]
    assert len(set(ids)) == len(ids) and ids == [item.id for item in P.plan()]


def test_every_answer_and_question_has_its_codes():
    stored = stored_codes(data_folder() / "codes")
    assert not {item.id for item in P.plan()} - stored.keys()


# ---- the encoder ----


def test_sizes_of_a_picture_in_the_prompt():
    assert MINI.vision.rows == 16 and preset("full").vision.rows == 169  # as the published sister says
    hold = vision.patches(MINI)
    assert len(hold) == 18 and hold[0] == MINI.ids.im_start and hold[-1] == MINI.ids.im_end
    assert set(hold[1:-1]) == {MINI.ids.im_patch}


def test_rows_have_the_published_names_and_shapes(eyes):
    names = {name.split(".")[0] for name in eyes.state_dict()}
    assert names == {"vision_model", "vit_downsampler", "vit_downsampler2", "vit_large_projector", "lora"}
    with torch.no_grad():
        assert eyes(torch.zeros(2, 3, 64, 64)).shape == (2, 16, MINI.backbone.hidden_size)
    with torch.device("meta"):
        full = vision.Vision(preset("full"))
    with torch.no_grad():
        assert full(torch.zeros(1, 3, 728, 728, device="meta")).shape == (1, 169, 12_288)
    assert sum(p.numel() for p in full.parameters()) == pytest.approx(1.95e9, rel=0.05)
    assert not list(full.lora.parameters())  # it learnt to see with all the rest


def test_rows_take_the_places_of_their_ids_in_order(eyes, backbone):
    hold = vision.patches(MINI)
    ids = torch.tensor([[1, *hold, 60, *hold, 61, 62], [1, 70, *hold, 60, 61, *hold]])
    pictures = torch.rand(4, 3, 64, 64)
    with torch.no_grad():
        embeddings = backbone.model.embed_tokens(ids)
        given = eyes.embedded(embeddings, ids, pictures)
        rows = eyes(pictures)
    at = ids == MINI.ids.im_patch
    assert torch.equal(given[at], rows.flatten(0, 1)) and torch.equal(given[~at], embeddings[~at])


def test_the_changes_of_lora_concern_pictures_alone(eyes, backbone):
    before = {name: weight.clone() for name, weight in backbone.state_dict().items()}
    seeing = eyes.adapted(backbone)
    assert all(torch.equal(weight, before[name]) for name, weight in backbone.state_dict().items())
    changed = {name for name, weight in seeing.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {f"model.{name}" for name, _ in eyes.lora.changes()} and len(changed) == 7 * 6
    plain = vision.Vision(preset("mini").__class__(**{**vars(MINI), "vision": vars_without_lora()}))
    assert plain.adapted(backbone) is backbone


def vars_without_lora():
    return type(MINI.vision)(**{**vars(MINI.vision), "lora_rank": 0})


def test_training_and_answering_see_the_same(eyes, backbone, monkeypatch):
    """Logits of the task (changes added at each step) are those of the adapted copy behind embedded rows."""
    from aqaa.backbone.step1 import from_plain

    task = object.__new__(sight.SightTask)
    task.ids, task.model, task.lora, task.backbone = MINI.ids, eyes, eyes.lora, from_plain(backbone).eval()
    ids = torch.tensor([[1, 4, 60, *vision.patches(MINI), 520, 1200, 3]])
    pictures = torch.rand(1, 3, 64, 64)
    batch = {"input_ids": ids, "segments": torch.ones_like(ids), "pictures": pictures}
    with torch.no_grad():
        at = torch.zeros_like(ids, dtype=torch.bool)
        at[0, -1] = True
        trained = task.scores(batch)(at, torch.arange(MINI.ids.n_text))
        seeing = eyes.adapted(backbone)
        rows = eyes.embedded(generation.embed(seeing, ids.tolist()), ids, pictures)
        asked = seeing.logits(generation.Decoder(seeing, 1, 40).feed(rows), rows=slice(0, MINI.ids.n_text))
    assert torch.allclose(trained, asked, atol=1e-4)


# ---- files that people have ----


def test_pictures_of_any_kind_and_shape(tmp_path):
    rng = np.random.default_rng(0)
    wide = Image.fromarray(rng.integers(0, 255, (30, 90, 3), np.uint8))
    for name in ("a.png", "a.jpg", "a.webp", "a.gif"):
        wide.save(tmp_path / name)
        found = vision.pixels(tmp_path / name, 64)
        assert found.shape == (3, 64, 64) and found.dtype == torch.float32
        assert torch.equal(found[:, :20], torch.ones(3, 20, 64)) and found[:, 25:40].std() > 0.1
    grey = vision.pixels(np.zeros((20, 20), np.uint8), 64)
    assert torch.equal(grey, -torch.ones(3, 64, 64))
    turned = Image.fromarray(np.repeat(np.arange(0, 240, 60, dtype=np.uint8)[:, None], 4, 1))
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera stood on its side
    turned.save(tmp_path / "turned.png", exif=exif)
    assert (vision.pixels(tmp_path / "turned.png", 4)[0].diff(dim=1) < 0).all()
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert torch.equal(vision.pixels(clear, 64), torch.ones(3, 64, 64))


@pytest.mark.parametrize("what, said", [
    ("missing.png", "is not there"), ("text.png", "is no picture"), ("cut.png", "is no picture"),
    ("folder", "is no picture"), ("bomb.png", "million"),
])  # fmt: skip
def test_a_picture_that_cannot_be_used_is_one_sentence(tmp_path, monkeypatch, what, said):
    (tmp_path / "text.png").write_bytes(b"no picture")
    (tmp_path / "folder").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "bomb.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "bomb.png").read_bytes()[:300])
    if what == "bomb.png":
        monkeypatch.setattr(vision, "LARGEST", 4000)
    with pytest.raises(vision.PictureError, match=said) as fault:
        vision.pixels(tmp_path / what, 64)
    assert str(tmp_path / what) in str(fault.value) and "\n" not in str(fault.value)


def test_an_array_that_is_no_picture():
    with pytest.raises(vision.PictureError, match="the picture is no picture"):
        vision.pixels(np.zeros((2, 3, 4, 5)), 64)


# ---- training ----


def test_facts_are_what_heads_are_asked():
    for scene in scenes(50):
        row = sight.facts(scene)
        assert len(row) == len(sight.CLASSES) and all(0 <= v < n for v, n in zip(row, sight.CLASSES, strict=True))
        assert sum(row[:15:3]) + bool(row[15]) == len(scene.things)


def test_vision_learns():
    torch.manual_seed(0)
    task = sight.VisionTask(MINI, size=16)
    losses, logs = losses_of(task, [p for m in task.modules.values() for p in m.parameters()], 2e-3, 16)
    assert np.mean(losses[-4:]) < 0.8 * losses[0] and 0 <= logs["all_right"] <= 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sight")
    return Run(folder / "run", folder / "corpus", init=data_folder() / "mini", quiet=True, scale=0.02, steps=2)


@pytest.fixture(scope="module")
def examples(run):
    mixture = {"read": 0.2, "written": 0.3, "spoken": 0.3, "aqtaa": 0.2}
    return sight.PictureExamples(run.book(), mixture, P.plan(), run.stored())


def test_an_example_holds_its_picture_behind_the_question_and_never_learns_to_say_it(examples):
    rng, seen = np.random.default_rng(0), set()
    for _ in range(40):
        ids, weights, scene = examples.draw(rng)
        at, room = ids.tolist().index(MINI.ids.im_start), len(examples.patches)
        assert ids[at : at + room].tolist() == examples.patches and ids[at + room] == MINI.ids.eot
        assert not weights[at : at + room].any() and len(ids) == len(weights)
        turn = [("user", [ids[3 + (ids[1] == AQTA) : at].tolist(), examples.patches])]
        marker = AQTA if ids[1] == AQTA else None
        assert dialogue.prompt(turn, examples.book.tokenizer, MINI.ids, marker=marker) == ids[: at + room + 3].tolist()
        answer = ids[at + room :]
        words = examples.book.tokenizer.decode(answer[(answer >= MINI.ids.first_text) & (answer < 512)].tolist())
        asked = {P.answer(scene, kind, thing) for kind, thing in P.asked(scene)}
        seen.add((words.strip() in asked, bool(ids[1] == AQTA), bool((answer >= 512).any())))
    about, other = {(True, False, False), (True, True, False), (True, False, True)}, {(False, False, True)}
    assert seen == about | other  # read, written, spoken; and about anything else


def test_neither_yes_nor_no_is_a_good_guess(examples):
    """Few of the shapes are in a picture: drawn evenly, "no" was right for three of four questions."""
    rng, said = np.random.default_rng(2), []
    for _ in range(600):
        ids, _ = examples.picture(rng, P.scene(rng), "read")
        answer = ids[ids.tolist().index(MINI.ids.eot) :]
        said.append(examples.book.tokenizer.decode(answer[(answer >= MINI.ids.first_text) & (answer < 512)].tolist()))
    share = {word: np.mean([word in text.split() for text in said]) for word in ("yes", "there", "no", "on", "at")}
    is_there = np.mean([text.split()[1:2] == ["there"] for text in said])  # "yes there is", "no there is"
    assert 0.4 < share["yes"] / is_there < 0.8
    assert share["no"] < 0.6 * share["there"]  # counts, too
    assert share["on"] + share["at"] > 0.08  # where things are: asked of scenes with sides alone, a quarter


def test_the_words_that_the_picture_decides_weigh_most(examples):
    found = {}
    for text in ("the number is seven", "the star is on the left", "it is a square", "no there is no heart"):
        first, last = sight.undecided(text, examples.book)
        found[text] = examples.book.tokenizer.decode(examples.book.encode(text)[first:last]).strip()
    assert found["the number is seven"] == "seven" and found["it is a square"] == "square"
    assert found["the star is on the left"].endswith("left") and found["no there is no heart"].startswith("no")
    rng = np.random.default_rng(1)
    weights = np.concatenate([examples.draw(rng)[1] for _ in range(20)])
    assert {4.0, 4.0 * sight.DECIDES} <= set(weights.tolist())


def test_both_stages_run_and_the_backbone_stays(run, monkeypatch):
    run.stage("vision")
    run.stage("sight")
    told = json.loads((run.out / "record.json").read_text(encoding="utf-8"))
    assert told["sight"]["steps"] == 2 and {"text", "linguistic", "semantic"} <= told["sight"]["last"].keys()
    made = run.part("sight")
    assert any(up.abs().max() > 0 for up in made.lora.up.values())
    assert not (run.out / "parts" / "backbone.safetensors").exists()


# ---- asking ----


@pytest.fixture(scope="module")
def mini():
    return aqaa.load("mini")


def test_weights_without_eyes_say_so(mini, monkeypatch):
    monkeypatch.setitem(mini.__dict__, "vision", None)
    with pytest.raises(ModelError, match="see no pictures"):
        mini.ask(P_QUESTION(mini), image=np.zeros((8, 8, 3), np.uint8))


def P_QUESTION(model, intent="picture_digit", cell="picture_seen"):
    """Ids of a recorded question about a picture."""
    from aqaa.tokenizers import interleave

    (item, *_) = [item for item in P.plan() if item.intent == intent and item.cell == cell]
    return interleave.merge(*stored_codes(data_folder() / "codes")[item.id], model.ids)


def test_the_shipped_model_sees_and_what_it_says_without_a_picture_is_what_it_said(mini):
    questions = stored_codes(data_folder() / "codes")
    plain = [item for item in P.plan() if item.cell == "picture_seen"][:1]
    assert plain and plain[0].id in questions
    result = bench.measure(mini, limit=8)
    seen, blind = (result["cells"]["all"][key]["share"] for key in ("text", "blind"))
    assert seen >= 0.7 and blind <= 0.3, result["cells"]["all"]
    question = P_QUESTION(mini)
    before = mini.ask(question, temperature=0.0).tokens["answer"]
    mini.ask(question, image=P.draw(scenes(1)[0], 64), temperature=0.0)
    assert mini.ask(question, temperature=0.0).tokens["answer"] == before


def test_streamed_is_offline_with_a_picture(mini):
    question, picture = P_QUESTION(mini), P.draw(scenes(5)[1], 200)
    whole = mini.ask(question, image=picture, seed=3)
    talk = mini.stream(question, image=picture, seed=3)
    pieces = list(talk)
    assert talk.answer.tokens["answer"] == whole.tokens["answer"]
    assert "".join(piece.text for piece in pieces).strip() == whole.text and "look" in whole.timings


def test_the_command_line_takes_a_picture(tmp_path, capsys, mini, monkeypatch):
    monkeypatch.setattr(cli, "_load", lambda args: mini)
    P.draw(scenes(1)[0], 64).save(tmp_path / "p.png")
    question = str(next((data_folder() / "questions").glob("*.wav")))
    assert cli.main(["ask", question, "--image", str(tmp_path / "p.png"), "-o", str(tmp_path / "a.wav")]) == 0
    assert (tmp_path / "a.wav").exists()
    assert cli.main(["ask", question, "--image", str(tmp_path / "no.png"), "-o", str(tmp_path / "b.wav")]) == 1
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "no.png is not there" in told.err and not (tmp_path / "b.wav").exists()


def test_pillow_and_transformers_wait_until_a_picture_comes():
    code = "import sys, aqaa; aqaa.load('mini').decoder; print({'PIL', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
