"""FD against SciPy's matrix root and torchmetrics, KD against loops; sets that leave nothing to estimate."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diff2to3.metrics.distribution import FeatureMoments, frechet_distance, kernel_distance, mmd2_unbiased


def features(count: int, channels: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator)
    return torch.randn(count, channels, generator=generator) @ mixing + seed


def reference_fd(x: np.ndarray, y: np.ndarray) -> float:
    """The textbook formula with SciPy's general matrix root."""
    linalg = pytest.importorskip("scipy.linalg")
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(a @ b)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * np.real(root)))


def loops_mmd2(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(u: np.ndarray, v: np.ndarray) -> float:
        return float((u @ v / len(u) + 1) ** 3)

    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(kernel(u, v) for u in x for v in y) / (n * m)


def fd(x: Tensor, y: Tensor) -> float:
    return frechet_distance(FeatureMoments.of([x]), FeatureMoments.of([y]))


@pytest.mark.parametrize(("n", "m", "channels"), [(200, 300, 16), (90, 70, 48), (64, 500, 3)])
def test_fd_agrees_with_scipy(n, m, channels):
    x, y = features(n, channels, 1), features(m, channels, 2)
    assert fd(x, y) == pytest.approx(reference_fd(x.double().numpy(), y.double().numpy()), rel=1e-6)


def test_fd_agrees_with_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    x, y = features(150, 24, 3).double(), features(140, 24, 4).double()
    reference = fid._compute_fid(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert fd(x, y) == pytest.approx(float(reference), rel=1e-6)


def test_fd_of_gaussians_in_one_dimension_is_the_closed_form():
    x, y = features(40, 1, 1).double(), features(30, 1, 2).double()
    expected = (x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2
    assert fd(x, y) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize(("count", "channels"), [(300, 20), (10, 64), (2, 8)])
def test_fd_of_a_set_with_itself_is_nothing(count, channels):
    x = features(count, channels, 5)
    assert 0 <= fd(x, x) <= 1e-6
    assert 0 <= fd(x, x.flip(0)) <= 1e-6


def test_fd_with_fewer_images_than_channels():
    """Singular covariances: by the singular values of the centred data, which need no matrix root."""
    x, y = features(7, 40, 6).double(), features(9, 40, 7).double()
    a, b = ((t - t.mean(0)) / (len(t) - 1) ** 0.5 for t in (x, y))
    cross = torch.linalg.svdvals(a @ b.T).sum()  # tr (A'A B'B)^1/2
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * cross
    assert fd(x, y) == pytest.approx(float(expected), rel=1e-9)


def test_fd_of_constant_features():
    zero, one = torch.zeros(5, 4), torch.ones(6, 4)
    assert fd(zero, one) == pytest.approx(4)
    assert fd(one, one) == 0


@given(
    cuts=st.lists(st.integers(0, 60), max_size=5),
    merge=st.integers(0, 60),
    waiting=st.sampled_from([1, 20, 1024]),
)
@settings(max_examples=25, deadline=None)
def test_moments_do_not_depend_on_batches(cuts, merge, waiting):
    x = features(60, 5, 8) + 1000  # an offset that naive sums of squares would lose digits to
    bounds = [0, *sorted(cuts), 60]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureMoments, "WAITING", waiting)
        streamed = FeatureMoments.of(x[a:b] for a, b in pairwise(bounds))
        parts = [FeatureMoments.of([x[:merge]]), FeatureMoments.of([x[merge:]])]
        parts[0].merge(parts[1])
    expected = torch.from_numpy(np.cov(x.double().numpy(), rowvar=False))
    for moments in (streamed, parts[0]):
        assert moments.count == 60
        torch.testing.assert_close(moments.mean, x.double().mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(moments.covariance, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", [1, 3, 100])
def test_kd_is_the_unbiased_estimate(block):
    x, y = features(7, 6, 1).double(), features(9, 6, 2).double()
    assert mmd2_unbiased(x, y, block) == pytest.approx(loops_mmd2(x.numpy(), y.numpy()), rel=1e-10)


def test_kd_over_all_features_and_over_subsets():
    x, y = features(12, 5, 1).double(), features(15, 5, 2).double()
    whole = kernel_distance(x, y, num_subsets=0)
    assert whole.mean == pytest.approx(loops_mmd2(x.numpy(), y.numpy()), rel=1e-10) and whole.std == 0
    subsets = kernel_distance(x, y, num_subsets=2000, subset_size=6, seed=3)
    assert (subsets.num_subsets, subsets.subset_size, subsets.seed) == (2000, 6, 3)
    # Unbiased: the mean over subsets goes to the whole, at the rate of its own standard error.
    assert abs(subsets.mean - whole.mean) < 5 * subsets.std / 2000**0.5
    assert subsets == kernel_distance(x, y, num_subsets=2000, subset_size=6, seed=3)
    assert subsets.mean != kernel_distance(x, y, num_subsets=2000, subset_size=6, seed=4).mean


def test_kd_agrees_with_torchmetrics():
    kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = features(20, 8, 1).double(), features(20, 8, 2).double()
    assert kernel_distance(x, y, num_subsets=0).mean == pytest.approx(float(kid.poly_mmd(x, y)), rel=1e-9)


def test_kd_subsets_are_no_larger_than_the_sets():
    result = kernel_distance(features(8, 4, 1), features(5, 4, 2), num_subsets=3)
    assert result.subset_size == 5


def test_kd_of_one_set_is_around_zero():
    x = features(40, 6, 1)
    assert kernel_distance(x, x, num_subsets=0).mean < 0  # unbiased: the diagonal counts in one term only
    constant = torch.ones(4, 3)
    assert kernel_distance(constant, constant).mean == pytest.approx(0, abs=1e-12)


def test_sets_too_small_or_broken_are_refused():
    x = features(4, 3, 1)
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        fd(x[:1], x)
    with pytest.raises(ValueError, match="reference: KD needs at least 2 images, got 1"):
        kernel_distance(x, x[:1])
    with pytest.raises(ValueError, match="expected at least one batch"):
        FeatureMoments.of([])
    with pytest.raises(ValueError, match="3 and 4 channels"):
        fd(x, features(5, 4, 1))
    with pytest.raises(ValueError, match="NaN or infinite features"):
        FeatureMoments.of([x / 0])
    with pytest.raises(ValueError, match=r"reference: expected \[N, 3\]"):
        kernel_distance(x, features(5, 4, 1))
