# SPDX-License-Identifier: Apache-2.0
"""What holds for every estimator: bad input, randomness, precision, progress."""

import sys
import warnings

import pytest
import torch

from fastflat import curvature
from fastflat.curvature import Estimate

from .estimators_fakes import Dense, OwnBlocks, generator, symmetric

CALLS = {
    "trace": lambda op, **how: curvature.trace(op, **how),
    "hutch++": lambda op, **how: curvature.trace(op, method="hutch++", **how),
    "xtrace": lambda op, **how: curvature.trace(op, method="xtrace", **how),
    "layer_traces": lambda op, **how: curvature.layer_traces(op, **how)["all"],
    "diagonal": lambda op, **how: curvature.diagonal(op, max_products=48, **how),
    "eigenvalues": lambda op, **how: curvature.eigenvalues(op, 2, **how),
    "density": lambda op, **how: curvature.density(op, 6, 2, **how).evaluate(),
}


def same(a, b):
    return all(torch.equal(torch.as_tensor(getattr(a, f)), torch.as_tensor(getattr(b, f))) for f in ("value", "stderr"))


@pytest.mark.parametrize("name", CALLS)
def test_a_generator_repeats_the_result_and_leaves_the_global_one(name):
    op = Dense(symmetric(60))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again = (CALLS[name](op, generator=generator(7)) for _ in range(2))
    other = CALLS[name](op, generator=generator(8))
    assert torch.equal(before, torch.get_rng_state())
    assert same(first, again)
    assert not same(first, other)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(CALLS[name](op))
    assert same(*found), "without a generator the global one decides"
    assert not torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("place", [0, 10])
@pytest.mark.parametrize("name", [*CALLS, "solve"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_product_that_is_not_finite_is_one_clear_error(name, value, place):
    class Broken(Dense):
        def matmat(self, V):
            before = self.products
            HV = super().matmat(V).clone()
            if self.products > place >= before:
                HV[0, 5] = value
            return HV

    call = CALLS.get(name, lambda op, **how: curvature.solve(op, torch.ones(3, 60).double(), tol=1e-9))
    with pytest.raises(FloatingPointError, match=r"^fastflat\.curvature\.\w+: a product with the operator holds"):
        call(Broken(symmetric(60)), **({} if name == "solve" else {"generator": generator()}))


OP = Dense(symmetric(30))
BAD = {
    "trace: rtol must be a number above 0, got -1": lambda: curvature.trace(OP, -1),
    "trace: rtol must be a number above 0, got nan": lambda: curvature.trace(OP, float("nan")),
    "trace: rtol must be a number above 0, got str": lambda: curvature.trace(OP, "5%"),
    "trace: atol must be a number of at least 0, got -1": lambda: curvature.trace(OP, atol=-1),
    "trace: chunk must be a whole number of at least 1, got 0": lambda: curvature.trace(OP, chunk=0),
    "trace: max_products must be a whole number of at least 1, got 0": lambda: curvature.trace(OP, max_products=0),
    "trace: max_products must be a whole number of at least 4, got 3": lambda: curvature.trace(OP, 0.1, 3, 8, "xtrace"),
    "trace: method must be 'auto', 'jets', 'hutchinson', 'hutch++' or 'xtrace', got 'hutch'": lambda: curvature.trace(
        OP, method="hutch"
    ),
    "trace: generator must be a torch.Generator, got int": lambda: curvature.trace(OP, generator=3),
    "trace: op must be square, got shape [2, 3]": lambda: curvature.trace(Dense(torch.zeros(2, 3))),
    "layer_traces: chunk must be a whole number of at least 1, got float": lambda: curvature.layer_traces(
        OP, chunk=2.0
    ),
    "diagonal: rtol must be a number above 0, got 0": lambda: curvature.diagonal(OP, 0),
    "eigenvalues: k must be a whole number from 1 to 30, got 31": lambda: curvature.eigenvalues(OP, 31),
    "eigenvalues: k must be a whole number from 1 to 0, got 1": lambda: curvature.eigenvalues(
        Dense(torch.zeros(0, 0)), 1
    ),
    "eigenvalues: which must be 'largest', 'largest_magnitude' or 'smallest', got 'top'": lambda: curvature.eigenvalues(
        OP, 1, "top"
    ),
    "eigenvalues: basis must be a whole number of at least 9, got 8": lambda: curvature.eigenvalues(OP, 5, basis=8),
    "eigenvalues: warm_start must have shape [w, 30] with w <= 30, got [30]": lambda: curvature.eigenvalues(
        OP, 1, warm_start=torch.ones(30)
    ),
    "eigenvalues: warm_start must be finite, got NaN or infinity": lambda: curvature.eigenvalues(
        OP, 1, warm_start=torch.full((1, 30), float("nan"))
    ),
    "density: steps must be a whole number of at least 1, got 0": lambda: curvature.density(OP, 0),
    "density: probes must be a whole number of at least 1, got 0": lambda: curvature.density(OP, 3, 0),
    "Density.evaluate: sigma must be a number above 0, got 0": lambda: curvature.density(OP, 3, 1).evaluate(sigma=0),
    "solve: B must have shape [K, 30] or [30], got [29]": lambda: curvature.solve(OP, torch.ones(29)),
    "solve: B must be finite, got NaN or infinity": lambda: curvature.solve(OP, torch.full((30,), float("nan"))),
    "solve: B must be a tensor, got list": lambda: curvature.solve(OP, [1.0] * 30),
    "solve: damping must be a finite number, got inf": lambda: curvature.solve(OP, torch.ones(30), float("inf")),
    "solve: method must be 'minres' or 'cg', got 'gmres'": lambda: curvature.solve(OP, torch.ones(30), method="gmres"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line(message):
    with pytest.raises((ValueError, TypeError)) as raised:
        BAD[message]()
    assert str(raised.value) == f"fastflat.curvature.{message}"


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("basis", [30, 100])
@pytest.mark.parametrize("seed", range(2))
def test_an_operator_that_is_not_symmetric_is_noticed(seed, basis, block):
    matrix = symmetric(100, seed)
    skewed = matrix + 0.3 * torch.triu(matrix, 1)
    with pytest.warns(RuntimeWarning, match=r"eigenvalues: u\^T H v and v\^T H u differ by \d+ % of \|H\|"):
        curvature.eigenvalues(Dense(skewed), 5, basis=basis, block=block, max_products=60, generator=generator())
    with pytest.warns(RuntimeWarning, match="density: u"):
        curvature.density(Dense(skewed), 10, 2, generator=generator())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.bfloat16):
            op = Dense(matrix.to(dtype))
            curvature.eigenvalues(op, 5, basis=basis, block=block, max_products=200, generator=generator())
            curvature.density(op, 60, 1, generator=generator())


def test_an_operator_that_changes_is_noticed():
    class Resampled(Dense):
        def matmat(self, V):
            self.products += len(V)
            return V @ (self.matrix + 0.2 * symmetric(60, self.products))

    with pytest.warns(RuntimeWarning, match="not the same in each product"):
        curvature.eigenvalues(Resampled(symmetric(60)), 3, max_products=40, generator=generator())


def test_an_operator_that_returns_another_shape():
    class Trailing(Dense):
        def matmat(self, V):
            return super().matmat(V).T

    with pytest.raises(ValueError, match=r"op\.matmat must return shape \[8, 30\], got \[30, 8\]"):
        curvature.trace(Trailing(symmetric(30)))

    class Whole(OwnBlocks):
        def block_matmat(self, name, V):
            return super().block_matmat(name, V)[:, :2]

    with pytest.raises(ValueError, match=r"op\.block_matmat must return shape \[8, 30\], got \[8, 2\]"):
        curvature.layer_traces(Whole(symmetric(30)))


@pytest.mark.parametrize("name", [*CALLS, "solve"])
def test_an_operator_may_return_its_input(name):
    class Identity(Dense):
        def matmat(self, V):
            self.products += len(V)
            return V

    op = Identity(torch.eye(40))
    if name == "solve":
        found = curvature.solve(op, torch.ones(2, 40), 1.0)
        assert torch.allclose(found.value, torch.full((2, 40), 0.5))
        return
    found = CALLS[name](op, generator=generator())
    wanted = {"diagonal": torch.ones(40), "eigenvalues": torch.ones(2)}.get(name, torch.tensor(40.0)).double()
    if name != "density":
        error = (torch.as_tensor(found.value) - wanted).abs()
        assert (error <= 4 * torch.as_tensor(found.stderr) + 1e-4).all()


@pytest.mark.parametrize("name", ["eigenvalues", "density", "xtrace", "hutch++"])
def test_what_the_user_set_does_not_round_the_vector_work(name):
    op = Dense(symmetric(60, dtype=torch.float32))
    plain = CALLS[name](op, generator=generator())

    class Exact(Dense):
        def matmat(self, V):
            with torch.autocast("cpu", enabled=False):
                return (V.double() @ self.matrix.double()).float()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = CALLS[name](Exact(op.matrix), generator=generator())
    assert torch.allclose(torch.as_tensor(found.value), torch.as_tensor(plain.value), rtol=1e-4)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        found = CALLS[name](Exact(op.matrix), generator=generator())
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.allclose(torch.as_tensor(found.value), torch.as_tensor(plain.value), rtol=1e-4)


def test_no_graph_is_built():
    class WithGraph(Dense):
        def matmat(self, V):
            return super().matmat(V) * torch.ones((), dtype=V.dtype, requires_grad=True)

        def block_matmat(self, name, V):
            return self.matmat(V)

    for name, call in CALLS.items():
        found = call(WithGraph(symmetric(40)), generator=generator())
        assert not torch.as_tensor(found.value).requires_grad, name
    b = torch.ones(40, dtype=torch.float64, requires_grad=True)
    assert not curvature.solve(WithGraph(symmetric(40)), b).value.requires_grad


@pytest.mark.parametrize("name", [*CALLS, "solve"])
def test_progress(name, capsys):
    op = Dense(symmetric(60))
    if name == "solve":
        curvature.solve(op, torch.ones(60).double(), progress=True)
    else:
        CALLS[name](op, generator=generator(), progress=True)
    assert "product" in capsys.readouterr().err


def test_progress_without_tqdm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ModuleNotFoundError, match=r"trace: progress=True needs tqdm: pip install tqdm"):
        curvature.trace(OP, progress=True)
    curvature.trace(OP)


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (1.234, 0.04, "1.23 +- 0.04 (16 products, converged)"),
        (1.234, 0.014, "1.234 +- 0.014 (16 products, converged)"),
        (-3e-9, 2e-10, "(-3.0 +- 0.2)e-09 (16 products, converged)"),
        (1.23e9, 4e7, "(1.23 +- 0.04)e+09 (16 products, converged)"),
        (1 / 3, 1e-12, "0.3333333 +- 1e-12 (16 products, converged)"),
        (5.0, float("inf"), "5 +- inf (16 products, converged)"),
        (torch.tensor([2.0, 1.0]), torch.tensor([0.1, 0.2]), "[2.00 +- 0.10, 1.0 +- 0.2] (16 products, converged)"),
        (torch.zeros(3, 4), torch.zeros(3, 4), "tensor of shape [3, 4] (16 products, converged)"),
    ],
)
def test_repr(value, stderr, text):
    assert repr(Estimate(value, stderr, 16, True)) == text


def test_own_block_products_must_be_finite_too():
    class Broken(OwnBlocks):
        def block_matmat(self, name, V):
            return super().block_matmat(name, V) * float("nan")

    with pytest.raises(FloatingPointError, match="layer_traces"):
        curvature.layer_traces(Broken(symmetric(40)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*CALLS, "own", "solve"])
def test_on_a_gpu(name):
    matrix = symmetric(300)
    matrix = matrix @ matrix / 300
    op = (OwnBlocks if name == "own" else Dense)(matrix.float().cuda())
    g = torch.Generator("cuda").manual_seed(0)
    if name == "solve":
        B = torch.randn(4, 300, device="cuda", generator=g)
        found = curvature.solve(op, B, 0.5, 1e-4)
        assert found.converged
        assert torch.allclose(found.value @ op.matrix + 0.5 * found.value, B, atol=1e-2)
        return
    call = CALLS["layer_traces" if name == "own" else name]
    found = call(op, generator=g)
    exact = {
        "diagonal": matrix.diagonal(),
        "eigenvalues": torch.linalg.eigvalsh(matrix).flip(0)[:2],
    }.get(name, matrix.trace())
    if name == "density":
        found, exact = curvature.density(op, 20, 8, generator=g).moments(1), matrix.trace() / 300
    error = (torch.as_tensor(found.value).cpu() - exact).abs()
    assert (error <= 5 * torch.as_tensor(found.stderr).cpu() + 1e-3).all()
