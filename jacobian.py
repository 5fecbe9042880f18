"""All that an update needs of a network: its parameters as one flat array, and its Jacobian.

J holds the derivatives of the K outputs at n inputs with respect to the p parameters of the network, and is
known by two products: J @ u, the change (n, K) of the outputs along u (p,), and s @ J, the gradient (p,) of
sum(s * outputs) for s (n, K). They give, without autograd,

    the gradient of a mean squared error     (2/B) (V - R) @ J       with V and R (B, 1)
    Gauss-Newton products                    (2/B) (J @ u) @ J
    policy gradients                         s @ J                   with s_k = e_k d log pi_k / d outputs_k

the last for sum_k e_k grad log pi_k. J.by_input(s) is the gradient of sum(s * outputs) with respect to the
inputs. A Jacobian is of the parameters as they are when it is made: it may be used until they change.

The same code runs on NumPy's arrays on the CPU, where a call of PyTorch costs more than the arithmetic of a
minibatch, and on PyTorch's tensors on a GPU.
"""

import math
from functools import cached_property, partial

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, jvp, vjp
from torch.optim.adamw import adamw

from nystrom import like, namespace, norm
from support.acting import is_rectified, linear_layers
from support.flags import Stop

Array = np.ndarray | torch.Tensor


def as_array(tensor):
    """A tensor's memory as a NumPy array; off the CPU the tensor itself. Without history in either case."""
    return tensor.detach().numpy() if tensor.device.type == "cpu" else tensor.detach()


def on_device(array, device: str):
    """A NumPy array as what the scripts calculate with there: on the CPU itself, elsewhere a tensor."""
    return as_array(torch.as_tensor(array, device=device))


def flatten(module: nn.Module, device="cpu"):
    """Moves the module to the device and all its parameters into one flat array (p,), of which they become
    views: what changes the array changes the module."""
    module.to(device)
    vector = nn.utils.parameters_to_vector(module.parameters()).detach()
    parts = vector.split([p.numel() for p in module.parameters()])
    for p, part in zip(module.parameters(), parts):
        p.data = part.view_as(p)
    return as_array(vector)


# The Jacobian of a network, known by its products


def product(a, b):
    """a @ b, of matrices. PyTorch multiplies large ones of NumPy, too, where they lie: its library can be
    several times as fast as NumPy's (docs/preferences.md, "Speed"); with a shorter side it is slower."""
    if isinstance(a, np.ndarray) and a.dtype == b.dtype and min(*a.shape, *b.shape) >= 128:
        return torch.mm(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    return a @ b


def jacobian_of(net: nn.Module):
    """The map from inputs (n, ...) to the net's Jacobian there. It is written out for a torch.nn.Sequential
    of Linear layers with Tanh or ReLU between them, whose parameters may change but must stay where they are
    in memory, and made by PyTorch for any other module."""
    layers = linear_layers(net)
    if layers is None:
        return partial(ModuleJacobian, net)
    kind = RectifiedJacobian if is_rectified(net) else MLPJacobian
    return partial(kind, [(as_array(layer.weight), as_array(layer.bias)) for layer in layers])


class MLPJacobian:
    """J of a tanh network at x (n, inputs): its `outputs` (n, K), J @ u and s @ J. `layers` are pairs of W
    and b; flat vectors hold W_1, b_1, W_2, b_2, ..."""

    __array_ufunc__ = None  # so that NumPy leaves s @ J to __rmatmul__

    def __init__(self, layers, x):
        self.layers = layers
        self.inputs = [x]  # a of every layer W a + b, (n, m)
        for W, b in layers[:-1]:
            self.inputs.append(self.activation(product(self.inputs[-1], W.T) + b))
        W, b = layers[-1]
        self.outputs = self.inputs[-1] @ W.T + b

    @staticmethod
    def activation(z):
        return namespace(z).tanh(z)

    @staticmethod
    def slope(a):
        """The derivative of the activation where its value is a."""
        return 1 - a * a

    def backward(self, s):
        """The derivatives g (n, m) of sum(s * outputs) with respect to every layer's W a + b."""
        found = [s]
        for (W, _), a in zip(self.layers[:0:-1], self.inputs[:0:-1]):
            found.append(product(found[-1], W) * self.slope(a))
        return found[::-1]

    def by_input(self, s):
        """The derivatives of sum(s * outputs) with respect to x, (n, K) -> (n, inputs)."""
        return self.backward(s)[0] @ self.layers[0][0]

    @cached_property
    def single(self):
        """backward(1) of a network with one output: the rows of any other backward(s) are multiples of it."""
        return self.backward(namespace(self.outputs).ones_like(self.outputs))

    def __matmul__(self, u):
        """J u: (p,) -> (n, K)"""
        xp = namespace(u)
        begin = 0
        changes = []  # of every layer's W a + b by its own W and b
        for (W, b), a in zip(self.layers, self.inputs):
            end = begin + W.shape[0] * W.shape[1]
            changes.append(product(a, u[begin:end].reshape(W.shape).T) + u[end : end + len(b)])
            begin = end + len(b)
        if self.outputs.shape[1] == 1:
            return sum(xp.einsum("nm,nm->n", change, g) for change, g in zip(changes, self.single))[:, None]
        total = changes[0]
        for (W, _), a, change in zip(self.layers[1:], self.inputs[1:], changes[1:]):
            total = product(total * self.slope(a), W.T) + change
        return total

    def __rmatmul__(self, s):
        """s J: (n, K) -> (p,), the gradient of sum(s * outputs)."""
        xp = namespace(s)
        ones = xp.ones_like(s[:, 0])
        derivatives = [s * g for g in self.single] if s.shape[1] == 1 else self.backward(s)
        parts = []
        for a, g in zip(self.inputs, derivatives):
            parts += [product(g.T, a).reshape(-1), ones @ g]  # by W, by b
        return xp.concatenate(parts)


class RectifiedJacobian(MLPJacobian):
    """The same of a ReLU network. Its slope at 0 is 0, as PyTorch has it."""

    @staticmethod
    def activation(z):
        return z.clip(0)

    @staticmethod
    def slope(a):
        return a > 0


class ModuleJacobian:
    """The same of any module, by PyTorch: s @ J by autograd, which has no graph under torch.no_grad(), the
    other products by calling the module again."""

    __array_ufunc__ = None

    def __init__(self, module, x):
        self.x = x
        self.module = module
        self.parameters = dict(module.named_parameters())
        self.graph = module(torch.as_tensor(x)).reshape(len(x), -1)
        self.outputs = like(self.graph.detach(), x)

    def __matmul__(self, u):
        """J u: (p,) -> (n, K)"""
        parts = torch.as_tensor(u).split([p.numel() for p in self.parameters.values()])
        tangents = {name: part.view_as(self.parameters[name]) for name, part in zip(self.parameters, parts)}

        def outputs_of(parameters):
            return functional_call(self.module, parameters, torch.as_tensor(self.x)).reshape(len(self.x), -1)

        return like(jvp(outputs_of, (self.parameters,), (tangents,))[1].detach(), self.x)

    def __rmatmul__(self, s):
        """s J: (n, K) -> (p,)"""
        wanted, s = tuple(self.parameters.values()), torch.as_tensor(s)
        parts = torch.autograd.grad(self.graph, wanted, s, retain_graph=True, materialize_grads=True)
        return like(torch.cat([part.flatten() for part in parts]), self.x)

    def by_input(self, s):
        """The derivatives of sum(s * outputs) with respect to x, (n, K) -> (n, ...)."""

        def outputs_at(x):
            return functional_call(self.module, self.parameters, x).reshape(len(x), -1)

        (found,) = vjp(outputs_at, torch.as_tensor(self.x))[1](torch.as_tensor(s))
        return like(found.detach(), self.x)


# Policies


class Gaussian:
    """Normal policy with the network's outputs as means: log-probabilities of actions, entropy, gradients.
    theta is log_std, on which J does not depend, then the network's parameters."""

    def __init__(self, J, log_std, actions):  # means (B, K), (K,), (B, K)
        self.J = J
        self.log_std = log_std
        self.inverse_std = namespace(log_std).exp(-log_std)
        self.z = (actions - J.outputs) * self.inverse_std
        constant = 0.5 * math.log(2 * math.pi) * len(log_std)
        self.log_prob = -0.5 * (self.z * self.z).sum(1) - log_std.sum() - constant  # (B,)

    def entropy(self) -> float:
        return float(self.log_std.sum()) + 0.5 * math.log(2 * math.pi * math.e) * len(self.log_std)

    def gradient(self, e, entropy_weight: float = 0.0):
        """grad_theta of sum_k e_k log pi(a_k | s_k) + entropy_weight * entropy, for weights e (B,)."""
        along_log_std = e @ (self.z * self.z - 1) + entropy_weight
        d_means = e[:, None] * self.z * self.inverse_std
        return namespace(e).concatenate([along_log_std, d_means @ self.J])


def one_hot(actions, outputs):
    """The actions (...), numbers of K choices, as vectors (..., K), of the kind of outputs (n, K)."""
    xp = namespace(outputs)
    return xp.eye(outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)[actions]


class Categorical:
    """Softmax policy with the network's outputs as logits, as Gaussian; without actions it has no log_prob
    and no gradient."""

    def __init__(self, J, actions=None):  # logits (B, K), (B,)
        xp = namespace(J.outputs)
        self.J = J
        logits = J.outputs - xp.amax(J.outputs, 1)[:, None]
        self.logprobs = logits - xp.log(xp.exp(logits).sum(1))[:, None]  # (B, K)
        self.probs = xp.exp(self.logprobs)
        self.entropies = -(self.probs * self.logprobs).sum(1)  # (B,)
        if actions is not None:
            self.taken = one_hot(actions, logits)
            self.log_prob = (self.taken * self.logprobs).sum(1)  # (B,)

    def entropy(self) -> float:
        """The mean over states."""
        return float(self.entropies.mean())

    def gradient(self, e, entropy_weight: float = 0.0):
        """grad_theta of sum_k e_k log pi(a_k | s_k) + entropy_weight * entropy, for weights e (B,)."""
        d_logits = e[:, None] * (self.taken - self.probs)
        if entropy_weight:
            shares = self.probs * (self.logprobs + self.entropies[:, None])  # minus d entropy / d logits
            d_logits -= entropy_weight / len(e) * shares
        return d_logits @ self.J


class SquashedGaussian:
    """Samples of a normal policy that are squashed into (-1, 1)^K: a = tanh(u), u = mean + std * noise. A
    network's outputs (B, 2K) are the means and numbers that tanh brings into the range of log_std.

    The density is that of centre + half * a, the action in a box whose sides have the half lengths `half`:

        log pi = sum_k  -noise^2/2 - log(2 pi)/2 - log std  -  log(1 - tanh(u)^2)  -  log half

    in which -log(1 - tanh(u)^2) = 2 (|u| + log(1 + exp(-2|u|)) - log 2), finite and exact for any u."""

    LOG_STD = (-5.0, 2.0)  # its range

    def __init__(self, outputs, noise, log_half=0.0):  # (B, 2K), (B, K), sum_k log half
        xp = namespace(outputs)
        K = outputs.shape[1] // 2
        low, high = self.LOG_STD
        self.noise = noise
        self.squashed = xp.tanh(outputs[:, K:])
        log_std = low + (high - low) / 2 * (1 + self.squashed)
        self.std = xp.exp(log_std)
        self.spread = noise * self.std  # u - mean
        u = outputs[:, :K] + self.spread
        self.actions = xp.tanh(u)  # (B, K)
        size = abs(u)
        squash = 2 * (size + xp.log1p(xp.exp(-2 * size)) - math.log(2))
        constant = 0.5 * math.log(2 * math.pi) * K + log_half
        self.log_prob = (squash - 0.5 * noise * noise - log_std).sum(1) - constant  # (B,)

    @classmethod
    def of(cls, outputs, actions, log_half=0.0):
        """The policy with given actions (B, K)."""
        unit = cls(outputs, namespace(outputs).ones_like(actions))
        u = namespace(outputs).arctanh(actions.clip(-1 + 1e-6, 1 - 1e-6))
        return cls(outputs, (u - outputs[:, : actions.shape[1]]) / unit.std, log_half)

    def gradient(self, by_actions, by_log_prob):
        """The derivatives (B, 2K) of a loss with respect to the outputs, by those with respect to actions
        (B, K) and log_prob (B,), the noise held fixed: d log pi / d u = 2 a, d log pi / d log std = 2 a
        (u - mean) - 1."""
        a = self.actions
        by_u = by_actions * (1 - a * a) + 2 * by_log_prob[:, None] * a
        return self.by_outputs(by_u, by_u * self.spread - by_log_prob[:, None])

    def score(self, by_log_prob):
        """The same where it is the actions that are held fixed: d log pi / d mean = noise / std, d log pi /
        d log std = noise^2 - 1."""
        by_log_prob = by_log_prob[:, None]
        return self.by_outputs(by_log_prob * self.noise / self.std, by_log_prob * (self.noise**2 - 1))

    def by_outputs(self, by_mean, by_log_std):
        low, high = self.LOG_STD
        by_raw = by_log_std * (1 - self.squashed * self.squashed) * ((high - low) / 2)
        return namespace(by_mean).concatenate([by_mean, by_raw], 1)


# Steps


class Adam:
    """Adam on a flat vector (p,), changed in place, along gradients clipped to max_norm in norm. Betas are
    0.9 and 0.999, and eps is 1e-5, as in CleanRL's PPO."""

    def __init__(self, vector, lr: float, max_norm: float):
        self.vector, self.lr, self.max_norm = vector, lr, max_norm
        self.mean, self.square = 0 * vector, 0 * vector  # running means of the gradient and of its square
        self.steps = 0
        self.skipped = False  # whether the last step was

    def step(self, gradient) -> None:
        """A step along -gradient (p,). One that is not finite is skipped."""
        size = norm(gradient)
        self.skipped = not math.isfinite(size)
        if self.skipped:
            return
        gradient = gradient * min(1.0, self.max_norm / (size + 1e-6))
        self.steps += 1
        self.mean += 0.1 * (gradient - self.mean)
        self.square += 0.001 * (gradient * gradient - self.square)
        deviation = (self.square / (1 - 0.999**self.steps)) ** 0.5
        self.vector -= self.lr / (1 - 0.9**self.steps) * self.mean / (deviation + 1e-5)

    def state_dict(self) -> dict:
        moments = {"mean": torch.as_tensor(self.mean), "square": torch.as_tensor(self.square)}
        return moments | {"steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.mean[:], self.square[:], self.steps = state["mean"], state["square"], state["steps"]


class FusedAdam:
    """PyTorch's Adam on a flat vector (p,), changed in place: for 100,000 numbers it is ten times faster than
    the arithmetic above. With `decay` every step first shrinks them by that share of lr (AdamW). Gradients
    that are not finite are skipped; ten of them in a row end the run."""

    def __init__(self, vector, lr: float, decay: float = 0.0):
        self.vector, self.lr, self.decay = torch.as_tensor(vector), lr, decay
        self.mean, self.square = torch.zeros_like(self.vector), torch.zeros_like(self.vector)
        self.steps = torch.zeros((), dtype=torch.float32, device=self.vector.device)
        self.in_a_row = 0  # gradients that were not finite

    @property
    def skipped(self) -> bool:
        """Whether the last step was."""
        return self.in_a_row > 0

    def step(self, gradient) -> None:
        """A step along -gradient (p,)."""
        self.in_a_row = 0 if math.isfinite(norm(gradient)) else self.in_a_row + 1
        if self.in_a_row == 10:
            raise Stop("ten gradients in a row were not finite: smaller rewards or step sizes may help")
        if self.skipped:
            return
        gradient = torch.as_tensor(gradient, dtype=self.vector.dtype)
        with torch.no_grad():  # the function and no torch.optim.AdamW, which takes two seconds to begin
            adamw(
                [self.vector],
                [gradient],
                [self.mean],
                [self.square],
                [],
                [self.steps],
                fused=True,
                amsgrad=False,
                maximize=False,
                lr=self.lr,
                weight_decay=self.decay,
                beta1=0.9,
                beta2=0.999,
                eps=1e-8,
            )

    def state_dict(self) -> dict:
        moments = {"mean": self.mean, "square": self.square, "steps": self.steps}
        return moments | {"lr": self.lr, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict) -> None:
        for name in ("mean", "square", "steps"):
            getattr(self, name).copy_(state[name])
        self.lr, self.in_a_row = state["lr"], state["in_a_row"]
