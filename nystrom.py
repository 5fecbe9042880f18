"""Inverse-Hessian-vector products (IHVP): x = (H + rho I)^{-1} v for the Hessian H of any PyTorch loss.

Everything works on flat vectors, in the order in which torch.nn.utils.parameters_to_vector ravels parameters:

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
from functools import cached_property

import numpy as np
import torch

SKETCHES = ("krylov", "v-gaussian", "gaussian", "columns")


class NotFinite(ValueError):
    """v, or the products with H, are not finite: there is no x."""


# The matrix H, known by its products


def hessian_products(grad_fn, w):
    """The map u -> H(w) u for u of shape (p,), or (p, q) in one batch, by double backward.

    grad_fn maps a flat w (p,) that requires grad to the flat gradient (p,), differentiably
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

    def product(u):
        if len(u) != p or u.ndim > 2:
            raise ValueError(f"u must have shape ({p},) or ({p}, q), got {tuple(u.shape)}")
        u = u.detach()
        if not gradient.requires_grad:  # the loss is linear
            return torch.zeros_like(u)
        if u.ndim == 1:
            parts = torch.autograd.grad(gradient, parameters, u, **optional)
        else:
            parts = torch.autograd.grad(gradient, parameters, u.T, is_grads_batched=True, **optional)
        q = 1 if u.ndim == 1 else u.shape[1]
        rows = []
        for w, part in zip(parameters, parts):
            rows.append(u.new_zeros(q, w.numel()) if part is None else part.reshape(q, w.numel()))
        return torch.cat(rows, 1).T.reshape(u.shape)

    return product


class Jacobian:
    """J (n, p): derivatives of the n outputs of a net by its parameters. The net is a torch.nn.Sequential of
    Linear layers and activations with one output unit; inputs (n, ...); its outputs are `values` (n,).

    For a layer y = W a + b the derivatives are dV_i/dW = g_i a_i^T and dV_i/db = g_i with g_i = dV_i/dy_i,
    which one backward pass gives for all n. Products with J and its transpose then are a few matrix products
    without autograd. The backward pass is made when the first of them asks for it, so that whoever needs only
    the values pays for no more.
    """

    def __init__(self, net, inputs):
        self.inputs_of_layers = []  # a (n, in) of each linear layer
        self.outputs_of_layers = []  # y (n, out)
        y = inputs
        for layer in net:
            a = y.detach()
            y = layer(y)
            if isinstance(layer, torch.nn.Linear):
                self.inputs_of_layers.append(a)
                self.outputs_of_layers.append(y)
        self.output = y
        self.values = y.detach().squeeze(-1)

    @cached_property
    def layers(self):
        """a (n, in) and g (n, out) of each linear layer."""
        derivatives = torch.autograd.grad(self.output.sum(), self.outputs_of_layers)
        return list(zip(self.inputs_of_layers, derivatives))

    @cached_property
    def sizes(self):
        """Of weight and bias of each linear layer, in the order of the parameters."""
        return [size for a, g in self.layers for size in (g.shape[1] * a.shape[1], g.shape[1])]

    def __matmul__(self, u):
        """J u: (p,) -> (n,)"""
        parts = iter(u.split(self.sizes))
        total = 0
        for a, g in self.layers:
            W = next(parts).view(-1, a.shape[1])
            b = next(parts)
            total = total + (torch.addmm(b, a, W.T) * g).sum(1)
        return total

    def transposed(self, s):
        """J^T s: (n,) -> (p,)"""
        weighted = [(a, s[:, None] * g) for a, g in self.layers]
        return torch.cat([part.flatten() for a, g in weighted for part in (g.T @ a, g.sum(0))])


def gauss_newton_products(J, weights):
    """The map u -> J^T diag(weights) J u for u of shape (p,) or (p, q); J has n rows, weights are (n,)."""

    def product(u):
        if u.ndim == 2:
            return torch.stack([product(column) for column in u.T], 1)
        return J.transposed(weights * (J @ u))

    return product


# Sketches


def sketch_matrix(kind, v, rank, generator=None):
    """Omega (p, rank) of every sketch but "krylov", which needs H; columns have about unit length."""
    like = dict(dtype=v.dtype, device=v.device)
    if kind == "columns":
        omega = torch.zeros(len(v), rank, **like)
        omega[torch.randperm(len(v), generator=generator, device=v.device)[:rank], torch.arange(rank)] = 1
        return omega
    omega = torch.randn(len(v), rank, generator=generator, **like) / math.sqrt(len(v))
    if kind == "v-gaussian" and rank > 0:
        omega[:, 0] = _unit(v)
    return omega


def krylov_sketch(product, v, rank):
    """Omega, an orthonormal basis of v, Hv, ..., H^(rank-1) v, and Y = H Omega, (p, rank) or narrower."""
    omega = v.new_zeros(rank, len(v))  # rows, contiguous, until they are returned
    Y = v.new_zeros(rank, len(v))
    for j in range(rank):
        if j == 0:
            direction = _unit(v)
        else:
            direction = Y[j - 1]
            basis = omega[:j]
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
    if Y.shape != omega.shape or Y.ndim != 2 or len(Y) != len(v):
        shapes = f"{tuple(Y.shape)} and {tuple(omega.shape)}"
        raise ValueError(f"Y and omega must both have shape ({len(v)}, q), got {shapes}")
    q = Y.shape[1]
    if scale == 0 or q == 0:
        return v / rho, {"correction": 0.0, "rank": 0}
    scaled = v / scale  # a tiny float32 v must not underflow when it is squared
    rows = torch.cat([omega.T, Y.T, scaled[None]]).detach().double()
    products = (rows[q:-1] @ rows.T).cpu().numpy()  # Y^T Omega, Y^T Y and Y^T v: what follows is q x q
    if not np.isfinite(products).all():
        raise NotFinite("Y must be finite; the Hessian-vector products overflowed")
    M = products[:, :q]
    YY = products[:, q:-1]
    Yv = products[:, -1]
    eigenvalues, U = np.linalg.eigh((M + M.T) / 2)
    keep = eigenvalues > 10 * torch.finfo(Y.dtype).eps * float(rows[:q].norm() * rows[q:-1].norm())
    U = U[:, keep] / np.sqrt(eigenvalues[keep])  # H_q = F F^T with F = Y U
    # Woodbury: (F F^T + rho I)^{-1} v = (v - F (rho I + F^T F)^{-1} F^T v) / rho, with F^T F = W diag(d) W^T
    d, W = np.linalg.eigh(U.T @ YY @ U)
    small = U @ (W @ (W.T @ (U.T @ Yv) / (rho + d.clip(0))))
    change = torch.from_numpy(small).to(v.device) @ rows[q:-1]
    x = (scaled - change) * (scale / rho)
    return x.to(v.dtype), {"correction": float(change.norm() / scaled.norm()), "rank": U.shape[1]}


def nystrom_ihvp(product, v, rank=3, rho=50.0, sketch="krylov", generator=None):
    """Sketch the Hessian with `rank` products and solve: the two steps above in one call."""
    omega, Y = make_sketch(sketch, product, v, rank, generator)
    return nystrom_solve(Y, omega, v, rho)


def cg_ihvp(product, v, rho=50.0, max_iters=50, tol=1e-5, preconditioner=None):
    """Conjugate gradient on (H + rho I) x = v: one Hessian-vector product an iteration, one more to measure.

    `preconditioner` maps a residual r (p,) to an approximation of (H + rho I)^{-1} r, for example
    r -> nystrom_solve(Y, omega, r, rho)[0]. Returns x and info: "correction" as in nystrom_solve; "residual",
    ||(H + rho I) x - v|| / ||v||, measured; "iterations"; and "stopped", which says why:

        "tolerance"   the residual is at most tol
        "iterations"  there were max_iters of them
        "curvature"   not positive along a direction, so that H + rho I is not positive definite: x is what
                      there was before it, v / rho if there was nothing
        "precision"   tol is below what the dtype of v can reach: begun again from the measured residual, more
                      iterations did not halve it

    Raises NotFinite where v or a product is not finite.
    """
    v, scale = _checked(v, rho)
    if scale == 0:
        return v / rho, {"correction": 0.0, "residual": 0.0, "iterations": 0, "stopped": "tolerance"}
    unit = _unit(v)
    norm_v = scale * float((v / scale).norm())  # no underflow
    x = torch.zeros_like(v)
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
        while iterations < max_iters and float(r.norm()) > tol:
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
        r = unit - product(x) - rho * x
        measured = float(r.norm())
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
        "correction": float((rho * x - unit).norm()),
        "residual": residual,
        "iterations": iterations,
        "stopped": stopped,
    }


def solve(method, product, v, rank=2, rho=50.0, sketch="krylov", cg_iters=50, generator=None):
    """x = (H + rho I)^{-1} v by "nystrom", "cg" or "pcg" (CG preconditioned by the Nystrom sketch), and its
    "correction" (nystrom_solve); both are NaN where v or H is not finite. CG stops at a relative residual of
    1e-3."""
    try:
        if method == "nystrom":
            x, info = nystrom_ihvp(product, v, rank, rho, sketch, generator)
        elif method == "cg":
            x, info = cg_ihvp(product, v, rho, cg_iters, 1e-3)
        elif method == "pcg":
            omega, Y = make_sketch(sketch, product, v, rank, generator)

            def preconditioner(r):
                return nystrom_solve(Y, omega, r, rho)[0]

            x, info = cg_ihvp(product, v, rho, cg_iters, 1e-3, preconditioner)
        else:
            raise ValueError(f"method must be nystrom, cg or pcg, got {method!r}")
    except NotFinite:
        return torch.full_like(v, math.nan), math.nan
    return x, info["correction"]


def _vector(v):
    """v, if it is what a solver can take, without its history: nothing here is differentiable in v."""
    if v.ndim != 1 or len(v) == 0:
        raise ValueError(f"v must be a flat vector, not empty, got shape {tuple(v.shape)}")
    if v.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"v must be float32 or float64, got {v.dtype}: convert it, and what multiplies H")
    return v.detach()


def _checked(v, rho):
    """v without its history, and the largest |v_i|."""
    v = _vector(v)
    scale = float(v.abs().max())
    if not math.isfinite(scale):
        raise NotFinite("v must be a flat vector of finite numbers")
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be positive and finite, got {rho}")
    return v, scale


def _unit(v):
    tiny = torch.finfo(v.dtype).tiny
    scaled = v / v.abs().max().clamp_min(tiny)  # a tiny float32 v would underflow in the norm
    return scaled / scaled.norm().clamp_min(tiny)
