"""Training of the audio tokenizers: CTC and its error counts, k-means, and a quantiser that gradients pass through."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchaudio.functional import edit_distance

from aqaa.tokenizers import phones
from aqaa.training import features
from aqaa.training import speech_tokenizers as K
from aqaa.training.loop import Trainer
from aqaa.training.speech_tokenizers import LinguisticTask, SemanticTask
from tests.conftest import tiny_config

CONFIG = tiny_config()
rows_of_phones = st.lists(st.integers(1, 5), max_size=8)


# ---- phones and their errors ----------------------------------------------------------------------------------------


def test_phones_are_counted_from_one_and_unknown_ones_left_out():
    assert phones.phone_ids(phones.PHONES) == list(range(1, phones.CLASSES))
    assert phones.phone_ids(["pau", "s", "ssil", "s"]) == [phones.PHONE_IDS["s"]] * 2


def test_edit_distance_of_words():
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("", "abc") == 3


@given(st.lists(rows_of_phones, min_size=1, max_size=4).filter(any))
def test_phone_error_is_in_percent_of_what_was_said(wanted):
    assert phones.error_rate(wanted, wanted) == 0
    assert phones.error_rate([[] for _ in wanted], wanted) == 100
    assert phones.error_rate([row + row for row in wanted], wanted) == pytest.approx(100)


@settings(deadline=None)
@given(st.lists(rows_of_phones, min_size=1, max_size=4), st.integers(0, 2**31))
def test_best_path_undoes_repeats_and_blanks(rows, seed):
    rng, paths = np.random.default_rng(seed), []
    for row in rows:
        path = [0] * int(rng.integers(0, 3))
        for i, phone in enumerate(row):
            between = rng.integers(1, 3) if i and row[i - 1] == phone else rng.integers(0, 2)
            path += [0] * int(between) + [phone] * int(rng.integers(1, 4))
        paths.append(path)
    lengths = torch.tensor([len(path) for path in paths])
    scores = torch.full((len(rows), int(lengths.max()) + 2, 6), -5.0)
    scores[..., 4] = 0  # beyond its length a row must not be read
    for row, path in zip(scores, paths, strict=True):
        row[: len(path)] = F.one_hot(torch.tensor(path, dtype=torch.long), 6).float()
    assert K.best_path(scores, lengths) == rows


# ---- CTC ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 3])
def test_ctc_of_fast_speech(factor):
    """Four rows, six phones: no path at factor 1, which must cost nothing; with three outputs a row it can be said."""
    torch.manual_seed(0)
    head, hidden = nn.Linear(8, factor * 7), torch.randn(2, 5, 8, requires_grad=True)
    targets, counts = torch.tensor([1, 2, 3, 4, 5, 6] + [2, 2]), torch.tensor([6, 2])
    lengths = torch.tensor([4, 5])
    loss, log_probs = K.upsampled_ctc(head, hidden, lengths, targets, counts, factor)
    loss.backward()
    assert log_probs.shape == (2, 5 * factor, 7)
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(2, 5 * factor))
    assert loss.isfinite() and hidden.grad.isfinite().all()
    assert (hidden.grad[0].abs().sum() > 0) == (factor == 3)
    assert hidden.grad[1].abs().sum() > 0 and hidden.grad[0, 4].abs().sum() == 0  # the padded row


def test_ctc_outputs_come_in_the_order_of_time():
    head, hidden = nn.Linear(4, 3 * 7), torch.randn(1, 5, 4)
    _, log_probs = K.upsampled_ctc(head, hidden, torch.tensor([5]), torch.tensor([1]), torch.tensor([1]), 3)
    third = head(hidden[0, 2]).reshape(3, 7).log_softmax(-1)
    assert torch.allclose(log_probs[0, 6:9], third)


# ---- data -----------------------------------------------------------------------------------------------------------


def speech(width, seed=0, count=24):
    """Utterances of six "phones", each a stretch of rows of its own pattern, and f0 (T, 4) for half of them."""
    rng = np.random.default_rng(seed)
    patterns = np.random.default_rng(7).standard_normal((7, width))
    rows, lengths, phones, pitch = [], [], [], []
    for _ in range(count):
        said = rng.integers(1, 7, rng.integers(2, 6)).tolist()
        path = np.concatenate([np.repeat([phone, 0], rng.integers(1, 4, 2)) for phone in said])
        rows.append(patterns[path] + 0.1 * rng.standard_normal((len(path), width)))
        pitch.append(np.where(path[:, None] % 2, path[:, None] / 4, 0) * np.ones(4))
        lengths.append(len(path))
        phones.append(said)
    extra = {"f0": np.concatenate(pitch).astype(np.float16)}
    return features.Utterances(np.concatenate(rows).astype(np.float16), lengths, phones, extra)


def test_gathered_rows_are_padded_with_zeros():
    data = speech(5)
    indices = [3, 0, 7]
    x, lengths = data.gather(indices)
    assert x.shape == (3, max(data.lengths[indices]), 5) and lengths.tolist() == data.lengths[indices].tolist()
    for row, index in enumerate(indices):
        assert np.array_equal(x[row, : lengths[row]], data.rows[data.starts[index] : data.starts[index + 1]])
        assert not x[row, lengths[row] :].any()
    flat, counts = data.targets(indices)
    assert [part.tolist() for part in flat.split(counts.tolist())] == [data.phones[i] for i in indices]
    assert data.gather([1], data.extra["f0"])[0].shape == (1, data.lengths[1], 4)


@given(st.integers(1, 40), st.integers(0, 2**31))
def test_masks_are_bands_and_stretches_within_bounds(length, seed):
    x, again = (
        K.spec_augment(torch.ones(2, length, 3 * 20), np.random.default_rng(seed), 3, 20, widest=6, time_widest=4)
        for _ in range(2)
    )
    assert set(x.unique().tolist()) <= {0.0, 1.0}
    for row in x:
        silent = (row == 0).all(1)
        assert silent.sum() <= 4 and length > 3 * silent.sum()
        band = (row[~silent][0].view(3, 20) == 0).all(0)
        assert band.sum() <= 6 and (row[~silent].view(-1, 20)[:, ~band] == 1).all()
    assert torch.equal(x, again)


# ---- k-means --------------------------------------------------------------------------------------------------------


def distortion(x, centroids):
    return torch.cdist(x, centroids).min(1).values.square().mean()


def test_kmeans_finds_blobs():
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.eye(6)
    x = (centres[:, None] + 0.1 * torch.randn(6, 50, 6, generator=generator)).flatten(0, 1)
    found = K.kmeans(x, 24)
    assert torch.cdist(centres, found).min(1).values.max() < 0.3  # every blob has its centroids
    assert torch.cdist(found, centres).min(1).values.max() < 0.5  # and no centroid lies between blobs
    assert torch.equal(found, K.kmeans(x, 24)) and not torch.equal(found, K.kmeans(x, 24, seed=1))


@pytest.mark.parametrize("seed", range(3))
def test_kmeans_never_gets_worse(seed):
    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(seed))
    scores = [distortion(x, K.kmeans(x, 10, rounds=rounds, seed=seed)).item() for rounds in (0, 1, 3, 10, 25)]
    assert scores == sorted(scores, reverse=True) and scores[-1] < 0.8 * scores[0]


def test_empty_clusters_go_where_the_fit_is_worst():
    points = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    x = points.repeat_interleave(20, 0)  # a random start takes some points twice
    found = K.kmeans(x, 8)
    assert torch.cdist(points, found).min(1).values.max() < 1e-3


def test_nearest_agrees_with_distances_whatever_the_parts():
    generator = torch.Generator().manual_seed(0)
    x, centroids = torch.randn(50, 4, generator=generator), torch.randn(9, 4, generator=generator)
    nearest, distance = K.nearest(x, centroids, rows=7)
    best = torch.cdist(x, centroids).square().min(1)
    assert torch.equal(nearest, best.indices) and torch.allclose(distance, best.values, atol=1e-5)


# ---- the two tasks --------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(Trainer, "_plot", lambda self: None)


def linguistic_task():
    torch.manual_seed(0)
    return LinguisticTask(CONFIG.linguistic, speech(CONFIG.linguistic.input_size), budget=60)


def semantic_task(**options):
    torch.manual_seed(0)
    return SemanticTask(CONFIG.semantic, speech(4 * CONFIG.semantic.n_mels), budget=60, **options)


def quantising_task(training=True):
    task = semantic_task()
    task.event(1.0)
    for module in task.modules.values():
        module.train(training)
    return task


def drawn(task, seed=0):
    return task.batch(np.random.default_rng(seed))


@pytest.mark.parametrize("make", [linguistic_task, semantic_task])
def test_batches_belong_to_their_generator(make):
    task = make()
    one, same, other = (drawn(task, seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["x"], other["x"])
    assert one["x"].shape[:2] == (len(one["counts"]), one["lengths"].max())
    assert one["targets"].shape == (one["counts"].sum(),)


@pytest.mark.parametrize("make", [linguistic_task, semantic_task])
def test_a_few_steps_already_help(make, tmp_path):
    task = make()
    batch = drawn(task)
    with torch.no_grad():
        before = task.loss(batch, 0)[0].item()
    Trainer(task, tmp_path, "toy", 20, quiet=True).run()
    with torch.no_grad():
        assert task.loss(batch, 0)[0].item() < 0.97 * before


def test_phone_error_is_measured_row_by_row():
    """Batches of any size give the same error: padding is not read."""
    task = linguistic_task()
    task.model.eval()
    rows = np.arange(len(task.data.lengths))
    (whole,) = task.evaluate(rows)
    assert 0 < whole and (whole,) == pytest.approx(task.evaluate(rows, budget=1))
    task = quantising_task(training=False)
    error, melody = task.evaluate(rows)
    assert (error, melody) == pytest.approx(task.evaluate(rows, budget=5), rel=1e-3) and melody > 0


def test_the_quantiser_comes_when_its_time_has_come():
    task = semantic_task(quantise_from=0.5)
    embed = task.codebook
    task.event(0.49)
    assert not task.quantising and not embed.any()
    assert "perplexity" not in task.loss(drawn(task), 0)[1]
    task.event(0.5)
    assert task.quantising and task.model.training
    norms = embed.norm(dim=-1)
    assert (norms > 0.3).all() and (norms <= 1 + 1e-5).all()  # means of unit vectors
    assert torch.allclose(task.register.total, embed)
    first = embed.clone()
    task.event(0.9)
    assert torch.equal(embed, first)


def gradients(task, batch):
    task.model.zero_grad()
    task.decoder.zero_grad()
    loss, _ = task.loss(batch, 0)
    loss.backward()
    return loss.item(), [p.grad.clone() for p in task.model.parameters()]


def test_gradients_pass_straight_through_the_quantiser():
    """Where the codes are exact nothing is lost: the encoder's gradients are those it has without a quantiser."""
    task = semantic_task()
    task.model.eval()  # keeps the codebook as it is
    batch = drawn(task)
    loss, wanted = gradients(task, batch)
    with torch.no_grad():
        hidden, mask = task.hidden(batch["x"], batch["lengths"])
    codebook = F.normalize(hidden[mask], dim=-1)
    task.model.quantizer._codebook.embed = codebook
    task.config = CONFIG.semantic.__class__(**{**vars(CONFIG.semantic), "n_codebook_size": len(codebook)})
    task.quantising = True
    same, found = gradients(task, batch)
    assert same == pytest.approx(loss, rel=1e-4) and all(g.abs().sum() > 0 for g in wanted)
    for a, b in zip(wanted, found, strict=True):
        assert torch.allclose(a, b, rtol=1e-2, atol=1e-3 * a.abs().max().item())


def test_rough_codes_still_teach_the_encoder():
    task = quantising_task()
    _, found = gradients(task, drawn(task))
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in found)


def test_dead_codes_are_seeded_again_and_live_ones_follow_their_rows():
    task = quantising_task()
    embed, size = task.codebook, task.register.size
    embed[3], task.register.total[3], size[3] = 9.0, 9.0, 0.01  # nobody is near
    generator = torch.Generator().manual_seed(0)
    unit = F.normalize(torch.randn(2, 40, CONFIG.semantic.n_audio_state, generator=generator), dim=-1)
    mask = torch.arange(40)[None] < torch.tensor([[40], [25]])
    before = embed.clone()
    quantised, codes = task.quantise(unit, mask)
    flat = unit[mask]
    assert torch.cdist(embed[3:4], flat).min() < 1e-4 and size[3] == 1
    assert torch.equal(quantised[mask], embed[codes]) and not quantised[~mask].any() and (codes != 3).all()
    code = codes.bincount().argmax()
    mean = flat[codes == code].mean(0)
    assert (embed[code] - mean).norm() < (before[code] - mean).norm()
    task.model.eval()
    kept = embed.clone()
    task.quantise(unit, mask)
    assert torch.equal(embed, kept)


def test_the_codebook_is_used():
    task = quantising_task()
    logs = [task.loss(drawn(task, seed), seed)[1] for seed in range(10)]
    assert np.mean([log["perplexity"].item() for log in logs]) > 0.4 * CONFIG.semantic.n_codebook_size
    codes = [task.model.quantize(task.hidden(*task.data.gather([i]))[0]) for i in range(24)]
    assert len(torch.cat([c.flatten() for c in codes]).unique()) > 0.6 * CONFIG.semantic.n_codebook_size


@pytest.mark.parametrize("stop", [2, 6, 7])
def test_resuming_on_either_side_of_the_quantiser_gives_the_same_bits(tmp_path, stop):
    def train(folder, stop=None):
        task = semantic_task()
        event = task.event

        def interrupt(progress):
            if stop is not None and round(progress * 10) == stop:
                raise KeyboardInterrupt
            event(progress)

        task.event = interrupt
        with pytest.raises(KeyboardInterrupt) if stop is not None else nullcontext():
            Trainer(task, folder, "toy", 10, quiet=True, resume=True).run()
        return {key: module.state_dict() for key, module in task.modules.items()}

    train(tmp_path / "cut", stop)
    whole, cut = train(tmp_path / "whole"), train(tmp_path / "cut")
    for key, state in whole.items():
        assert all(torch.equal(value, cut[key][name]) for name, value in state.items()), key


def test_codes_of_a_padded_batch_are_those_of_each_alone():
    task = quantising_task(training=False)
    x, lengths = task.data.gather([0, 5, 9])
    with torch.no_grad():
        together = task.model.quantize(task.hidden(x, lengths)[0])
        for row, index in enumerate([0, 5, 9]):
            alone = task.model.quantize(task.hidden(*task.data.gather([index]))[0])[0]
            assert torch.equal(together[row, : lengths[row]], alone)
