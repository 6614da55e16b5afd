"""All figures of one set of images: against torchmetrics, prdc and numpy on the same features, and at their edges."""

import tracemalloc

import numpy as np
import prdc
import pytest
import torch
from scipy import linalg
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance, poly_kernel

from fitscale.config.errors import UserError
from fitscale.eval import blocks, kernel, neighbours
from fitscale.eval.figures import Seen, SeenReference, figures
from fitscale.eval.frechet import Statistics, estimate
from fitscale.eval.inception_score import inception_score
from fitscale.eval.kernel import kernel_distance, squared_discrepancy
from fitscale.eval.neighbours import inside

CLOSE = {"rel": 1e-6}


class Same(torch.nn.Module):
    """Stands where torchmetrics expects Inception: its images are features already."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, features):
        return features


def drawn(seed, count, width=12, shift=0.0, scale=1.0):
    """Features like a network's: correlated, with a mean far from 0, float32."""
    mixing = np.random.default_rng(99).normal(size=(width, width)) / width**0.5
    values = np.random.default_rng(seed).normal(size=(count, width)) @ mixing
    return (3 + shift + scale * values).astype(np.float32)


def statistics(features):
    return Statistics(features.mean(0, dtype=np.float64), np.cov(features.astype(np.float64).T))


def probabilities(seed, count, classes=20):
    logits = 3 * np.random.default_rng(seed).normal(size=(count, classes))
    return torch.from_numpy(logits).softmax(1).numpy(), torch.from_numpy(logits)


def values(found):
    return {figure.metric: figure.value for figure in found}


@pytest.fixture(scope="module")
def sets():
    return drawn(0, 1500, shift=0.1), drawn(1, 1300)


def test_frechet_distance_is_that_of_torchmetrics(sets):
    samples, reference = sets
    metric = FrechetInceptionDistance(feature=Same(12))
    metric.set_dtype(torch.float64)
    metric.update(torch.from_numpy(reference).double(), real=True)
    metric.update(torch.from_numpy(samples).double(), real=False)
    assert estimate(samples, statistics(reference)).value == pytest.approx(metric.compute().item(), **CLOSE)


def test_spatial_distance_is_that_of_numpy(sets):
    samples, reference = sets
    spatial = (
        Seen(samples[:, :4], spatial_NS=samples),
        SeenReference(statistics(reference[:, :4]), statistics(reference)),
    )
    first, second = np.cov(samples.astype(np.float64).T), np.cov(reference.astype(np.float64).T)
    gap = samples.mean(0, dtype=np.float64) - reference.mean(0, dtype=np.float64)
    expected = gap @ gap + np.trace(first + second - 2 * linalg.sqrtm(first @ second).real)
    assert values(figures(*spatial))["sfid"] == pytest.approx(expected, **CLOSE)


def test_kernel_distance_is_that_of_torchmetrics(sets):
    samples, reference = (features[:900] for features in sets)
    metric = KernelInceptionDistance(feature=Same(12), subsets=1, subset_size=900)
    metric.update(torch.from_numpy(reference).double(), real=True)
    metric.update(torch.from_numpy(samples).double(), real=False)
    found = squared_discrepancy(samples.astype(np.float64), reference.astype(np.float64))
    assert found == pytest.approx(metric.compute()[0].item(), **CLOSE)


def discrepancy_of_pairs(first, second):
    """The mean over all pairs by torchmetrics' kernel, corrected for those of an image with itself."""
    first, second = torch.from_numpy(first), torch.from_numpy(second)
    own = [poly_kernel(x, x) for x in (first, second)]
    within = [(k.mean() * len(k) - k.diagonal().mean()) / (len(k) - 1) for k in own]
    return (sum(within) - 2 * poly_kernel(first, second).mean()).item()


def test_kernel_distance_is_the_mean_over_subsets_that_share_no_image(sets):
    samples, reference = (features.astype(np.float64) for features in sets)
    rng = np.random.default_rng(kernel.SEED)
    first, second = rng.permutation(1500), rng.permutation(1300)
    parts = zip(first.reshape(10, 150), second.reshape(10, 130), strict=True)
    expected = [discrepancy_of_pairs(samples[x], reference[y]) for x, y in parts]
    value, error = kernel_distance(samples, reference)
    assert value == pytest.approx(np.mean(expected), **CLOSE)
    assert error == pytest.approx(np.std(expected, ddof=1) / 10**0.5, **CLOSE)


def test_inception_score_is_that_of_torchmetrics():
    """Whose splits are 10 equal parts of the images in random order."""
    scores, logits = probabilities(2, 1000)
    metric = InceptionScore(feature=Same(20), splits=10)
    metric.update(logits)
    torch.manual_seed(5)
    expected = metric.compute()[0].item()
    torch.manual_seed(5)
    order = torch.randperm(1000).numpy()
    assert inception_score(scores[order], split=100)[0] == pytest.approx(expected, **CLOSE)


def test_inception_score_splits_as_adm_does():
    """Its evaluator's own loop, over consecutive images, a short split at the end counting as much as the others."""
    scores, _ = probabilities(3, 5300)
    expected = []
    for start in (0, 5000):
        part = scores[start : start + 5000]
        gain = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        expected.append(np.exp(gain.sum(1).mean()))
    assert inception_score(scores)[0] == pytest.approx(np.mean(expected), **CLOSE)


def test_neighbours_are_those_of_prdc(sets):
    samples, reference = sets
    found = inside(samples, reference)
    three, five = (prdc.compute_prdc(reference, samples, nearest_k=k) for k in (3, 5))
    assert 0.1 < three["recall"] < three["precision"] < 0.99
    assert found.precision_N.mean() == pytest.approx(three["precision"], **CLOSE)
    assert found.recall_M.mean() == pytest.approx(three["recall"], **CLOSE)
    assert found.density_N.mean() == pytest.approx(five["density"], **CLOSE)
    assert found.coverage_M.mean() == pytest.approx(five["coverage"], **CLOSE)


def test_every_figure_comes_from_one_set(sets):
    samples, reference = sets
    scores, _ = probabilities(4, 1500)
    labels = np.where(np.arange(1500) % 4 == 0, 0, scores.argmax(1))
    found = figures(
        Seen(samples, samples[:, :5], scores),
        SeenReference(statistics(reference), statistics(reference[:, :5]), reference),
        labels,
    )
    names = "fd fd_infinity sfid kid precision recall density coverage inception_score recognised"
    assert [figure.metric for figure in found] == names.split()
    recognised = found[-1]
    share = (labels == scores.argmax(1)).mean()
    assert recognised.value == share
    assert recognised.standard_error == pytest.approx((share * (1 - share) / 1499) ** 0.5)


def test_what_is_not_known_is_left_out(sets):
    samples, reference = sets
    found = figures(Seen(samples, samples), SeenReference(statistics(reference)))
    assert [figure.metric for figure in found] == ["fd", "fd_infinity"]
    with pytest.raises(UserError, match="same feature network"):
        figures(Seen(samples), SeenReference(statistics(reference[:, :5])))


@pytest.mark.parametrize(
    ("count", "of_reference", "expected"),
    [
        (1, 100, "precision density coverage"),
        (3, 100, "fd precision density coverage"),
        (4, 5, "fd precision recall"),
        (4, 3, "fd recall"),
        (20, 20, "fd kid precision recall density coverage"),
        (24, 6, "fd precision recall density coverage"),
    ],
)
def test_too_few_images_leave_a_figure_out(count, of_reference, expected):
    reference = drawn(6, of_reference)
    found = figures(Seen(drawn(5, count)), SeenReference(statistics(drawn(7, 100)), None, reference))
    assert [figure.metric for figure in found] == expected.split()
    assert all(np.isfinite(figure.value) for figure in found)


def test_equal_features():
    """The reference as samples: nothing is outside; the distances are 0 to rounding."""
    features = drawn(8, 500)
    found = values(figures(Seen(features), SeenReference(statistics(features), None, features)))
    assert found["fd"] == pytest.approx(0, abs=1e-6)
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)


def test_constant_features():
    """A collapsed model, and a blind network: balls of radius 0 hold the images that are equal, to the last bit."""
    same = np.full((60, 150), 0.3, dtype=np.float32)
    found = values(figures(Seen(same), SeenReference(statistics(same), None, same)))
    assert found["fd"] == pytest.approx(0, abs=1e-9)
    assert found["kid"] == pytest.approx(0, abs=1e-12)
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)
    other = values(figures(Seen(same + 1), SeenReference(statistics(same), None, same)))
    assert other["fd"] == pytest.approx(150, rel=1e-5)
    assert (other["precision"], other["recall"], other["density"], other["coverage"]) == (0, 0, 0, 0)


def test_one_hot_scores():
    """The score is the number of classes, all as frequent; with one class 1. ADM's formula has 0 times -infinity."""
    every = np.eye(5, dtype=np.float32)[np.arange(100) % 5]
    assert inception_score(every) == (pytest.approx(5), pytest.approx(0, abs=1e-9))
    assert inception_score(every[:1]) == (pytest.approx(1), None)
    assert inception_score(np.tile(every[:1], (40, 1)))[0] == pytest.approx(1)


def test_threads_and_memory_maps_change_no_bit(tmp_path, monkeypatch):
    samples, reference = drawn(9, 1300), drawn(10, 1100)
    scores, _ = probabilities(11, 1300)
    known = SeenReference(statistics(reference), None, reference)
    monkeypatch.setattr(blocks, "MOST_THREADS", 1)
    expected = figures(Seen(samples, None, scores), known)
    monkeypatch.setattr(blocks, "MOST_THREADS", 7)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(7))
    np.save(tmp_path / "features.npy", samples)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    assert figures(Seen(mapped, None, scores), known) == expected


def test_memory_does_not_grow_with_the_product_of_the_sets(monkeypatch):
    monkeypatch.setattr(blocks, "MOST_THREADS", 1)
    monkeypatch.setattr(neighbours, "_COLUMNS", 256)
    peaks = []
    for count in (1100, 2200):
        samples, reference = drawn(12, count, width=4), drawn(13, count, width=4)
        tracemalloc.start()
        inside(samples, reference)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_standard_error_of_the_distance_is_its_spread_over_draws():
    reference = Statistics(np.zeros(6), np.eye(6))
    rng = np.random.default_rng(14)
    found = [estimate(rng.normal(0.2, 1.1, size=(400, 6)).astype(np.float32), reference) for _ in range(40)]
    spread = np.std([each.value for each in found], ddof=1)
    assert np.mean([each.standard_error for each in found]) == pytest.approx(spread, rel=0.25)


def test_distance_of_endless_images():
    """Against the closed form: what one thousand images add to it is gone, to within its standard error."""
    truth = 8 * (0.3**2 + 0.1**2)
    reference = Statistics(np.zeros(8), np.eye(8))
    rng = np.random.default_rng(15)
    found = [estimate(rng.normal(0.3, 1.1, size=(1000, 8)).astype(np.float32), reference) for _ in range(25)]
    error_of_mean = np.mean([each.standard_error for each in found]) / 25**0.5
    assert np.mean([each.value for each in found]) - truth > 3 * error_of_mean
    assert abs(np.mean([each.limit for each in found]) - truth) < 3 * error_of_mean
    assert estimate(rng.normal(size=(17, 8)).astype(np.float32), reference).limit is None
