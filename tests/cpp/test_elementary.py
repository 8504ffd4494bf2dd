# SPDX-License-Identifier: Apache-2.0
"""The elementary functions and random draws of csrc/math: against exact values, known answers and the reference."""

import itertools
import math

import numpy as np
import pytest
import torch

from fastflat.backends.reference import _elementary, _noise

#: Largest errors in units in the last place, fp32 and fp64, as csrc/math/elementary.h states them.
STATED = {
    "exp": (0.99, 0.96),
    "sigmoid": (2.41, 2.45),
    "log": (0.84, 0.88),
    "sine": (1.65, 1.65),
    "cosine": (1.13, 1.15),
}
#: Where each function has anything to compute: the other inputs end in a constant.
DOMAINS = {
    "exp": [(0.0, 106.0), (-0.0, -106.0)],
    "sigmoid": [(0.0, 106.0), (-0.0, -106.0)],
    "log": [(0.0, math.inf)],
    "sine": [(0.0, 0.5), (-0.0, -0.5)],
    "cosine": [(0.0, 0.5), (-0.0, -0.5)],
}
HARD = [
    math.nan,
    math.inf,
    -math.inf,
    0.0,
    -0.0,
    1e-45,
    -1e-45,
    2.0**-126,
    1e-310,
    -1.0,
    1.0,
    88.7,
    88.8,
    -87.4,
    -103.9,
]
HARD += [-104.0, 709.7, 709.8, -745.1, -745.2, 3e38, -3e38, 1e308]
STATES = [(0, 0), (5, 7), (-1, -1), (2**62 + 3, 2**40 + 9), (-(2**63), 2**63 - 1)]


def bits(v: float) -> int:
    return int(np.float32(v).view(np.uint32))


def same(got: np.ndarray, want: torch.Tensor) -> bool:
    want = want.numpy()
    integer = {4: np.uint32, 8: np.uint64}[want.itemsize]
    equal = got.view(integer) == want.view(integer)
    return got.dtype == want.dtype and bool((equal | (np.isnan(got) & np.isnan(want))).all())


def reference(name: str, x: torch.Tensor) -> torch.Tensor:
    if name in ("sine", "cosine"):
        return _elementary.sine_cosine(x)[name == "cosine"]
    return getattr(_elementary, name)(x)


def doubles(name: str, count: int) -> np.ndarray:
    g = np.random.default_rng(3)
    if name == "log":
        return np.concatenate([g.uniform(0.3, 3, count), 10 ** g.uniform(-323, 308, count)])
    low, high = {"exp": (-750, 715), "sigmoid": (-750, 750)}.get(name, (-0.5, 0.5))
    return np.concatenate([g.uniform(low, high, count), g.uniform(-0.5, 0.5, count)])


@pytest.mark.parametrize("name", DOMAINS)
def test_errors_are_below_the_stated_ones(elementary, name):
    for low, high in DOMAINS[name]:
        worst, at = getattr(elementary, f"{name}_worst32")(bits(low), bits(high), 211)
        assert worst <= STATED[name][0], np.uint32(at).view(np.float32)
    worst = getattr(elementary, f"{name}_worst64")(doubles(name, 200_000))
    assert worst <= STATED[name][1]


@pytest.mark.slow
@pytest.mark.parametrize("name", DOMAINS)
def test_errors_are_below_the_stated_ones_for_every_float(elementary, name):
    errors = [getattr(elementary, f"{name}_worst32")(bits(low), bits(high), 1)[0] for low, high in DOMAINS[name]]
    assert STATED[name][0] - 0.01 < max(errors) <= STATED[name][0]
    if name in ("exp", "sigmoid", "log"):
        for sign in (0, 1 << 31):
            worst, at = getattr(elementary, f"{name}_worst32")(sign | bits(106.0), sign | 0x7FFFFFFF, 1)
            assert worst <= STATED[name][0], hex(at)


#: What tanh and the normal distribution shall be, of one number.
ABSOLUTE = {
    "tanh": math.tanh,
    "below": lambda z: math.erfc(-z * math.sqrt(0.5)) / 2,
    "density": lambda z: math.exp(-z * z / 2) / math.sqrt(2 * math.pi),
}


@pytest.mark.parametrize("name", ABSOLUTE)
def test_absolute_errors_are_below_the_stated_ones(elementary, name):
    x = np.concatenate([np.linspace(-12, 12, 150_001), np.random.default_rng(7).normal(0, 1e-3, 1000)])
    for width, dtype, stated in ((32, np.float32, 2**-21.9), (64, np.float64, 2**-51)):
        numbers = x.astype(dtype)
        want = np.array([ABSOLUTE[name](v) for v in numbers.astype(np.float64).tolist()])
        got = getattr(elementary, f"{name}{width}")(numbers)
        assert np.abs(got.astype(np.float64) - want).max() <= stated
        ends = getattr(elementary, f"{name}{width}")(np.array([math.inf, -math.inf, math.nan], dtype))
        assert ends[:2].tolist() == {"tanh": [1, -1], "below": [1, 0], "density": [0, 0]}[name]
        assert np.isnan(ends[2])


@pytest.mark.parametrize("name", ABSOLUTE)
@pytest.mark.parametrize("width", [32, 64])
def test_the_reference_has_the_same_bits_near_one(elementary, name, width):
    integer, number = (np.uint32, np.float32) if width == 32 else (np.uint64, np.float64)
    g = np.random.default_rng(4)
    everything = g.integers(0, 1 << width, 300_000, dtype=integer).view(number)
    with np.errstate(over="ignore"):
        x = np.concatenate([everything, g.normal(0, 4, 100_000).astype(number), np.array(HARD, number)])
    t = torch.from_numpy(x)
    want = _elementary.tanh(t) if name == "tanh" else _elementary.normal(t)[name == "density"]
    assert same(getattr(elementary, f"{name}{width}")(x), want)


def test_limits(elementary):
    for width, dtype in ((32, np.float32), (64, np.float64)):
        x = np.array([math.nan, math.inf, -math.inf, 0.0, -0.0], dtype)
        assert getattr(elementary, f"exp{width}")(x)[1:].tolist() == [math.inf, 0.0, 1.0, 1.0]
        assert getattr(elementary, f"sigmoid{width}")(x)[1:].tolist() == [1.0, 0.0, 0.5, 0.5]
        assert getattr(elementary, f"log{width}")(x)[[1, 3, 4]].tolist() == [math.inf, -math.inf, -math.inf]
        assert np.isnan(getattr(elementary, f"log{width}")(np.array([-math.inf, -1.0, -5e-324, math.nan], dtype)))[
            [0, 1, 3]
        ].all()
        for name in ("exp", "sigmoid", "log"):
            assert np.isnan(getattr(elementary, f"{name}{width}")(x)[0])


@pytest.mark.parametrize("name", DOMAINS)
@pytest.mark.parametrize("width", [32, 64])
def test_the_reference_has_the_same_bits(elementary, name, width):
    integer, number = (np.uint32, np.float32) if width == 32 else (np.uint64, np.float64)
    g = np.random.default_rng(4)
    everything = g.integers(0, 1 << width, 300_000, dtype=integer).view(number)
    with np.errstate(over="ignore"):
        x = np.concatenate([everything, doubles(name, 100_000).astype(number), np.array(HARD, number)])
    if name in ("sine", "cosine"):
        x = x[np.abs(x) <= 0.5]
    assert same(getattr(elementary, f"{name}{width}")(x), reference(name, torch.from_numpy(x)))


def test_square_roots_of_the_reference_are_ieee():
    x = np.random.default_rng(5).integers(0, 0x7F800000, 300_000, dtype=np.uint32).view(np.float32)
    assert same(np.sqrt(x), _elementary.sqrt(torch.from_numpy(x)))


# Known answers of the Random123 distribution (kat_vectors, philox4x32-10).
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_its_known_answers(elementary, counter, key, words):
    assert list(elementary.philox(*counter, *key)) == words
    tensors = [torch.tensor([v]) for v in (*counter, *key)]
    assert [w.item() for w in _noise.philox(tuple(tensors[:4]), tuple(tensors[4:]))] == words
    block, offset = (low | high << 32 for low, high in (counter[:2], counter[2:]))
    signed = [v - (1 << 64) if v >> 63 else v for v in (key[0] | key[1] << 32, offset)]
    assert list(elementary.block(*signed, block)) == words
    if block < 1 << 63:
        drawn = _noise.words(torch.tensor(signed), 1, block)
        assert [w.item() for w in drawn] == words


@pytest.mark.parametrize("state", STATES, ids=str)
def test_draws_of_the_reference_have_the_same_bits(elementary, state):
    for name, first, count in itertools.product(("uniform", "centred", "normal"), (0, 8, 2**37 + 64), (0, 1, 7, 5003)):
        want = getattr(_noise, name)(torch.tensor(state), count, first)
        assert same(getattr(elementary, name)(*state, first, count), want), (name, first, count)


@pytest.mark.parametrize("state", STATES, ids=str)
def test_bulk_draws_are_the_single_ones(elementary, state):
    # Lengths around a whole number of vectors; a run that crosses block 2^32, where the counter's second word begins.
    edges = [1, 3, 8, 63, 64, 65, 127, 128, 129, 1000]
    for (name, fill), first, count in itertools.product(
        elementary.fills.items(), (0, 24, 2**35 - 64, 2**34 - 32), edges
    ):
        want = getattr(elementary, name.split()[0])(*state, first, count)
        assert np.array_equal(fill(*state, first, count).view(np.uint32), want.view(np.uint32)), (name, first, count)


def test_the_word_order_of_the_draws(elementary):
    words = elementary.block(5, 7, 2)
    halves = [half for w in words for half in (w & 0xFFFF, w >> 16)]
    assert elementary.uniform(5, 7, 16, 8).tolist() == [(k + 0.5) / 65536 for k in halves]
    pairs = [*elementary.normal_pair(*words[:2]), *elementary.normal_pair(*words[2:])]
    assert elementary.normal(5, 7, 8, 4).tolist() == pairs


def test_normal_pairs_lie_at_their_angle_and_radius(elementary):
    g = np.random.default_rng(6)
    edges = itertools.product([0, 0x1FF, 0xFFFFFFFF], [q << 30 | f for q in range(4) for f in (0, 0x3FFFFFFF, 1 << 29)])
    for radius, angle in [*edges, *g.integers(0, 1 << 32, (3000, 2)).tolist()]:
        even, odd = elementary.normal_pair(radius, angle)
        r = math.sqrt(-math.log(((radius >> 9) + 0.5) / 2**23) / 6)
        right_angles = (angle >> 30) + (((angle >> 7) & 0x7FFFFF) + 0.5) / 2**23 - 0.5
        assert even == pytest.approx(r * math.cos(math.pi / 2 * right_angles), abs=1e-6 * r)
        assert odd == pytest.approx(r * math.sin(math.pi / 2 * right_angles), abs=1e-6 * r)
