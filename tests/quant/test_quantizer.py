# SPDX-License-Identifier: Apache-2.0
"""Quantizer: its scale's shape and start, its switches, its state."""

import copy
import math

import pytest
import torch

import fastflat as ff
from fastflat.quant import Quantizer
from fastflat.quant.eager import BuiltinQuantizer, EagerQuantizer

LSQ = ff.QuantSpec.lsq


@pytest.mark.parametrize(
    ("spec", "shape"),
    [(LSQ(), ()), (LSQ(axis=0), (6,)), (LSQ(axis=-1), (8,)), (LSQ(group=4), (6, 2)), (ff.QuantSpec(bits=3), ())],
)
def test_scale_has_the_specs_shape_and_is_trained_with_lsq_only(spec, shape):
    q = Quantizer.like(torch.randn(6, 8), spec)
    assert q.scale.shape == shape
    trained = spec.estimator == "lsq"
    assert isinstance(q.scale, torch.nn.Parameter) == trained
    assert ("scale" in dict(q.named_parameters())) == trained
    assert q.zero_point is None


@pytest.mark.parametrize("spec", [LSQ(bits=4, axis=0), LSQ(bits=2), LSQ(bits=3, group=4), LSQ(bits=4, signed=False)])
def test_lsq_start_is_the_papers(spec):
    x = torch.randn(6, 8, dtype=torch.float64)
    q = Quantizer.like(x, spec)
    q.initialise_from(x)
    rows = {0: x, None: x.reshape(1, -1)}[spec.axis] if spec.group is None else x.reshape(-1, spec.group)
    want = 2 * rows.abs().mean(1) / math.sqrt(spec.qmax)
    torch.testing.assert_close(q.scale.detach().reshape(-1), want, rtol=1e-12, atol=0)


def test_absmax_start_clips_nothing_and_minmax_holds_zero_exactly():
    x = torch.randn(5, 9)
    q = Quantizer.like(x, ff.QuantSpec(bits=4, axis=0))
    q.initialise_from(x)
    assert torch.equal(q.scale, (x.double().abs().amax(1) / 7).float())
    affine = ff.QuantSpec(bits=4, signed=False, symmetric=False)
    z = Quantizer.like(x, affine)
    z.initialise_from(x + 1)
    assert torch.equal(z(torch.zeros(3)), torch.zeros(3))
    worst = (z(x + 1) - (x + 1)).abs().max()
    assert worst <= z.scale * 1.001  # rounding of the value and of the zero-point: half a step each


def test_forward_is_the_public_op_in_both_modes_and_casts_in_the_same_pass():
    x = torch.randn(6, 8)
    q = Quantizer.like(x, LSQ(axis=0))
    q.initialise_from(x)
    want = ff.fake_quantize(x, q.scale, spec=q.spec)
    assert torch.equal(q(x), want)
    assert torch.equal(q.eval()(x), want)
    assert torch.equal(q(x, torch.bfloat16), ff.fake_quantize(x, q.scale, spec=q.spec, dtype=torch.bfloat16))


def test_off_lets_data_pass():
    x = torch.randn(4)
    q = Quantizer.like(x, LSQ())
    q.enabled = False
    assert q(x) is x
    assert torch.equal(q(x, torch.bfloat16), x.bfloat16())
    assert "off" in repr(q)


def test_without_a_scale_a_call_raises_and_says_what_to_do():
    q = Quantizer(LSQ())
    with pytest.raises(RuntimeError, match=r"fastflat::Quantizer: no scale yet; call fastflat\.calibrate"):
        q(torch.ones(2))
    assert not q.calibrated
    assert "no scale yet" in repr(q)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_bad_scales_are_refused_and_the_old_one_stays(bad):
    q = Quantizer(LSQ(axis=0), (3,))
    q.set_scale(torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="scale must be finite and positive, got"):
        q.set_scale(torch.tensor([1.0, bad, 3.0]))
    assert q.scale.tolist() == [1, 2, 3]


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, math.nan], [math.inf, 1.0]])
def test_data_without_a_usable_scale_is_refused(values):
    q = Quantizer(LSQ())
    with pytest.raises(ValueError, match="scale must be finite and positive, got"):
        q.initialise_from(torch.tensor(values))
    assert not q.calibrated


def test_a_channel_of_zeros_takes_the_largest_scale_beside_it():
    x = torch.tensor([[1.0, -1.0], [0.0, 0.0], [4.0, 4.0]])
    q = Quantizer.like(x, LSQ(axis=0))
    q.initialise_from(x)
    assert q.scale[1] == q.scale[2] == q.scale.max()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quantizer("lsq"), "spec must be a QuantSpec, got str"),
        (lambda: Quantizer(LSQ(), (3,)), r"shape must have no axis"),
        (lambda: Quantizer(LSQ(axis=0)), r"shape must be \(C,\)"),
        (lambda: Quantizer(LSQ()).initialise_from(torch.ones(2), "median"), "method must be one of lsq, absmax"),
        (lambda: Quantizer(LSQ()).initialise_from(torch.ones(2), "minmax"), "method must be one of lsq, absmax"),
        (lambda: EagerQuantizer(LSQ(group=4), (2,)), "spec.group must be None, got 4"),
        (lambda: EagerQuantizer(LSQ(noise="uniform")), "spec.noise must be 'none', got 'uniform'"),
        (lambda: BuiltinQuantizer(LSQ(estimator="pact")), "spec.estimator must be 'ste' or 'lsq', got 'pact'"),
        (lambda: EagerQuantizer(LSQ(mask="after")), "spec.mask must be 'before', got 'after'"),
    ],
)
def test_misuse_is_named(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_state_round_trip_and_deepcopy():
    x = torch.randn(6, 8)
    q = Quantizer.like(x, LSQ(axis=0, symmetric=False, zero="float"))
    q.initialise_from(x)
    state = q.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    fresh = Quantizer.like(x, q.spec)
    fresh.load_state_dict(state)
    assert fresh.calibrated
    assert torch.equal(fresh(x), q(x))
    twin = copy.deepcopy(q)
    with torch.no_grad():
        twin.scale.mul_(2)
    assert not torch.equal(twin(x), q(x))
    unset = Quantizer.like(x, q.spec)
    fresh.load_state_dict(unset.state_dict())
    assert not fresh.calibrated


@pytest.mark.parametrize("spec", [LSQ(bits=4), LSQ(bits=3, signed=False), LSQ(bits=4, axis=0), LSQ(bits=2, axis=-1)])
def test_the_eager_quantizer_computes_the_same_value_and_gradients(spec):
    x = torch.randn(6, 8)
    ours, eager = Quantizer.like(x, spec), EagerQuantizer.like(x, spec)
    results = []
    for q in (ours, eager):
        q.initialise_from(x)
        v = x.clone().requires_grad_()
        y = q(v)
        (y * torch.arange(48.0).view(6, 8)).sum().backward()
        results.append((y.detach(), v.grad, q.scale.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=0)  # the eager form computes g * s / s
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [None, 0])
def test_the_builtin_quantizer_rounds_to_the_same_codes(axis):
    x = torch.randn(6, 8)
    ours, builtin = Quantizer.like(x, LSQ(axis=axis)), BuiltinQuantizer.like(x, LSQ(axis=axis))
    for q in (ours, builtin):
        q.initialise_from(x)
    torch.testing.assert_close(builtin(x), ours(x), rtol=1e-6, atol=0)
    builtin(x).sum().backward()
    assert builtin.scale.grad.shape == builtin.scale.shape


@pytest.mark.parametrize("estimator", ["pact", "ewgs"])
def test_every_estimator_but_ste_trains_its_scale(estimator):
    q = Quantizer(ff.QuantSpec(bits=4, estimator=estimator))
    assert isinstance(q.scale, torch.nn.Parameter)


@pytest.mark.parametrize("scale_is", ["log2", "absmax", "range"])
@pytest.mark.parametrize("method", ["absmax", "percentile", "mse"])
def test_scales_are_found_in_the_form_that_the_spec_holds(scale_is, method):
    x = 0.01 * torch.randn(200)
    plain = Quantizer.like(x, ff.QuantSpec(bits=4))
    plain.initialise_from(x, method)
    q = Quantizer.like(x, ff.QuantSpec(bits=4, scale_is=scale_is))
    q.initialise_from(x, method)
    torch.testing.assert_close(q.step, plain.scale, rtol=1e-6, atol=0)
    held = {"log2": plain.scale.log2(), "absmax": 7 * plain.scale, "range": 15 * plain.scale}[scale_is]
    torch.testing.assert_close(q.scale, held, rtol=1e-6, atol=0)
    torch.testing.assert_close(q(x), plain(x), rtol=1e-5, atol=0)
    fresh = Quantizer.like(x, q.spec)
    fresh.load_state_dict(q.state_dict())  # a logarithm may be negative
    assert torch.equal(fresh(x), q(x))
    with pytest.raises(ValueError, match="scale must be finite"):
        q.set_scale(torch.tensor(math.nan))


@pytest.mark.parametrize("chance", [{"noise": "uniform"}, {"noise": "bypass"}, {"rounding": "stochastic"}])
def test_evaluation_knows_no_chance(chance):
    spec = ff.QuantSpec(bits=3, **chance)
    x = torch.randn(500)
    q = Quantizer.like(x, spec)
    q.initialise_from(x, "mse")
    want = ff.fake_quantize(x, q.scale, spec=ff.QuantSpec(bits=3))
    assert not torch.equal(q(x), want)
    assert torch.equal(q.evaluated(x), want)
    assert q.training
    assert torch.equal(q.eval()(x), want)


@pytest.mark.parametrize("form", ["binary", "ternary", "e4m3", "e2m1"])
def test_other_formats_take_a_scale_of_the_least_error(form):
    x = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    found, simple = (Quantizer.like(x, ff.QuantSpec(format=form)) for _ in range(2))
    found.initialise_from(x, "mse")
    simple.initialise_from(x, "absmax")
    error = [(q(x) - x).double().square().mean() for q in (found, simple)]
    assert error[0] <= error[1]
    if form == "binary":
        torch.testing.assert_close(found.scale, x.abs().mean(), rtol=1e-3, atol=0)  # Rastegari et al., 2016
    model = ff.prepare(torch.nn.Sequential(torch.nn.Linear(7, 2)), activations=found.spec)
    with pytest.raises(ValueError, match="method must not be 'mse' for data in batches in the format"):
        ff.calibrate(model, [x[:7].view(1, 7)], method="mse")
