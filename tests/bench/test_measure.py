# SPDX-License-Identifier: Apache-2.0
"""Timing, on a clock that the test turns: no test here depends on how fast a machine is."""

import os

import pytest
import torch


class Clock:
    """Time passes only inside calls."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def call(self, name, seconds):
        def run():
            self.log.append(name)
            self.now += seconds(len(self.log)) if callable(seconds) else seconds

        return run


@pytest.fixture
def clock(benchmarks, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(benchmarks.measure.time, "perf_counter", lambda: clock.now)
    return clock


def test_medians_and_blocks(benchmarks, clock):
    effort = benchmarks.measure.Effort(seconds=1e9, rounds=(4, 4), block=0.1)
    calls = {"short": clock.call("short", 0.01), "long": clock.call("long", 3.0)}
    timings = benchmarks.measure.interleaved(calls, effort)
    assert timings["short"].median == pytest.approx(0.01)
    assert timings["short"].calls == 10
    assert timings["long"].calls == 1
    assert timings["long"].over(timings["short"]) == pytest.approx(300)
    assert timings["long"].rounds == 4


def test_what_the_others_drove_out_of_the_caches_is_brought_back_untimed(benchmarks, clock):
    def slow_after_another(name):
        return clock.call(name, lambda count: 5.0 if count > 1 and clock.log[-2] != name else 1.0)

    effort = benchmarks.measure.Effort(seconds=1e9, rounds=(4, 4), block=3.0)
    timings = benchmarks.measure.interleaved({name: slow_after_another(name) for name in "ab"}, effort)
    assert timings["a"].samples == timings["b"].samples == pytest.approx([1.0] * 4)


def test_turns_rotate(benchmarks, clock):
    effort = benchmarks.measure.Effort(seconds=1e9, rounds=(3, 3), block=1.0)
    calls = {name: clock.call(name, 1.0) for name in "abc"}
    benchmarks.measure.interleaved(calls, effort)
    assert clock.log[-9:] == list("abc" + "bca" + "cab")


def test_quartiles_of_uneven_rounds(benchmarks, clock):
    effort = benchmarks.measure.Effort(seconds=1e9, rounds=(5, 5), block=0.0)
    warming_up, measured = [9.0] * 3, [1.0, 5.0, 2.0, 4.0, 3.0]
    seconds = iter(warming_up + measured)
    timing = benchmarks.measure.interleaved({"a": clock.call("a", lambda _: next(seconds))}, effort)["a"]
    assert timing.samples == pytest.approx(measured)
    assert (timing.best, timing.q1, timing.median, timing.q3) == pytest.approx((1.0, 2.0, 3.0, 4.0))


def test_time_ends_the_rounds_but_not_below_the_least(benchmarks, clock):
    effort = benchmarks.measure.Effort(seconds=10.0, rounds=(2, 100), block=0.0)
    assert benchmarks.measure.interleaved({"a": clock.call("a", 1.0)}, effort)["a"].rounds == 11
    assert benchmarks.measure.interleaved({"b": clock.call("b", 50.0)}, effort)["b"].rounds == 2


def test_drift_hits_a_ratio_less_than_the_medians(benchmarks):
    timing = benchmarks.measure._timing
    slowing = [1.0, 2.0, 4.0, 8.0, 16.0]
    a, b = timing([3 * s for s in slowing], 1), timing(slowing, 1)
    assert a.over(b) == 3.0


def test_the_device_is_waited_for_at_both_ends_of_a_block(benchmarks, clock):
    waits = []
    effort = benchmarks.measure.Effort(seconds=0.0, rounds=(1, 1), block=0.0)
    benchmarks.measure.interleaved({"a": clock.call("a", 1.0)}, effort, lambda: waits.append(len(clock.log)))
    assert len(waits) % 2 == 0
    assert waits[-1] > waits[-2]


def test_threads_are_restored(benchmarks):
    before = torch.get_num_threads()
    with pytest.raises(KeyError), benchmarks.measure.threads(before + 1):  # noqa: PT012
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_copy_is_of_the_same_size(benchmarks):
    x = torch.randn(7, 5, requires_grad=True)
    copy = benchmarks.measure.copy_of(x)()
    assert torch.equal(copy, x)
    assert copy.data_ptr() != x.data_ptr()
    assert not copy.requires_grad


@pytest.mark.parametrize(("load", "said"), [(None, False), (0.2, False), (3.1, True)])
def test_a_busy_machine_is_named(benchmarks, load, said):
    note = benchmarks.machine.busy({"load": load, "cores": 2})
    assert (note is not None) is said
    if said:
        assert note.startswith("busy machine: load 3.1 on 2 cores")


def test_peak_memory_is_the_most_that_is_held_at_once(benchmarks, capfd):
    cpu, kept = torch.device("cpu"), []

    def call():
        a = torch.empty(1000)
        b = torch.empty(3000)
        del a
        kept.append(torch.empty(500))
        del b

    assert benchmarks.measure.peak_memory(call, cpu) == 4 * 4000
    assert benchmarks.measure.peak_memory(lambda: None, cpu) == 0
    assert capfd.readouterr().err == ""


def test_peak_memory_holds_saved_tensors_until_backward(benchmarks):
    x = torch.randn(1000, requires_grad=True)
    # exp keeps its result, which lives beside the gradient.
    peak = benchmarks.measure.peak_memory(lambda: torch.autograd.grad(x.exp(), x, x.detach()), torch.device("cpu"))
    assert peak == 2 * 4 * 1000


def test_standard_error_comes_back(benchmarks, capfd):
    with pytest.raises(KeyError):
        benchmarks.measure.peak_memory(lambda: {}["x"], torch.device("cpu"))
    os.write(2, b"heard")
    assert capfd.readouterr().err.endswith("heard")
