"""Inverse-Hessian-vector products (IHVP): x = (H + rho I)^{-1} v for the Hessian H of any PyTorch loss.

Everything works on flat vectors; how parameters are raveled is the caller's business. Five lines suffice:

    w = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    loss = lambda w: ((targets - model_on_flat_parameters(w, inputs)) ** 2).mean()
    grad_fn = lambda w: torch.autograd.grad(loss(w), w, create_graph=True)[0]
    v = torch.randn_like(w)
    x, info = nystrom_ihvp(grad_fn, w, v, rank=3, rho=50.0)

The Nystrom method knows H only through a sketch Y = H Omega, that is `rank` Hessian-vector products, and replaces H by
H_q = Y (Omega^T Y)^+ Y^T. What Omega is makes the method:

    "columns"     random coordinate vectors: the BLPO poster's formula, with C = H[:, Q] and M = H[Q, Q],
                  (H_q + rho I)^{-1} v = v / rho - C (M + C^T C / rho)^{-1} C^T v / rho^2
    "gaussian"    standard normal: randomized Nystrom approximation, Frangella, Tropp & Udell (arXiv:2110.02820)
    "v-gaussian"  v first, then standard normal: H_q is exact on v, the one vector that the inverse is applied to
    "krylov"      an orthonormal basis of v, Hv, H^2 v, ...: exact on all of them, so that the error falls geometrically;
                  its products come one after the other, those of the others in one batch

The raw formula is unsafe: the Hessian of a non-linear least-squares loss is indefinite, and M + C^T C / rho can be singular.
Here the directions in which the symmetrised M = Omega^T Y is not safely positive are dropped, in float64, so that H_q is
positive semidefinite and ||x|| <= ||v|| / rho always holds.
"""

import math

import torch

SKETCHES = ("krylov", "v-gaussian", "gaussian", "columns")


def sketch_matrix(kind, v, rank, generator=None):
    """Omega (p, rank) of every sketch but "krylov", which needs H: see krylov_sketch. Columns have about unit length."""
    like = dict(dtype=v.dtype, device=v.device)
    if kind == "columns":
        omega = torch.zeros(len(v), rank, **like)
        omega[torch.randperm(len(v), generator=generator, device=v.device)[:rank], torch.arange(rank)] = 1
        return omega
    omega = torch.randn(len(v), rank, generator=generator, **like) / math.sqrt(len(v))
    if kind == "v-gaussian" and rank > 0:
        omega[:, 0] = _unit(v)
    return omega


def hessian_sketch(grad_fn, w, omega):
    """Y = H(w) Omega, shape (p, q): q Hessian-vector products in one batched double backward.

    grad_fn maps a flat w (p,) that requires grad to the flat gradient (p,), differentiably (`create_graph=True`).
    """
    if w.ndim != 1 or omega.ndim != 2 or len(omega) != len(w):
        raise ValueError(f"omega must have shape ({w.numel()}, q) for w of shape (p,), got {tuple(omega.shape)}")
    if omega.shape[1] == 0:
        return torch.zeros_like(omega)
    w = w.detach().requires_grad_()
    gradient = grad_fn(w)
    # H is symmetric, so the vector-Jacobian products of the gradient are Hessian-vector products.
    return torch.autograd.grad(gradient, w, omega.T, is_grads_batched=True)[0].T


def krylov_sketch(grad_fn, w, v, rank):
    """Omega, an orthonormal basis of span{v, Hv, ..., H^(rank-1) v}, and Y = H Omega, both (p, rank) or narrower."""
    w = w.detach().requires_grad_()
    gradient = grad_fn(w)
    omega, Y = v.new_zeros(len(v), rank), v.new_zeros(len(v), rank)
    direction = _unit(v)
    for j in range(rank):
        omega[:, j] = direction
        Y[:, j] = torch.autograd.grad(gradient, w, direction, retain_graph=True)[0]
        basis, direction = omega[:, : j + 1], Y[:, j]
        for _ in range(2):  # Gram-Schmidt, twice is enough
            direction = direction - basis @ (basis.T @ direction)
        norm = direction.norm()
        if not norm > 100 * torch.finfo(v.dtype).eps * Y.norm():  # H maps the basis into itself: nothing is missing
            return omega[:, : j + 1], Y[:, : j + 1]
        direction = direction / norm
    return omega, Y


def make_sketch(kind, grad_fn, w, v, rank, generator=None):
    """Omega and Y = H(w) Omega of one of the SKETCHES."""
    if kind not in SKETCHES:
        raise ValueError(f"kind of sketch must be one of {SKETCHES}, got {kind!r}")
    if not 0 <= rank <= len(v):
        raise ValueError(f"rank must lie between 0 and the number of parameters {len(v)}, got {rank}")
    if w.shape != v.shape:
        raise ValueError(f"w and v must have the same shape, got {tuple(w.shape)} and {tuple(v.shape)}")
    if kind == "krylov":
        return krylov_sketch(grad_fn, w, v, rank)
    omega = sketch_matrix(kind, v, rank, generator)
    return omega, hessian_sketch(grad_fn, w, omega)


def nystrom_solve(Y, omega, v, rho):
    """x = (H_q + rho I)^{-1} v from a sketch Y = H Omega: pure linear algebra, no autograd, no randomness.

    Shapes: Y and omega (p, q), v (p,). Eigen-directions of Omega^T Y with an eigenvalue below the rounding error of the
    largest, in Y's own precision, are dropped. Returns x in v's dtype and info: "correction" = ||x - v / rho|| / ||v / rho|| and "rank", the directions kept.
    """
    _check(v, rho)
    if Y.shape != omega.shape or Y.ndim != 2 or len(Y) != len(v):
        raise ValueError(f"Y and omega must both have shape ({len(v)}, q), got {tuple(Y.shape)} and {tuple(omega.shape)}")
    scale = v.abs().max().double()  # normalised first: a tiny float32 v must not underflow when it is squared
    if scale == 0 or Y.shape[1] == 0:
        return v / rho, {"correction": 0.0, "rank": 0}
    if not torch.isfinite(Y).all():
        raise ValueError("Y must be finite; the Hessian-vector products overflowed")
    tol = 10 * torch.finfo(Y.dtype).eps
    Y, omega, unit = Y.double(), omega.double(), v.double() / scale
    M = omega.T @ Y
    eigenvalues, U = torch.linalg.eigh((M + M.T) / 2)
    keep = eigenvalues > tol * eigenvalues[-1].clamp_min(0)
    F = Y @ (U[:, keep] / eigenvalues[keep].sqrt())  # H_q = F F^T, (p, kept)
    # Woodbury: (F F^T + rho I)^{-1} v = (v - F (rho I + F^T F)^{-1} F^T v) / rho
    inner = F.T @ F + rho * torch.eye(F.shape[1], dtype=F.dtype, device=F.device)
    change = F @ torch.linalg.solve(inner, F.T @ unit)
    x = (unit - change) * (scale / rho)
    return x.to(v.dtype), {"correction": float(change.norm() / unit.norm()), "rank": int(keep.sum())}


def nystrom_ihvp(grad_fn, w, v, rank=3, rho=50.0, sketch="krylov", generator=None):
    """Sketch the Hessian of the loss at w with `rank` products and solve: the two steps above in one call."""
    _check(v, rho)
    omega, Y = make_sketch(sketch, grad_fn, w, v, rank, generator)
    return nystrom_solve(Y, omega, v, rho)


def cg_ihvp(grad_fn, w, v, rho=50.0, max_iters=50, tol=1e-5, preconditioner=None):
    """Conjugate gradient on (H + rho I) x = v, one Hessian-vector product an iteration.

    Stops when ||r|| <= tol ||v||, after max_iters, or on a direction of non-positive or non-finite curvature, where it
    keeps the x it has (v / rho if it has none). `preconditioner` maps a residual r (p,) to an approximation of
    (H + rho I)^{-1} r, for example r -> nystrom_solve(Y, omega, r, rho)[0]. Returns x and info: "correction" as above,
    "residual" = ||(H + rho I) x - v|| / ||v||, "iterations" and "negative_curvature".
    """
    _check(v, rho)
    if w.shape != v.shape:
        raise ValueError(f"w and v must have the same shape, got {tuple(w.shape)} and {tuple(v.shape)}")
    scale = float(v.abs().max())
    if scale == 0:
        return v / rho, {"correction": 0.0, "residual": 0.0, "iterations": 0, "negative_curvature": False}
    w = w.detach().requires_grad_()
    gradient = grad_fn(w)
    unit = _unit(v)
    norm_v = scale * float((v / scale).norm())  # no underflow
    x, r = torch.zeros_like(v), unit
    z = r if preconditioner is None else preconditioner(r)
    direction, rz = z, r @ z
    iterations, negative_curvature = 0, False
    while iterations < max_iters and float(r.norm()) > tol:
        product = torch.autograd.grad(gradient, w, direction, retain_graph=True)[0] + rho * direction
        curvature = float(direction @ product)
        if not 0 < curvature < math.inf:
            negative_curvature = True
            break
        step = rz / curvature
        x, r = x + step * direction, r - step * product
        z = r if preconditioner is None else preconditioner(r)
        rz, rz_old = r @ z, rz
        direction = z + (rz / rz_old) * direction
        iterations += 1
    x = x if iterations else unit / rho
    residual = float(r.norm()) if iterations else math.nan
    correction = float((rho * x - unit).norm())
    return x * norm_v, {"correction": correction, "residual": residual, "iterations": iterations, "negative_curvature": negative_curvature}


def _check(v, rho):
    if v.ndim != 1 or not torch.isfinite(v).all():
        raise ValueError("v must be a flat vector of finite numbers")
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be positive and finite, got {rho}")


def _unit(v):
    scaled = v / v.abs().max().clamp_min(torch.finfo(v.dtype).tiny)  # a tiny float32 v would underflow in the norm
    return scaled / scaled.norm().clamp_min(torch.finfo(v.dtype).tiny)
