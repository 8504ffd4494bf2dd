# SPDX-License-Identifier: Apache-2.0
"""calibrate(): the scales it finds, what it leaves alone, and agreement between ranks."""

import math

import pytest
import torch
from torch import distributed, multiprocessing, nn

import fastflat as ff
from fastflat.quant import quantizers
from tests.ranks import leave

from .conftest import ACTIVATIONS, WEIGHTS, Net


def waiting(net):
    return ff.prepare(net, weights=WEIGHTS, activations=ACTIVATIONS, skip=("conv1",))


def single(spec):
    torch.manual_seed(0)
    return ff.prepare(nn.Sequential(nn.Linear(4, 2)), activations=spec)


def scale_of(model):
    return model[0].input_quantizer.scale.detach()


def test_scales_come_from_all_batches():
    batches = [torch.rand(3, 4), torch.rand(5, 4), torch.rand(0, 4)]
    model = ff.calibrate(single(ACTIVATIONS), batches)
    mean = torch.cat(batches).double().abs().mean()
    torch.testing.assert_close(scale_of(model).double(), 2 * mean / math.sqrt(15), rtol=1e-6, atol=0)
    model = ff.calibrate(single(ACTIVATIONS), batches, method="absmax")
    assert torch.equal(scale_of(model), (torch.cat(batches).double().max() / 15).float())
    model = ff.calibrate(single(ACTIVATIONS), batches, method="moving")
    first, second = batches[0].max().double(), batches[1].max().double()
    torch.testing.assert_close(scale_of(model).double(), (first + 0.1 * (second - first)) / 15, rtol=1e-6, atol=0)


def test_affine_activations_take_minimum_and_maximum():
    x = torch.rand(50, 4) * 3 - 1
    model = ff.calibrate(single(ff.QuantSpec(bits=8, signed=False, symmetric=False)), [x])
    assert (model[0].input_quantizer(x) - x).abs().max() <= scale_of(model) * 1.001


def test_channels_of_the_input_each_get_a_scale():
    x = torch.rand(8, 4) * torch.tensor([1.0, 2.0, 3.0, 4.0])
    model = ff.calibrate(single(ff.QuantSpec.lsq(signed=False, axis=-1)), [x], method="absmax")
    assert torch.equal(scale_of(model), (x.double().amax(0) / 15).float())


def test_tuples_and_other_calling_conventions():
    x = torch.rand(3, 4)
    want = scale_of(ff.calibrate(single(ACTIVATIONS), [x]))
    assert torch.equal(scale_of(ff.calibrate(single(ACTIVATIONS), [(x, torch.zeros(3))])), want)
    by_name = ff.calibrate(single(ACTIVATIONS), [{"image": x}], forward=lambda m, batch: m(batch["image"]))
    assert torch.equal(scale_of(by_name), want)


def test_buffers_modes_gradients_and_random_state_are_as_before(net, x):
    waiting(net)
    net.layer2.eval()
    buffers = {name: b.clone() for name, b in net.norm.named_buffers()}
    modes = [m.training for m in net.modules()]
    state = torch.get_rng_state()
    ff.calibrate(net, [x, x], forward=lambda m, batch: m(nn.functional.dropout(batch)))
    assert all(torch.equal(b, buffers[name]) for name, b in net.norm.named_buffers())
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert all(q.calibrated and q.enabled for _, q in quantizers(net))


def test_a_second_time_must_be_asked_for(prepared, x):
    with pytest.raises(ValueError, match="model must have a quantizer without a scale, got none; again=True"):
        ff.calibrate(prepared, [x])
    of_weight = prepared.fc.weight_quantizer.scale.clone()
    before = prepared.fc.input_quantizer.scale.clone()
    ff.calibrate(prepared, [3 * x], again=True, method="absmax")
    assert not torch.equal(prepared.fc.input_quantizer.scale, before)
    assert torch.equal(prepared.fc.weight_quantizer.scale, of_weight)


def broken(x):
    yield x
    raise OSError("disk gone")


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (lambda x: [], ValueError, "batches must hold at least one batch, got none"),
        (lambda x: [x, x * math.nan], ValueError, "scale must be finite and positive, got NaN or inf in the data"),
        (lambda x: [x[:, :2]], RuntimeError, "channels"),
        (broken, OSError, "disk gone"),
    ],
)
def test_bad_data_change_nothing(net, x, batches, error, message):
    waiting(net)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(error, match=message):
        ff.calibrate(net, batches(x))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not net.fc.input_quantizer.calibrated
    assert net.fc.input_quantizer.enabled


def test_all_zero_data_are_named():
    with pytest.raises(ValueError, match=r"0\.input_quantizer: .* got data that are all zero"):
        ff.calibrate(single(ACTIVATIONS), [torch.zeros(2, 4)])


def test_a_layer_that_no_batch_reaches_is_named():
    model = ff.prepare(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), activations=ACTIVATIONS)
    with pytest.raises(ValueError, match=r"1\.input_quantizer: data must reach the quantizer, got none"):
        ff.calibrate(model, [torch.rand(2, 4)], forward=lambda m, x: m[0](x))
    assert not model[0].input_quantizer.calibrated


def test_negative_values_on_an_unsigned_grid_are_told():
    with pytest.warns(UserWarning, match=r"% of the values at 0\.input_quantizer are negative"):
        ff.calibrate(single(ACTIVATIONS), [torch.randn(20, 4)])


def _rank(rank, folder, bad):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = waiting(Net())
    x = torch.randn(4, 3, 7, 7, generator=torch.Generator().manual_seed(rank))
    if rank == 1 and bad:
        x = x * math.nan
    outcome = "done"
    try:
        # Ranks have different numbers of batches; the statistics, not the batches, are combined.
        ff.calibrate(net.eval(), [x] * (1 + rank), method="absmax")
    except (ValueError, RuntimeError) as error:
        outcome = str(error)
    torch.save((outcome, net.state_dict()), f"{folder}/rank{rank}.pt")
    leave()


def in_two_processes(folder, bad):
    multiprocessing.spawn(_rank, args=(str(folder), bad), nprocs=2, join=True)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_ranks_agree_on_what_one_process_finds_in_all_data(tmp_path):
    (first, a), (second, b) = in_two_processes(tmp_path, bad=False)
    assert first == second == "done"
    torch.manual_seed(0)
    net = waiting(Net()).eval()
    all_data = [torch.randn(4, 3, 7, 7, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
    ff.calibrate(net, all_data, method="absmax")
    want = net.state_dict()
    for key in want:
        assert torch.equal(a[key], b[key]), key
        assert torch.equal(a[key], want[key]), key


def test_bad_data_on_one_rank_stop_all_ranks(tmp_path):
    (first, a), (second, b) = in_two_processes(tmp_path, bad=True)
    assert "finite" in second
    assert "finite" in first or "another rank failed" in first
    assert not a["fc.input_quantizer.initialised"]
    assert not b["fc.input_quantizer.initialised"]
