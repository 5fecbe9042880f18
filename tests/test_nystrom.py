"""nystrom.py against dense float64 linear algebra."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nystrom import (
    SKETCHES,
    NotFinite,
    cg_ihvp,
    hessian_products,
    krylov_sketch,
    loss_hessian_products,
    make_sketch,
    nystrom_ihvp,
    nystrom_solve,
    sketch_matrix,
    solve,
)
from tools import solvers

pytestmark = pytest.mark.usefixtures("float64")


def random_symmetric(p, seed, eigenvalues=None):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(p, p, generator=generator))[0]
    values = torch.randn(p, generator=generator) if eigenvalues is None else torch.as_tensor(eigenvalues)
    H = basis * values @ basis.T
    return (H + H.T) / 2, torch.randn(p, generator=generator)


def products(H):
    return lambda u: H @ u


def dense(H, v, rho):
    return torch.linalg.solve(H + rho * torch.eye(len(v)), v)


def relative_error(x, reference):
    return float((x - reference).norm() / reference.norm())


@pytest.mark.parametrize("rho", [0.1, 5.0, 50.0])
@pytest.mark.parametrize("sketch", SKETCHES)
def test_full_rank_equals_dense_solve(sketch, rho):
    H, v = random_symmetric(12, 0, torch.linspace(0.1, 30, 12))
    x, _ = nystrom_ihvp(products(H), v, 12, rho, sketch, torch.Generator().manual_seed(0))
    assert relative_error(x, dense(H, v, rho)) < 1e-9


@pytest.mark.parametrize("sketch", ["gaussian", "v-gaussian", "krylov"])
def test_exact_on_low_rank_hessian(sketch):
    H, v = random_symmetric(40, 1, [9.0, 4.0, 1.0, 0.5] + [0.0] * 36)
    for rank in (5, 8):
        x, info = nystrom_ihvp(products(H), v, rank, 2.0, sketch, torch.Generator().manual_seed(0))
        assert relative_error(x, dense(H, v, 2.0)) < 1e-9
        assert info["rank"] <= rank
    assert info["correction"] == pytest.approx(float((x - v / 2).norm() / (v / 2).norm()), rel=1e-9)


def test_columns_equal_the_posters_formula():
    H, v = random_symmetric(30, 2, torch.linspace(0.5, 20, 30))
    rho, omega = 3.0, sketch_matrix("columns", v, 6, torch.Generator().manual_seed(0))
    Q = omega.argmax(0)
    assert len(set(Q.tolist())) == 6 and omega.sum() == 6
    C, M = H[:, Q], H[Q][:, Q]
    poster = v / rho - C @ torch.linalg.solve(M + C.T @ C / rho, C.T @ v) / rho**2
    x, _ = nystrom_solve(H @ omega, omega, v, rho)
    assert relative_error(x, poster) < 1e-10


@pytest.mark.parametrize("sketch", SKETCHES)
def test_bounded_on_indefinite_hessians(sketch):
    generator = torch.Generator().manual_seed(3)
    for seed in range(200):
        H, v = random_symmetric(20, seed)
        H = H * 10.0 ** torch.empty(()).uniform_(-3, 3, generator=generator)
        rho = float(10.0 ** torch.empty(()).uniform_(-2, 2, generator=generator))
        x, _ = nystrom_ihvp(products(H), v, 1 + seed % 10, rho, sketch, generator)
        assert x.norm() <= v.norm() / rho * (1 + 1e-9)


def test_the_raw_formula_would_blow_up():
    """Why directions are dropped: one column whose M cancels C^T C / rho."""
    H = torch.tensor([[-1.0, 0.3], [0.3, 2.0]])
    rho = 1.09 / 1.0 + 1e-6  # M + C^T C / rho is about 0 for Q = {0}
    v, omega = torch.tensor([1.0, 1.0]), torch.tensor([[1.0], [0.0]])
    C = H[:, :1]
    raw = v / rho - C @ torch.linalg.solve(H[:1, :1] + C.T @ C / rho, C.T @ v) / rho**2
    x, info = nystrom_solve(C, omega, v, rho)
    assert raw.norm() > 1e4 * v.norm() / rho
    assert torch.allclose(x, v / rho) and info["rank"] == 0


def test_bounded_where_the_sketch_is_rounding_error():
    """Omega^T Y is noise although Y is not: no direction may be kept, or its inverse would swallow rho."""
    v, omega = torch.ones(4), torch.eye(4)[:, :2]
    for tiny, dtype in ((1e-17, torch.float64), (1e-18, torch.float32)):
        Y = torch.tensor([[tiny, 0.0], [0.0, tiny], [1.0, 1.0], [1.0, 1.0]], dtype=dtype)
        x, info = nystrom_solve(Y, omega.to(dtype), v.to(dtype), 1.0)
        assert info["rank"] == 0 and torch.equal(x, v.to(dtype))
    generator = torch.Generator().manual_seed(0)
    for trial in range(300):  # nearly orthogonal to their images, at all scales, in single precision
        p, q, scale = 12, 1 + trial % 4, 10.0 ** (trial % 13 - 6)
        omega = torch.linalg.qr(torch.randn(p, q, generator=generator))[0]
        Y = torch.randn(p, q, generator=generator)
        Y = scale * (Y - omega @ (omega.T @ Y) * (1 - 10.0 ** -(trial % 9)))
        v = torch.randn(p, generator=generator).float()
        assert nystrom_solve(Y.float(), omega.float(), v, 1.0)[0].norm() <= v.norm() * (1 + 1e-5)


def test_sketch_columns_equal_hessian_columns_of_a_deep_network():
    torch.manual_seed(0)
    sizes = [(5, 3), (5,), (4, 5), (4,), (1, 4), (1,)]
    inputs, targets = torch.randn(7, 3), torch.randn(7)

    def loss(w):
        W1, b1, W2, b2, W3, b3 = (
            part.view(size) for part, size in zip(w.split([torch.Size(s).numel() for s in sizes]), sizes)
        )
        hidden = torch.tanh(torch.tanh(inputs @ W1.T + b1) @ W2.T + b2)
        return ((targets - (hidden @ W3.T + b3).squeeze(-1)) ** 2).mean()

    p = sum(torch.Size(s).numel() for s in sizes)
    w, v = torch.randn(p), torch.randn(p)
    H = torch.func.hessian(loss)(w)
    grad_fn = lambda w: torch.autograd.grad(loss(w), w, create_graph=True)[0]
    assert torch.linalg.eigvalsh(H)[0] < 0  # the case that matters
    for sketch in SKETCHES:
        omega, Y = make_sketch(sketch, hessian_products(grad_fn, w), v, 6)
        assert omega.shape == (p, 6) and torch.allclose(Y, H @ omega, atol=1e-12)


@pytest.mark.parametrize("sketch", SKETCHES)
def test_zero_v_same_generator_rank_zero(sketch):
    H, v = random_symmetric(15, 4)
    solve = lambda v, rank: nystrom_ihvp(products(H), v, rank, 2.0, sketch, torch.Generator().manual_seed(7))
    assert torch.equal(solve(torch.zeros(15), 5)[0], torch.zeros(15))
    assert torch.equal(solve(v, 5)[0], solve(v, 5)[0])
    assert torch.equal(solve(v, 0)[0], v / 2.0)


def test_krylov_basis_is_orthonormal_and_stops_when_complete():
    H, v = random_symmetric(60, 11, torch.linspace(0.01, 50, 60))
    omega, Y = krylov_sketch(products(H), v, 30)
    assert torch.allclose(omega.T @ omega, torch.eye(30), atol=1e-12) and torch.allclose(
        Y, H @ omega, atol=1e-12
    )
    power = torch.stack([torch.linalg.matrix_power(H, k) @ v for k in range(3)], 1)
    assert torch.allclose(omega[:, :3] @ (omega[:, :3].T @ power), power, rtol=1e-9)
    H, v = random_symmetric(60, 11, [7.0, 2.0, 1.0] + [0.0] * 57)
    omega, _ = krylov_sketch(products(H), v, 30)
    assert 4 <= omega.shape[1] <= 6  # v and its images under three eigen-directions, give or take rounding


def test_sketches_by_accuracy():
    """The eigenvalues of a trained critic's Hessian, rho as published: what the products buy. A real critic:
    test_scripts.py."""
    H, v = random_symmetric(
        400, 5, torch.cat([torch.tensor([56.0, 10.7, 4.1, 3.1]), 2.0 / torch.arange(1, 397) ** 1.5])
    )
    v = H @ v

    def error(kind, rank):
        x = nystrom_ihvp(products(H), v, rank, 50.0, kind, torch.Generator().manual_seed(0))[0]
        return relative_error(x, dense(H, v, 50.0))

    assert error("krylov", 5) < 1e-5 and error("krylov", 3) < 1e-3
    assert error("krylov", 3) < error("v-gaussian", 5) / 10


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e25])
def test_float32_input(scale):
    H, v = random_symmetric(25, 6, torch.linspace(0.1, 10, 25))
    x64, _ = nystrom_ihvp(products(H), v, 25, 1.0, "gaussian")
    H32, v32 = H.float(), (v * scale).float()
    x32, _ = nystrom_ihvp(products(H32), v32, 25, 1.0, "columns")
    assert x32.dtype == torch.float32
    assert relative_error(x32.double() / scale, x64) < 1e-4
    cg, _ = cg_ihvp(products(H32), v32, 1.0, 50, 1e-6)
    assert relative_error(cg.double() / scale, x64) < 1e-4


@pytest.mark.parametrize("preconditioned", [False, True])
def test_cg_equals_dense_solve(preconditioned):
    H, v = random_symmetric(30, 8, torch.logspace(-3, 2, 30))
    preconditioner = None
    if preconditioned:
        omega = sketch_matrix("gaussian", v, 8, torch.Generator().manual_seed(0))
        Y = H @ omega
        preconditioner = lambda r: nystrom_solve(Y, omega, r, 0.1)[0]
    x, info = cg_ihvp(products(H), v, 0.1, 200, 1e-12, preconditioner)
    assert relative_error(x, dense(H, v, 0.1)) < 1e-9
    assert info["residual"] <= 1e-12 and info["stopped"] == "tolerance"
    assert cg_ihvp(products(H), v, 0.1, 3)[1]["iterations"] == 3


@pytest.mark.parametrize("iterations", [1, 3, 200])
def test_what_cg_says_of_its_solution(iterations):
    """Every number in info, recomputed from x by dense algebra."""
    H, v = random_symmetric(20, 12, torch.linspace(0.1, 30, 20))
    v, rho = 7 * v, 2.0
    x, info = cg_ihvp(products(H), v, rho, iterations, 1e-10)
    assert info["correction"] == pytest.approx(float((x - v / rho).norm() / (v / rho).norm()), abs=1e-12)
    residual = float(((H + rho * torch.eye(20)) @ x - v).norm() / v.norm())
    assert info["residual"] == pytest.approx(residual, rel=1e-6, abs=1e-12)
    if iterations == 200:
        assert info["stopped"] == "tolerance" and info["iterations"] <= 25
    else:
        assert info["stopped"] == "iterations" and info["iterations"] == iterations


@pytest.mark.parametrize("condition", [3, 1e4, 1e5, 1e6])
def test_cg_in_single_precision_says_what_it_reached(condition):
    """The residual of the recurrence falls on and on, whatever the true one does: the true one is reported,
    and that the dtype allows no more."""
    H, v = random_symmetric(60, 13, torch.logspace(0, math.log10(condition), 60) - 1)
    x, info = cg_ihvp(products(H.float()), v.float(), 1.0, 5000, 1e-6)
    truth = float(((H + torch.eye(60)) @ x.double() - v).norm() / v.norm())
    assert info["residual"] == pytest.approx(truth, rel=0.5, abs=3e-7 * condition**0.5)
    assert info["stopped"] == ("tolerance" if condition < 1e3 else "precision") and info["iterations"] < 5000
    assert (info["residual"] <= 1e-6) == (info["stopped"] == "tolerance")
    again = cg_ihvp(products(H), v, 1.0, 5000, 1e-6)[1]  # which double precision does reach
    assert again["stopped"] == "tolerance" and again["residual"] <= 1e-6


@pytest.mark.parametrize("iterations, tol", [(0, 1e-5), (3, 1e-5), (200, 1e-3)])
def test_cg_that_does_not_measure_saves_a_product(iterations, tol):
    """The same solution by as many products as iterations; the recurrence's residual is the true one here."""
    H, v = random_symmetric(20, 12, torch.linspace(0.1, 30, 20))
    calls = []
    counted = lambda u: calls.append(1) or H @ u
    expected, measured = cg_ihvp(counted, v, 2.0, iterations, tol)
    first = len(calls)
    x, info = cg_ihvp(counted, v, 2.0, iterations, tol, measure=False)
    assert torch.equal(x, expected) and info["stopped"] == measured["stopped"]
    assert len(calls) - first == info["iterations"] == first - 1
    known = measured["residual"] if iterations else math.nan
    assert info["residual"] == pytest.approx(known, rel=1e-9, nan_ok=True)
    with pytest.raises(NotFinite):
        cg_ihvp(lambda u: 0 * u, v, rho=5e-324, max_iters=iterations, measure=False)


def test_cg_without_an_iteration():
    H, v = random_symmetric(6, 14, [1.0] * 6)
    x, info = cg_ihvp(products(H), v, 1.0, 0)
    assert torch.allclose(x, v) and info["residual"] == pytest.approx(1.0) and info["stopped"] == "iterations"
    H, v = random_symmetric(6, 10, [-5.0] * 6)
    x, info = cg_ihvp(products(H), v, 0.5)
    assert info["residual"] == pytest.approx(float((H @ x + 0.5 * x - v).norm() / v.norm()))


def test_a_linear_loss_has_no_hessian():
    v = torch.randn(4)
    constant = hessian_products(lambda w: torch.arange(4.0), torch.zeros(4))
    layer = torch.nn.Linear(3, 1)
    linear = loss_hessian_products(layer(torch.ones(3)).sum(), layer.parameters())
    for product in (constant, linear):
        assert torch.equal(product(v), torch.zeros(4)) and torch.equal(product(v[:, None]), torch.zeros(4, 1))
        for sketch in SKETCHES:
            x, info = nystrom_ihvp(product, v, 2, 2.0, sketch)
            assert torch.equal(x, v / 2) and info == {"correction": 0.0, "rank": 0}
        x, info = cg_ihvp(product, v, 2.0)
        assert torch.allclose(x, v / 2) and info["correction"] < 1e-12


def test_parameters_that_the_loss_does_not_use():
    used, unused = torch.nn.Linear(2, 1), torch.nn.Linear(2, 2)
    loss = (used(torch.ones(2)) ** 2).sum()
    product = loss_hessian_products(loss, [*used.parameters(), *unused.parameters()])
    u = torch.randn(9)
    expected = torch.cat([2 * u[:3].sum() * torch.ones(3), torch.zeros(6)])
    assert torch.allclose(product(u), expected) and torch.allclose(product(u[:, None])[:, 0], expected)


def test_loss_hessian_products_equal_those_of_the_gradient_function():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    inputs = torch.randn(7, 3)
    named = dict(net.named_parameters())

    def loss_at(w):
        parts = w.split([p.numel() for p in named.values()])
        weights = {name: part.view_as(p) for (name, p), part in zip(named.items(), parts)}
        return (torch.func.functional_call(net, weights, (inputs,)) ** 2).mean()

    w = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    product = loss_hessian_products((net(inputs) ** 2).mean(), net.parameters())
    H = torch.func.hessian(loss_at)(w)
    u = torch.randn(len(w), 3)
    assert torch.allclose(product(u), H @ u) and torch.allclose(product(u[:, 0]), H @ u[:, 0])


def test_nothing_is_differentiable_in_v():
    H, v = random_symmetric(6, 15)
    v.requires_grad_()
    solutions = [nystrom_ihvp(products(H), v, 2, 30.0), cg_ihvp(products(H), v, 30.0)]
    solutions += [nystrom_ihvp(products(H), v * 0, 2, 30.0), cg_ihvp(products(H), v * 0, 30.0)]
    assert not any(x.requires_grad for x, _ in solutions)


def test_products_that_are_not_finite():
    """No solver takes them for a small correction."""
    v = torch.ones(3)
    for bad in (math.nan, math.inf):
        for solver in (cg_ihvp, nystrom_ihvp):
            with pytest.raises(ValueError, match="overflowed"):
                solver(lambda u: u * bad, v, rho=2.0)
        for method in ("nystrom", "cg", "pcg"):
            x, correction = solve(method, lambda u: u * bad, v)
            assert x.isnan().all() and math.isnan(correction)


def test_dampings_that_overflow():
    """1 / rho is not a number of single precision: this must end, and not as a solution."""
    v = torch.tensor([1.0, 0.0], dtype=torch.float32)
    with pytest.raises(ValueError, match="rho is too small"):
        cg_ihvp(lambda u: 0 * u, v, rho=1e-40)
    x, correction = solve("cg", lambda u: 0 * u, v, rho=1e-40)
    assert x.isnan().all() and math.isnan(correction)


def test_preconditioning_saves_iterations():
    H, v = random_symmetric(200, 9, torch.cat([torch.logspace(2, 4, 10), torch.linspace(0.1, 1, 190)]))
    omega = sketch_matrix("gaussian", v, 20, torch.Generator().manual_seed(0))
    Y = H @ omega
    plain = cg_ihvp(products(H), v, 1.0, 200, 1e-8)[1]["iterations"]
    better = cg_ihvp(products(H), v, 1.0, 200, 1e-8, lambda r: nystrom_solve(Y, omega, r, 1.0)[0])[1]
    assert better["iterations"] < plain / 2


def test_cg_stops_on_negative_curvature():
    for eigenvalues in ([-5.0] * 6, [5.0, 3.0, 1.0, 0.5, -2.0, -4.0]):
        H, v = random_symmetric(6, 10, eigenvalues)
        x, info = cg_ihvp(products(H), v, 0.5)
        assert info["stopped"] == "curvature" and torch.isfinite(x).all()
    H, v = random_symmetric(6, 10, [-5.0] * 6)
    assert torch.allclose(cg_ihvp(products(H), v, 0.5)[0], v / 0.5)
    assert torch.equal(cg_ihvp(products(H), torch.zeros(6), 0.5)[0], torch.zeros(6))


H4 = torch.eye(4, dtype=torch.float64)
NAN = torch.tensor([1.0, float("nan"), 0.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "named, call",
    [
        ("rank", lambda v: nystrom_ihvp(products(H4), v, rank=-1)),
        ("rank", lambda v: nystrom_ihvp(products(H4), v, rank=5)),
        ("rho", lambda v: nystrom_ihvp(products(H4), v, rank=2, rho=0.0)),
        ("rho", lambda v: nystrom_solve(H4, H4, v, -1.0)),
        ("rho", lambda v: cg_ihvp(products(H4), v, rho=float("nan"))),
        ("v must", lambda v: nystrom_ihvp(products(H4), NAN, rank=2)),
        ("v must", lambda v: cg_ihvp(products(H4), NAN)),
        ("v must", lambda v: nystrom_solve(H4, H4, v[None], 1.0)),
        ("v must", lambda v: nystrom_ihvp(products(H4), v[:, None], rank=2)),
        ("not empty", lambda v: nystrom_ihvp(products(H4), v[:0], rank=0)),
        ("not empty", lambda v: cg_ihvp(products(H4), v[:0])),
        ("float32 or float64, got torch.int64", lambda v: nystrom_ihvp(products(H4), v.long(), rank=2)),
        ("float32 or float64, got torch.float16", lambda v: cg_ihvp(products(H4), v.half())),
        ("float32 or float64, got torch.bfloat16", lambda v: nystrom_solve(H4, H4, v.bfloat16(), 1.0)),
        ("kind", lambda v: make_sketch("rows", products(H4), v, 2)),
        ("u must", lambda v: hessian_products(lambda w: H4 @ w, v)(H4[:3])),
        ("Y", lambda v: nystrom_solve(H4[:, :2], H4[:, :3], v, 1.0)),
        ("Y", lambda v: nystrom_solve(H4 * float("inf"), H4, v, 1.0)),
        ("u must", lambda v: cg_ihvp(hessian_products(lambda w: H4 @ w, v), v[:3])),
    ],
)
def test_bad_input_names_the_argument(named, call):
    with pytest.raises(ValueError, match=named):
        call(torch.ones(4))


# tools/solvers.py


def test_solvers_make_the_products_that_are_written_down():
    matrix = np.diag(np.linspace(0.1, 30, 60))
    v = np.ones(60)
    for solver, budgets in solvers.BUDGETS.items():
        for budget in budgets:
            made = []
            product = lambda u: made.append(u[0].size) or matrix @ u  # of one vector, or of several at once
            solvers.solve(solver, product, v, budget, 50.0, torch.Generator().manual_seed(0))
            assert sum(made) == budget + 2 * (solver == "pcg"), (solver, budget)


def test_a_tracked_run_is_not_written_to(tmp_path):
    """What goes on with a copy leaves the run's record at wandb and in TensorBoard alone."""
    (tmp_path / "run").mkdir()
    given = []
    solvers.watch(tmp_path / "run", SimpleNamespace(main=given.extend))
    assert "--no-track" in given and "--no-tensorboard" in given
