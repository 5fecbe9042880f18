"""Inverse-Hessian-vector products (IHVP): x = (H + rho I)^{-1} v for the Hessian H of any PyTorch loss.

Everything works on flat vectors, in the order in which torch.nn.utils.parameters_to_vector ravels parameters.
Vectors may be NumPy's arrays as well as PyTorch's tensors, and what comes out is of the same kind:

    loss = ((targets - model(inputs)) ** 2).mean()
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    x, info = nystrom_ihvp(loss_hessian_products(loss, model.parameters()), v, rank=3, rho=50.0)

The solvers know H only through a map u -> H u, so that a Gauss-Newton or Fisher matrix can stand in for it.

The Nystrom method takes a sketch Y = H Omega, that is `rank` Hessian-vector products, and replaces H by
H_q = Y (Omega^T Y)^+ Y^T. What Omega is makes the method:

    "columns"     random coordinate vectors: the BLPO poster's formula, with C = H[:, Q] and M = H[Q, Q],
                  (H_q + rho I)^{-1} v = v / rho - C (M + C^T C / rho)^{-1} C^T v / rho^2
    "gaussian"    standard normal: randomized Nystrom (Frangella, Tropp & Udell, arXiv:2110.02820)
    "v-gaussian"  v first, then standard normal: H_q is exact on v, to which the inverse is applied
    "krylov"      an orthonormal basis of v, Hv, H^2 v, ...: exact on all of them, so that the error falls
                  geometrically. Its products come one after the other, those of the others in a batch

The raw formula is unsafe: the Hessian of a non-linear least-squares loss is indefinite, and M + C^T C / rho
can be singular. Here the directions in which the symmetrised M = Omega^T Y is not safely positive are
dropped, in float64, so that H_q is positive semidefinite and ||x|| <= ||v|| / rho always holds.
"""

import math

import numpy as np
import torch

SKETCHES = ("krylov", "v-gaussian", "gaussian", "columns")


class NotFinite(ValueError):
    """v, or the products with H, are not finite: there is no x."""


# Arrays of NumPy or PyTorch


def namespace(x):
    """The module whose functions take x: numpy, or torch."""
    return np if isinstance(x, np.ndarray) else torch


def like(tensor, x):
    """The tensor as x is: a NumPy array or a tensor."""
    return tensor.numpy() if isinstance(x, np.ndarray) else tensor


def norm(v) -> float:
    """||v||, as float(v @ v) can tell it: 0 or inf where squares underflow or overflow."""
    return math.sqrt(float(v @ v))


# The matrix H, known by its products


def gauss_newton_products(J, weights):
    """The map u -> J^T diag(weights) J u for u of shape (p,) or (p, q), where J has one output (K = 1) at n
    inputs and weights are (n,)."""
    diagonal = weights[:, None]

    def along(u):  # by itself: a function that calls itself would keep J until the garbage is collected
        return (diagonal * (J @ u)) @ J

    def product(u):
        return along(u) if u.ndim == 1 else namespace(u).stack([along(column) for column in u.T], 1)

    return product


def hessian_products(grad_fn, w):
    """The map u -> H(w) u for u of shape (p,), or (p, q) in one batch, by double backward.

    grad_fn maps a flat tensor w (p,) that requires grad to the flat gradient (p,), differentiably
    (`create_graph=True`).
    """
    w = w.detach().requires_grad_()
    return _derivative_products(grad_fn(w), [w])


def loss_hessian_products(loss, parameters):
    """As hessian_products, for the Hessian of a scalar loss by the parameters of a module, p in all."""
    parameters = list(parameters)
    optional = dict(create_graph=True, allow_unused=True, materialize_grads=True)
    gradients = torch.autograd.grad(loss, parameters, **optional)
    return _derivative_products(torch.cat([g.flatten() for g in gradients]), parameters)


def _derivative_products(gradient, parameters):
    """H is symmetric: vector-Jacobian products of the gradient (p,) are Hessian-vector products."""
    p = len(gradient)
    optional = dict(retain_graph=True, allow_unused=True)  # None for parameters in which the loss is linear

    def product(vectors):
        if len(vectors) != p or vectors.ndim > 2:
            raise ValueError(f"u must have shape ({p},) or ({p}, q), got {tuple(vectors.shape)}")
        u = torch.as_tensor(vectors).detach()
        if not gradient.requires_grad:  # the loss is linear
            return like(torch.zeros_like(u), vectors)
        if u.ndim == 1:
            parts = torch.autograd.grad(gradient, parameters, u, **optional)
        else:
            parts = torch.autograd.grad(gradient, parameters, u.T, is_grads_batched=True, **optional)
        q = 1 if u.ndim == 1 else u.shape[1]
        rows = []
        for w, part in zip(parameters, parts):
            rows.append(u.new_zeros(q, w.numel()) if part is None else part.reshape(q, w.numel()))
        return like(torch.cat(rows, 1).T.reshape(u.shape), vectors)

    return product


# Sketches


def sketch_matrix(kind, v, rank, generator=None):
    """Omega (p, rank) of every sketch but "krylov", which needs H; columns have about unit length. The
    generator is PyTorch's, on v's device."""
    known = torch.as_tensor(v)
    options = dict(dtype=known.dtype, device=known.device)
    if kind == "columns":
        omega = torch.zeros(len(v), rank, **options)
        rows = torch.randperm(len(v), generator=generator, device=known.device)[:rank]
        omega[rows, torch.arange(rank)] = 1
        return like(omega, v)
    omega = torch.randn(len(v), rank, generator=generator, **options) / math.sqrt(len(v))
    if kind == "v-gaussian" and rank > 0:
        omega[:, 0] = torch.as_tensor(_unit(v))
    return like(omega, v)


def krylov_sketch(product, v, rank):
    """Omega, an orthonormal basis of v, Hv, ..., H^(rank-1) v, and Y = H Omega, (p, rank) or narrower."""
    xp = namespace(v)
    omega = []  # rows
    Y = []
    size_of_Y = 0.0
    for j in range(rank):
        if j == 0:
            direction = _unit(v)
        else:
            direction = Y[-1]
            basis = xp.stack(omega)
            for _ in range(2):  # Gram-Schmidt, twice is enough
                direction = direction - (basis @ direction) @ basis
            size = _norm(direction)
            if not size > 100 * xp.finfo(v.dtype).eps * size_of_Y:  # H maps the basis into itself
                break
            direction = direction / size
        omega.append(direction)
        Y.append(product(direction))
        size_of_Y = math.hypot(size_of_Y, _norm(Y[-1]))
    if not Y:
        return v[:, None][:, :0], v[:, None][:, :0]
    return xp.stack(omega).T, xp.stack(Y).T


def make_sketch(kind, product, v, rank, generator=None):
    """Omega and Y = H Omega of one of the SKETCHES; product maps u to H u, for u of shape (p,) or (p, q)."""
    v = _vector(v)
    if kind not in SKETCHES:
        raise ValueError(f"kind of sketch must be one of {SKETCHES}, got {kind!r}")
    if not 0 <= rank <= len(v):
        raise ValueError(f"rank must lie between 0 and the number of parameters {len(v)}, got {rank}")
    if kind == "krylov":
        return krylov_sketch(product, v, rank)
    omega = sketch_matrix(kind, v, rank, generator)
    Y = product(omega) if rank else omega
    return omega, Y


# Solvers


def nystrom_solve(Y, omega, v, rho):
    """x = (H_q + rho I)^{-1} v from a sketch Y = H Omega: pure linear algebra, no autograd, no randomness.

    Shapes: Y and omega (p, q), v (p,). Eigen-directions of Omega^T Y with an eigenvalue below its rounding
    error, in Y's own precision, are dropped. Returns x in v's dtype and info: "correction" = ||x - v / rho||
    / ||v / rho|| and "rank", the directions kept. Raises NotFinite where v or Y is not finite.
    """
    v, scale = _checked(v, rho)
    xp = namespace(v)
    if Y.shape != omega.shape or Y.ndim != 2 or len(Y) != len(v):
        shapes = f"{tuple(Y.shape)} and {tuple(omega.shape)}"
        raise ValueError(f"Y and omega must both have shape ({len(v)}, q), got {shapes}")
    q = Y.shape[1]
    if scale == 0 or q == 0:
        return v / rho, {"correction": 0.0, "rank": 0}
    scaled = v[None] / scale  # a tiny float32 v must not underflow when it is squared
    rows = _double(xp.concatenate([omega.T, Y.T, scaled]))
    products = _numpy(rows[q:] @ rows.T)  # what follows is q x q
    if not math.isfinite(products.sum()):
        raise NotFinite("Y must be finite; the Hessian-vector products overflowed")
    M = products[:-1, :q]  # Y^T Omega
    YY = products[:-1, q:-1]
    Yv = products[:-1, -1]
    eigenvalues, U = np.linalg.eigh((M + M.T) / 2)
    size = norm(rows[:q].reshape(-1)) * math.sqrt(np.trace(YY))  # ||Omega|| ||Y||
    keep = eigenvalues > 10 * float(xp.finfo(Y.dtype).eps) * size
    U = U[:, keep] / np.sqrt(eigenvalues[keep])  # H_q = F F^T with F = Y U
    # Woodbury: (F F^T + rho I)^{-1} v = (v - F (rho I + F^T F)^{-1} F^T v) / rho, with F^T F = W diag(d) W^T
    d, W = np.linalg.eigh(U.T @ YY @ U)
    small = U @ (W @ (W.T @ (U.T @ Yv) / (rho + d.clip(0))))
    change = xp.asarray(small, device=rows.device) @ rows[q:-1]
    x = (rows[-1] - change) * (scale / rho)
    correction = math.sqrt(max(0.0, small @ YY @ small) / products[-1, -1])  # ||change|| / ||v||
    return xp.asarray(x, dtype=v.dtype), {"correction": correction, "rank": U.shape[1]}


def nystrom_ihvp(product, v, rank=2, rho=50.0, sketch="krylov", generator=None):
    """Sketch the Hessian with `rank` products and solve: the two steps above in one call."""
    omega, Y = make_sketch(sketch, product, v, rank, generator)
    return nystrom_solve(Y, omega, v, rho)


def cg_ihvp(product, v, rho=50.0, max_iters=50, tol=1e-5, preconditioner=None, measure=True):
    """Conjugate gradient on (H + rho I) x = v: a product with H an iteration, and one more to `measure`.

    `preconditioner` maps a residual r (p,) to an approximation of (H + rho I)^{-1} r, for example
    r -> nystrom_solve(Y, omega, r, rho)[0]. Returns x and info: "correction" as in nystrom_solve; "residual",
    ||(H + rho I) x - v|| / ||v||, measured, or else by CG's recurrence, which drifts away from it after many
    iterations and is NaN without one; "iterations"; and "stopped", which says why:

        "tolerance"   the residual is at most tol
        "iterations"  there were max_iters of them
        "curvature"   not positive along a direction, so that H + rho I is not positive definite: x is what
                      there was before it, v / rho if there was nothing
        "precision"   tol is below what the dtype of v can reach: begun again from the measured residual, more
                      iterations did not halve it (only if it is measured)

    Raises NotFinite where v, a product or the solution is not finite.
    """
    v, scale = _checked(v, rho)
    if scale == 0:
        return v / rho, {"correction": 0.0, "residual": 0.0, "iterations": 0, "stopped": "tolerance"}
    unit = _unit(v)
    norm_v = scale * norm(v / scale)  # no underflow
    x = 0 * v
    r = unit  # by recurrence, which drifts away from the true residual
    residual = 1.0  # the true one, when it was last measured
    iterations = 0
    stopped = None
    while not stopped:
        begun = iterations
        before = x
        z = r if preconditioner is None else preconditioner(r)
        rz = r @ z
        direction = z
        while iterations < max_iters and norm(r) > tol:
            image = product(direction) + rho * direction
            curvature = float(direction @ image)
            if not math.isfinite(curvature):
                raise NotFinite("the Hessian-vector products overflowed")
            if curvature <= 0:
                stopped = "curvature"
                break
            step = rz / curvature
            x = x + step * direction
            r = r - step * image
            z = r if preconditioner is None else preconditioner(r)
            rz, rz_old = r @ z, rz
            direction = z + (rz / rz_old) * direction
            iterations += 1
        if iterations == 0:
            x = unit / rho
        if not measure:
            if not math.isfinite(norm(r) + norm(x)):
                raise NotFinite("the solution overflowed: rho is too small for the dtype of v")
            residual = norm(r) if iterations else math.nan  # v / rho is not of the recurrence
            stopped = "tolerance" if residual <= tol else stopped or "iterations"
            break
        r = unit - product(x) - rho * x
        measured = norm(r)
        if not math.isfinite(measured):
            raise NotFinite("the solution overflowed: rho is too small for the dtype of v")
        if begun and measured > residual / 2:
            stopped = stopped or "precision"
        if begun and measured > residual:
            x = before  # which was better
        else:
            residual = measured
        if residual <= tol:
            stopped = "tolerance"
        elif iterations >= max_iters:
            stopped = stopped or "iterations"
    return x * norm_v, {
        "correction": norm(rho * x - unit),
        "residual": residual,
        "iterations": iterations,
        "stopped": stopped,
    }


def solve(method, product, v, rank=2, rho=50.0, sketch="krylov", cg_iters=50, cg_tol=1e-3, generator=None):
    """x = (H + rho I)^{-1} v by "nystrom", "cg" or "pcg" (CG preconditioned by the Nystrom sketch), and its
    "correction" (nystrom_solve); both are NaN where v or H is not finite. CG stops after cg_iters iterations,
    or at a relative residual of cg_tol."""
    try:
        if method == "nystrom":
            x, info = nystrom_ihvp(product, v, rank, rho, sketch, generator)
        elif method == "cg":
            x, info = cg_ihvp(product, v, rho, cg_iters, cg_tol, measure=False)
        elif method == "pcg":
            omega, Y = make_sketch(sketch, product, v, rank, generator)

            def preconditioner(r):
                return nystrom_solve(Y, omega, r, rho)[0]

            x, info = cg_ihvp(product, v, rho, cg_iters, cg_tol, preconditioner, measure=False)
        else:
            raise ValueError(f"method must be nystrom, cg or pcg, got {method!r}")
    except NotFinite:
        return math.nan * v, math.nan
    return x, info["correction"]


def _vector(v):
    """v, if it is what a solver can take, without its history: nothing here is differentiable in v."""
    if v.ndim != 1 or len(v) == 0:
        raise ValueError(f"v must be a flat vector, not empty, got shape {tuple(v.shape)}")
    if v.dtype not in (namespace(v).float32, namespace(v).float64):
        raise ValueError(f"v must be float32 or float64, got {v.dtype}: convert it, and what multiplies H")
    return v.detach() if isinstance(v, torch.Tensor) else v


def _checked(v, rho):
    """v without its history, and the largest |v_i|."""
    v = _vector(v)
    scale = float(abs(v).max())
    if not math.isfinite(scale):
        raise NotFinite("v must be a flat vector of finite numbers")
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be positive and finite, got {rho}")
    return v, scale


def _double(x):
    return x.astype(np.float64) if isinstance(x, np.ndarray) else x.double()


def _numpy(x):
    return x if isinstance(x, np.ndarray) else x.cpu().numpy()


def _norm(v) -> float:
    """||v||, where float32 would underflow or overflow."""
    return norm(_double(v))


def _unit(v):
    """v / ||v||; 0 if v is."""
    return v / max(_norm(v), float(namespace(v).finfo(v.dtype).tiny))
