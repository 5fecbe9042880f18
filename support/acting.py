"""Acting without PyTorch, whose cost per call outweighs the arithmetic of a few observations."""

import numpy as np
import torch
from torch import nn


ACTIVATIONS = (nn.Tanh, nn.ReLU)


def linear_layers(net) -> list[nn.Linear] | None:
    """The Linear layers of a torch.nn.Sequential of them with Tanh everywhere between, or ReLU; None for any
    other module."""
    kinds = [type(layer) for layer in net] if isinstance(net, nn.Sequential) else []
    if not any(kinds == [nn.Linear, kind] * (len(kinds) // 2) + [nn.Linear] for kind in ACTIVATIONS):
        return None
    layers = list(net[::2])
    return layers if all(layer.bias is not None for layer in layers) else None


def is_rectified(net: nn.Sequential) -> bool:
    """Whether it is ReLU that stands between the layers."""
    return len(net) > 1 and isinstance(net[1], nn.ReLU)


def numpy_policy(net):
    """The map from observations (n, obs_dim) to the outputs of net as it is now, (n, outputs): in NumPy for a
    torch.nn.Sequential that linear_layers knows, through PyTorch for any other module."""
    layers = linear_layers(net)
    if layers is None:
        device = next(net.parameters()).device

        @torch.no_grad()
        def torch_policy(x):
            return net(torch.as_tensor(x, device=device)).cpu().numpy()

        return torch_policy
    weights = [layer.weight.detach().cpu().numpy().T for layer in layers]
    biases = [layer.bias.detach().cpu().numpy() for layer in layers]

    rectified = is_rectified(net)

    def policy(x):
        for W, b in zip(weights[:-1], biases[:-1]):
            x = x @ W + b
            x = np.maximum(x, 0) if rectified else np.tanh(x)
        return x @ weights[-1] + biases[-1]

    return policy
