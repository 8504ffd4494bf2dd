# SPDX-License-Identifier: Apache-2.0
"""Percentile and least-error scales: against exact quantiles, brute force, and the Gaussian's best clip."""

import math

import pytest
import torch
from scipy import integrate, optimize, stats
from torch import distributed, multiprocessing, nn

import fastflat as ff
from fastflat.quant import Quantizer
from fastflat.quant._histogram import HALF, Histogram, exact_quantile
from fastflat.quant._search import error_on_histogram, least_error
from tests.ranks import leave

SIGNED = ff.QuantSpec(bits=4)
AFFINE = ff.QuantSpec(bits=4, signed=False, symmetric=False)


def started(x, spec, method, **settings):
    quantizer = Quantizer.like(x, spec)
    quantizer.initialise_from(x, method, **settings)
    return quantizer


def calibrated(batches, spec, method, **settings):
    """The input quantizer of a layer that saw the batches, ``[..., K]`` each."""
    torch.manual_seed(0)
    model = ff.prepare(nn.Sequential(nn.Linear(batches[0].shape[-1], 2)), activations=spec)
    return ff.calibrate(model, batches, method=method, **settings)[0].input_quantizer


def gaussian(n):
    return torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n).float()


# Histograms ---------------------------------------------------------------------------------------------------------


def test_a_histogram_depends_on_the_data_and_not_on_their_batches_or_order():
    x = torch.randn(3, 1001, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x *= torch.tensor([1e-3, 1.0, 1e30], dtype=torch.float64).unsqueeze(1)
    x[0, 500:] *= 64  # widens the bins on the way

    def of(*batches):
        histogram = Histogram(3, "cpu")
        for b in batches:
            histogram.update(b, b.abs().amax(1))
        return histogram

    whole, parts = of(x), of(*x.split(77, dim=1))
    reverse = of(*x.flip(1).split(400, dim=1))
    for other in (parts, reverse):
        assert torch.equal(whole.counts, other.counts)
        assert torch.equal(whole.exponent, other.exponent)
    assert whole.counts.sum(1).tolist() == [1001] * 3
    for row, counts, edges in zip(x, whole.counts, whole.edges()):
        want, _ = torch.histogram(row, bins=edges)
        assert torch.equal(counts.double(), want)
    assert bool((whole.width <= 2 * x.abs().amax(1) / whole.half).all())


@pytest.mark.parametrize("values", [[0.0, -0.0], [5e-324, 1.0], [1.7e308, -1.7e308], [-1.0, -1.0], [1e-310, 2e-310]])
def test_a_histogram_holds_extreme_values(values):
    histogram = Histogram(1, "cpu")
    x = torch.tensor([values], dtype=torch.float64)
    histogram.update(x, x.abs().amax(1))
    assert int(histogram.counts.sum()) == 2
    assert int(histogram.coarse(4).counts.sum()) == 2


def test_many_scales_share_a_bounded_memory():
    assert Histogram(1, "cpu").half == HALF
    assert Histogram(2048, "cpu").counts.numel() == 2**22


# Percentiles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.9, 0.9999, 1.0])
@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_exact_quantiles_are_torchs(share, n):
    rows = torch.randn(3, n, dtype=torch.float64)
    torch.testing.assert_close(exact_quantile(rows, share), torch.quantile(rows, share, dim=1), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "spec", [SIGNED, SIGNED.replace(axis=0), SIGNED.replace(group=5), SIGNED.replace(signed=False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensors_percentile_is_torchs(spec, dtype):
    x = torch.randn(6, 35, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = {(0, None): x, (None, None): x.reshape(1, -1), (None, 5): x.reshape(-1, 5)}[spec.axis, spec.group]
    want = torch.quantile(rows.double().abs(), 0.95, dim=1) / spec.qmax
    got = started(x, spec, "percentile", q=95).scale
    torch.testing.assert_close(got.flatten().double(), want, rtol=1e-6, atol=0)


def test_an_affine_percentile_cuts_both_ends():
    x = torch.randn(20000) + 0.5
    x[0], x[1] = 1000.0, -1000.0
    quantizer = started(x, AFFINE, "percentile", q=99)
    low, high = torch.quantile(x.double(), torch.tensor([0.01, 0.99], dtype=torch.float64))
    torch.testing.assert_close(quantizer.scale.double(), (high - low) / 15, rtol=1e-6, atol=0)
    assert int(quantizer.zero_point) == round(float(-low / ((high - low) / 15)))


@pytest.mark.parametrize("q", [60, 99.0, None, 100])
@pytest.mark.parametrize("spec", [SIGNED, SIGNED.replace(axis=-1), AFFINE, AFFINE.replace(zero="float")])
def test_streamed_percentiles_are_exact_to_a_bin(spec, q):
    x = torch.randn(5000, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 30.0, 0.01])
    streamed = calibrated(list(x.split(700)), spec, "percentile", q=q)
    exact = started(x, spec, "percentile", q=q)
    spread = x.abs().amax(0) if spec.axis is not None else x.abs().max()
    bins = 2 * 2 / HALF * spread / (spec.qmax - min(spec.qmin, 0) if not spec.symmetric else spec.qmax)
    assert bool(((streamed.scale - exact.scale).abs() <= bins + 1e-6 * exact.scale).all())
    if spec.zero != "float" and not spec.symmetric:
        assert torch.equal(streamed.zero_point, exact.zero_point)
    if q == 100:
        assert torch.equal(streamed.scale, exact.scale)
        simple = started(x, spec, "absmax" if spec.symmetric else "minmax")
        assert torch.equal(exact.scale, simple.scale)


# Least error --------------------------------------------------------------------------------------------------------


def gaussian_error(s, qmin, qmax):
    """Mean squared error of N(0, 1) on the grid, by integration between the decision thresholds."""
    ends = [-math.inf, *((k + 0.5) * s for k in range(qmin, qmax)), math.inf]
    return sum(
        integrate.quad(lambda t, k=k: (t - k * s) ** 2 * stats.norm.pdf(t), a, b)[0]
        for k, a, b in zip(range(qmin, qmax + 1), ends, ends[1:])
    )


@pytest.mark.parametrize(("bits", "narrow"), [(2, True), (3, True), (4, True), (4, False), (6, False)])
def test_the_best_clip_of_a_gaussian_is_that_of_integration(bits, narrow):
    spec = ff.QuantSpec(bits=bits, narrow=narrow)
    best = optimize.minimize_scalar(gaussian_error, (0.05, 0.4), args=(spec.qmin, spec.qmax), tol=1e-8)
    x = gaussian(100001)
    for found in (started(x, spec, "mse"), calibrated([x[::2, None], x[1::2, None]], spec, "mse")):
        assert float(found.scale) == pytest.approx(best.x, rel=6e-3)
        error = float((found(x) - x).double().square().mean())
        assert error == pytest.approx(best.fun, rel=6e-3)  # the sample has no far tails
    if bits == 4 and narrow:
        assert 2.3 < 7.5 * best.x < 2.8  # the known 2.5 to 2.6 standard deviations


@pytest.mark.parametrize("spec", [SIGNED, SIGNED.replace(signed=False), ff.QuantSpec(bits=2), ff.QuantSpec(bits=1)])
@pytest.mark.parametrize("shape", ["normal", "laplace", "outlier", "few"])
def test_no_scale_of_a_fine_grid_is_better(spec, shape):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(37 if shape == "few" else 2001, generator=g)
    if shape == "laplace":
        x = x * torch.rand(2001, generator=g).log().abs().sqrt()
    if shape == "outlier":
        x[7] = 60.0
    found = float((started(x, spec, "mse")(x) - x).double().square().sum())
    brute = []
    for s in torch.logspace(-4, 0.3, 3000, base=10) * x.abs().max():
        brute.append(float((ff.fake_quantize(x, s, spec=spec) - x).double().square().sum()))
    assert found <= 1.02 * min(brute)
    assert found <= float((started(x, spec, "absmax")(x) - x).double().square().sum())


@pytest.mark.parametrize("zero", ["outside", "float"])
def test_an_affine_grid_fits_a_skewed_distribution(zero):
    spec = AFFINE.replace(zero=zero)
    x = torch.distributions.Gamma(2.0, 1.0).sample((4001,)) - 0.5
    x[0] = 40.0
    quantizer = started(x, spec, "mse")
    found = float((quantizer(x) - x).double().square().sum())
    brute = []
    for s in torch.linspace(0.02, 1.5, 300):
        for z in range(16):
            z = torch.tensor(float(z))
            brute.append(float((ff.fake_quantize(x, s, z, spec=spec) - x).double().square().sum()))
    assert found <= 1.02 * min(brute)
    streamed = calibrated([b[:, None] for b in x.split(1000)], spec, "mse")
    assert float((streamed(x) - x).double().square().sum()) <= 1.02 * min(brute)


@pytest.mark.parametrize("axes", [{"axis": 0}, {"axis": 1}, {"group": 8}])
@pytest.mark.parametrize("form", [SIGNED, AFFINE])
def test_scales_are_sought_each_for_itself(axes, form):
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [9.0], [0.1], [2.0]])
    found = started(x, form.replace(**axes), "mse")
    if axes == {"group": 8}:
        parts = x.reshape(8, 8)
    else:
        parts = x if axes == {"axis": 0} else x.T.contiguous()
    alone = [started(part, form, "mse") for part in parts]
    torch.testing.assert_close(found.scale.flatten(), torch.stack([q.scale for q in alone]), rtol=1e-6, atol=0)


def test_a_scale_that_represents_the_data_exactly_is_found_again_and_again():
    x = 0.37 * torch.arange(-8, 8).float().repeat(3)
    first, second = started(x, SIGNED, "mse"), started(x, SIGNED, "mse")
    assert torch.equal(first.scale, second.scale)
    assert (first(x) - x).abs().max() < 1e-3


@pytest.mark.parametrize("factor", [1e-30, 1e-40, 1e30])
def test_small_and_large_data_find_the_scale_of_data_between(factor):
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    want = started(x, SIGNED, "mse").scale
    double = started(x.double() * factor, SIGNED, "mse").scale
    if factor > 1e-38:
        torch.testing.assert_close(started(x * factor, SIGNED, "mse").scale, want * factor, rtol=1e-3, atol=0)
        torch.testing.assert_close(double, want.double() * factor, rtol=1e-3, atol=0)
    else:
        assert bool(double > 0)  # held by eps


def test_the_integral_over_bins_is_the_error_of_data_spread_in_them():
    spec = ff.QuantSpec(bits=3, signed=False, symmetric=False)
    x = (torch.arange(400000, dtype=torch.float64) + 0.5).reshape(1, -1) / 1e5 - 1.5
    histogram = Histogram(1, "cpu")
    histogram.update(x, x.abs().amax(1))
    scale, zero = torch.tensor([0.41], dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64)
    got = error_on_histogram(histogram, spec)(scale, zero)
    y = ff.fake_quantize(x, scale[0], zero[0], spec=spec)
    torch.testing.assert_close(got, (y - x).square().sum(1), rtol=1e-4, atol=0)


def test_the_search_follows_its_error_function():
    def error(scale, _):
        return (scale - torch.tensor([0.03, 0.5], dtype=torch.float64)).abs()

    extreme = torch.tensor([7.0, 7.0], dtype=torch.float64)
    scale, zero = least_error(-extreme, extreme, SIGNED, error)
    torch.testing.assert_close(scale, torch.tensor([0.03, 0.5], dtype=torch.float64), rtol=3e-4, atol=0)
    assert zero is None


# Bad input, ranks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["percentile", "mse"])
@pytest.mark.parametrize("spec", [SIGNED, AFFINE, SIGNED.replace(axis=-1)])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 2), "scale must be finite and positive, got data that are all zero"),
        (torch.tensor([[1.0, math.nan]]), "got NaN or inf in the data"),
        (torch.tensor([[-math.inf, 1.0]]), "got NaN or inf in the data"),
        (torch.zeros(0, 2), "data must reach the quantizer, got none"),
    ],
)
def test_data_that_give_no_scale_are_refused(method, spec, x, message):
    with pytest.raises(ValueError, match=message) as one:
        started(x, spec, method)
    with pytest.raises(ValueError, match=message) as many:
        calibrated([x], spec, method)
    assert "\n" not in str(one.value) + str(many.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "percentile", "q": 50}, "q must be a percentile above 50 and up to 100, got 50"),
        ({"method": "percentile", "q": math.nan}, "q must be a percentile above 50"),
        ({"method": "percentile", "q": "99"}, "q must be a percentile above 50"),
        ({"method": "mse", "q": 99.0}, r"q must be None without method='percentile', got 99\.0"),
        ({"method": "median"}, "method must be one of lsq, absmax, moving, percentile, mse"),
    ],
)
def test_misuse_is_named(arguments, message):
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match=message):
        started(x, SIGNED, **arguments)
    with pytest.raises(ValueError, match=message):
        calibrated([x], SIGNED, **arguments)


def test_a_percentile_of_zero_says_what_helps():
    x = torch.zeros(1000)
    x[0] = 1
    with pytest.raises(ValueError, match=r"got a percentile \(q=99\) that is zero; raise q"):
        started(x, SIGNED, "percentile", q=99)


def test_calibrate_takes_both_methods_for_a_network(net, x):
    spec = ff.QuantSpec(bits=4, axis=0)
    ff.prepare(net, weights=spec, activations=ff.QuantSpec(bits=4, signed=False), skip=("conv1",))
    ff.calibrate(net, [x, x], method="mse")
    first = net.fc.input_quantizer.scale.clone()
    ff.calibrate(net, [x, x], method="percentile", q=99.9, again=True)
    assert net.fc.input_quantizer.scale != first
    weight = net.fc.weight
    before = (net.fc.quantized_weight() - weight).square().sum(1)
    net.fc.weight_quantizer.initialise_from(weight, "mse")
    assert bool(((net.fc.quantized_weight() - weight).square().sum(1) <= before).all())


def _rank(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for method in ("percentile", "mse"):
        for name, spec in (("one", SIGNED), ("each", SIGNED.replace(axis=-1)), ("affine", AFFINE)):
            found[f"{method} {name}"] = calibrated(data(rank), spec, method).state_dict()
    torch.save(found, f"{folder}/rank{rank}.pt")
    leave()


def data(rank):
    """Ranks with other numbers of batches and other ranges."""
    g = torch.Generator().manual_seed(rank)
    return [torch.randn(50, 3, generator=g) * (1 + 9 * rank) for _ in range(2 + rank)]


def test_two_ranks_find_what_one_process_finds_in_all_data(tmp_path):
    multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2, join=True)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for method in ("percentile", "mse"):
        for name, spec in (("one", SIGNED), ("each", SIGNED.replace(axis=-1)), ("affine", AFFINE)):
            want = calibrated(data(0) + data(1), spec, method).state_dict()
            for key, value in want.items():
                assert torch.equal(first[f"{method} {name}"][key], value), (method, name, key)
                assert torch.equal(second[f"{method} {name}"][key], value), (method, name, key)
