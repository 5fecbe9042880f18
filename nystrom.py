"""Inverse-Hessian-vector products (IHVP): x = (H + rho I)^{-1} v for the Hessian H of any PyTorch loss.

Everything works on flat vectors; how parameters are raveled is the caller's business. Five lines suffice:

    w = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    loss = lambda w: ((targets - model_on_flat_parameters(w, inputs)) ** 2).mean()
    grad_fn = lambda w: torch.autograd.grad(loss(w), w, create_graph=True)[0]
    v = torch.randn_like(w)
    x, info = nystrom_ihvp(hessian_products(grad_fn, w), v, rank=3, rho=50.0)

The solvers know H only through a map u -> H u, so that a Gauss-Newton or Fisher matrix can stand in for it.

The Nystrom method takes a sketch Y = H Omega, that is `rank` Hessian-vector products, and replaces H by
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

import numpy as np
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


def hessian_products(grad_fn, w):
    """The map u -> H(w) u for u of shape (p,), or (p, q) in one batch, by double backward.

    grad_fn maps a flat w (p,) that requires grad to the flat gradient (p,), differentiably (`create_graph=True`).
    """
    w = w.detach().requires_grad_()
    gradient = grad_fn(w)

    def product(u):
        if len(u) != len(w) or u.ndim > 2:
            raise ValueError(f"u must have shape ({len(w)},) or ({len(w)}, q), got {tuple(u.shape)}")
        # H is symmetric, so the vector-Jacobian products of the gradient are Hessian-vector products.
        if u.ndim == 1:
            return torch.autograd.grad(gradient, w, u, retain_graph=True)[0]
        return torch.autograd.grad(gradient, w, u.T, retain_graph=True, is_grads_batched=True)[0].T

    return product


def krylov_sketch(product, v, rank):
    """Omega, an orthonormal basis of span{v, Hv, ..., H^(rank-1) v}, and Y = H Omega, both (p, rank) or narrower."""
    omega, Y = v.new_zeros(rank, len(v)), v.new_zeros(rank, len(v))  # rows, contiguous, until they are returned
    for j in range(rank):
        if j == 0:
            direction = _unit(v)
        else:
            direction, basis = Y[j - 1], omega[:j]
            for _ in range(2):  # Gram-Schmidt, twice is enough
                direction = direction - (basis @ direction) @ basis
            norm = float(direction.norm())
            noise = torch.finfo(v.dtype).eps * float(Y.double().norm())
            if not norm > 100 * noise:  # H maps the basis into itself: all is there
                return basis.T, Y[:j].T
            direction = direction / norm
        omega[j] = direction
        Y[j] = product(direction)
    return omega.T, Y.T


def make_sketch(kind, product, v, rank, generator=None):
    """Omega and Y = H Omega of one of the SKETCHES; product maps u to H u, for u of shape (p,) or (p, q)."""
    if v.ndim != 1:
        raise ValueError(f"v must be a flat vector, got shape {tuple(v.shape)}")
    if kind not in SKETCHES:
        raise ValueError(f"kind of sketch must be one of {SKETCHES}, got {kind!r}")
    if not 0 <= rank <= len(v):
        raise ValueError(f"rank must lie between 0 and the number of parameters {len(v)}, got {rank}")
    if kind == "krylov":
        return krylov_sketch(product, v, rank)
    omega = sketch_matrix(kind, v, rank, generator)
    return omega, product(omega) if rank else omega


def nystrom_solve(Y, omega, v, rho):
    """x = (H_q + rho I)^{-1} v from a sketch Y = H Omega: pure linear algebra, no autograd, no randomness.

    Shapes: Y and omega (p, q), v (p,). Eigen-directions of Omega^T Y with an eigenvalue below its rounding error, in Y's own
    precision, are dropped. Returns x in v's dtype and info: "correction" = ||x - v / rho|| / ||v / rho|| and "rank", the
    directions kept.
    """
    scale = _check(v, rho)
    if Y.shape != omega.shape or Y.ndim != 2 or len(Y) != len(v):
        raise ValueError(f"Y and omega must both have shape ({len(v)}, q), got {tuple(Y.shape)} and {tuple(omega.shape)}")
    q = Y.shape[1]
    if scale == 0 or q == 0:
        return v / rho, {"correction": 0.0, "rank": 0}
    unit = v / scale  # a tiny float32 v must not underflow when it is squared
    rows = torch.cat([omega.T, Y.T, unit[None]]).detach().double()
    products = (rows[q:-1] @ rows.T).cpu().numpy()  # Y^T Omega, Y^T Y and Y^T v: what follows is q x q
    if not np.isfinite(products).all():
        raise ValueError("Y must be finite; the Hessian-vector products overflowed")
    M, YY, Yv = products[:, :q], products[:, q:-1], products[:, -1]
    eigenvalues, U = np.linalg.eigh((M + M.T) / 2)
    keep = eigenvalues > 10 * torch.finfo(Y.dtype).eps * float(rows[:q].norm() * rows[q:-1].norm())
    U = U[:, keep] / np.sqrt(eigenvalues[keep])  # H_q = F F^T with F = Y U
    # Woodbury: (F F^T + rho I)^{-1} v = (v - F (rho I + F^T F)^{-1} F^T v) / rho, with F^T F = W diag(d) W^T
    d, W = np.linalg.eigh(U.T @ YY @ U)
    small = U @ (W @ (W.T @ (U.T @ Yv) / (rho + d.clip(0))))
    change = torch.from_numpy(small).to(v.device) @ rows[q:-1]
    x = (unit - change) * (scale / rho)
    return x.to(v.dtype), {"correction": float(change.norm() / unit.norm()), "rank": U.shape[1]}


def nystrom_ihvp(product, v, rank=3, rho=50.0, sketch="krylov", generator=None):
    """Sketch the Hessian with `rank` products and solve: the two steps above in one call."""
    omega, Y = make_sketch(sketch, product, v, rank, generator)
    return nystrom_solve(Y, omega, v, rho)


def cg_ihvp(product, v, rho=50.0, max_iters=50, tol=1e-5, preconditioner=None):
    """Conjugate gradient on (H + rho I) x = v, one Hessian-vector product an iteration.

    Stops when ||r|| <= tol ||v||, after max_iters, or on a direction of non-positive or non-finite curvature, where it
    keeps the x it has (v / rho if it has none). `preconditioner` maps a residual r (p,) to an approximation of
    (H + rho I)^{-1} r, for example r -> nystrom_solve(Y, omega, r, rho)[0]. Returns x and info: "correction" as above,
    "residual" = ||(H + rho I) x - v|| / ||v||, "iterations" and "negative_curvature".
    """
    scale = _check(v, rho)
    if scale == 0:
        return v / rho, {"correction": 0.0, "residual": 0.0, "iterations": 0, "negative_curvature": False}
    unit = _unit(v)
    norm_v = scale * float((v / scale).norm())  # no underflow
    x, r = torch.zeros_like(v), unit
    z = r if preconditioner is None else preconditioner(r)
    direction, rz = z, r @ z
    iterations, negative_curvature = 0, False
    while iterations < max_iters and float(r.norm()) > tol:
        image = product(direction) + rho * direction
        curvature = float(direction @ image)
        if not 0 < curvature < math.inf:
            negative_curvature = True
            break
        step = rz / curvature
        x, r = x + step * direction, r - step * image
        z = r if preconditioner is None else preconditioner(r)
        rz, rz_old = r @ z, rz
        direction = z + (rz / rz_old) * direction
        iterations += 1
    x = x if iterations else unit / rho
    residual = float(r.norm()) if iterations else math.nan
    correction = float((rho * x - unit).norm())
    return x * norm_v, {"correction": correction, "residual": residual, "iterations": iterations, "negative_curvature": negative_curvature}


def _check(v, rho):
    """The largest |v_i|, if v and rho are what a solver can take."""
    if v.ndim != 1 or not math.isfinite(scale := float(v.abs().max())):
        raise ValueError("v must be a flat vector of finite numbers")
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be positive and finite, got {rho}")
    return scale


def _unit(v):
    scaled = v / v.abs().max().clamp_min(torch.finfo(v.dtype).tiny)  # a tiny float32 v would underflow in the norm
    return scaled / scaled.norm().clamp_min(torch.finfo(v.dtype).tiny)
