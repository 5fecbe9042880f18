"""All that an update needs of a network: its parameters as one flat array, and its Jacobian.

J holds the derivatives of the K outputs at n inputs with respect to the p parameters of the network, and is
known by two products: J @ u, the change (n, K) of the outputs along u (p,), and s @ J, the gradient (p,) of
sum(s * outputs) for s (n, K). They give, without autograd,

    the gradient of a mean squared error     (2/B) (V - R) @ J       with V and R (B, 1)
    Gauss-Newton products                    (2/B) (J @ u) @ J
    policy gradients                         s @ J                   with s_k = e_k d log pi_k / d outputs_k

the last for sum_k e_k grad log pi_k. A Jacobian is of the parameters as they are when it is made: it may be
used until they change.

The same code runs on NumPy's arrays on the CPU, where a call of PyTorch costs more than the arithmetic of a
minibatch, and on PyTorch's tensors on a GPU.
"""

import math
from functools import cached_property, partial

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, jvp, vjp

from nystrom import like, namespace, norm
from support.acting import linear_layers

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


def jacobian_of(net: nn.Module):
    """The map from inputs (n, ...) to the net's Jacobian there. It is written out for a torch.nn.Sequential
    of Linear layers with Tanh between them, whose parameters may change but must stay where they are in
    memory, and made by torch.func for any other module."""
    layers = linear_layers(net)
    if layers is None:
        return partial(ModuleJacobian, net)
    return partial(MLPJacobian, [(as_array(layer.weight), as_array(layer.bias)) for layer in layers])


class MLPJacobian:
    """J of a tanh network at x (n, inputs): its `outputs` (n, K), J @ u and s @ J. `layers` are pairs of W
    and b; flat vectors hold W_1, b_1, W_2, b_2, ..."""

    __array_ufunc__ = None  # so that NumPy leaves s @ J to __rmatmul__

    def __init__(self, layers, x):
        self.layers = layers
        self.inputs = [x]  # a of every layer W a + b, (n, m)
        for W, b in layers[:-1]:
            self.inputs.append(namespace(x).tanh(self.inputs[-1] @ W.T + b))
        W, b = layers[-1]
        self.outputs = self.inputs[-1] @ W.T + b

    def backward(self, s):
        """The derivatives g (n, m) of sum(s * outputs) with respect to every layer's W a + b."""
        found = [s]
        for (W, _), a in zip(self.layers[:0:-1], self.inputs[:0:-1]):
            found.append((found[-1] @ W) * (1 - a * a))
        return found[::-1]

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
            changes.append(a @ u[begin:end].reshape(W.shape).T + u[end : end + len(b)])
            begin = end + len(b)
        if self.outputs.shape[1] == 1:
            return sum(xp.einsum("nm,nm->n", change, g) for change, g in zip(changes, self.single))[:, None]
        total = changes[0]
        for (W, _), a, change in zip(self.layers[1:], self.inputs[1:], changes[1:]):
            total = (total * (1 - a * a)) @ W.T + change
        return total

    def __rmatmul__(self, s):
        """s J: (n, K) -> (p,), the gradient of sum(s * outputs)."""
        xp = namespace(s)
        ones = xp.ones_like(s[:, 0])
        derivatives = [s * g for g in self.single] if s.shape[1] == 1 else self.backward(s)
        parts = []
        for a, g in zip(self.inputs, derivatives):
            parts += [(g.T @ a).reshape(-1), ones @ g]  # by W, by b
        return xp.concatenate(parts)


class ModuleJacobian:
    """The same of any module, by torch.func."""

    __array_ufunc__ = None

    def __init__(self, module, x):
        self.x = x
        self.parameters = {name: p.detach() for name, p in module.named_parameters()}

        def outputs_of(parameters):
            return functional_call(module, parameters, torch.as_tensor(x)).reshape(len(x), -1)

        self.outputs_of = outputs_of
        outputs, self.pull = vjp(outputs_of, self.parameters)
        self.outputs = like(outputs.detach(), x)

    def __matmul__(self, u):
        """J u: (p,) -> (n, K)"""
        parts = torch.as_tensor(u).split([p.numel() for p in self.parameters.values()])
        tangents = {name: part.view_as(self.parameters[name]) for name, part in zip(self.parameters, parts)}
        return like(jvp(self.outputs_of, (self.parameters,), (tangents,))[1].detach(), self.x)

    def __rmatmul__(self, s):
        """s J: (n, K) -> (p,)"""
        (parts,) = self.pull(torch.as_tensor(s))
        return like(torch.cat([part.flatten() for part in parts.values()]), self.x)


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


class Categorical:
    """Softmax policy with the network's outputs as logits, as Gaussian."""

    def __init__(self, J, actions):  # logits (B, K), (B,)
        xp = namespace(J.outputs)
        self.J = J
        logits = J.outputs - xp.amax(J.outputs, 1)[:, None]
        self.logprobs = logits - xp.log(xp.exp(logits).sum(1))[:, None]  # (B, K)
        self.probs = xp.exp(self.logprobs)
        self.taken = xp.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)[actions]
        self.log_prob = (self.taken * self.logprobs).sum(1)  # (B,)
        self.entropies = -(self.probs * self.logprobs).sum(1)  # (B,)

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


# Steps


class Adam:
    """Adam on a flat vector (p,), changed in place, along gradients clipped to max_norm in norm."""

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
