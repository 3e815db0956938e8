"""Training on real data: handwritten digits, a network of 64 layers. The kernels follow plain torch, step by step at
first, and arrive where it arrives."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from harness import Target
from sklearn.datasets import load_digits
from torch import Tensor, nn

import nsk
from nsk.nn import ResidualMLP

pytestmark = pytest.mark.usefixtures("one_thread")

DEPTH, WIDTH, STEPS, BATCH = 64, 64, 200, 128


@functools.cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [N, 64] around 0 and labels [N], for training and for testing."""
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32) / 8 - 1, torch.tensor(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    return images[train], labels[train], images[test], labels[test]


class Block(nn.Module):
    """Four layers and the block's input, as one writes them without nsk."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def plain_twin(model: ResidualMLP) -> nn.Sequential:
    """Plain torch with the model's parameters."""
    linears, norms = nsk.nn.layers_from_stack(model.stack)
    layers = [nn.Sequential(linear, norm, nn.SiLU()) for linear, norm in zip(linears, norms, strict=True)]
    blocks = [Block(*layers[i : i + 4]) for i in range(0, DEPTH, 4)]
    return copy.deepcopy(nn.Sequential(model.input, model.input_norm, nn.SiLU(), *blocks, model.head))


def new_model(checkpoint: str = "none") -> ResidualMLP:
    torch.manual_seed(0)
    return ResidualMLP(64, WIDTH, DEPTH, 10, checkpoint=checkpoint)


def train(model: nn.Module, steps: int = STEPS, half: bool = False) -> list[float]:
    """The loss of every step; ``half``: bfloat16 by autocast."""
    images, labels, *_ = digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(labels), (BATCH,), generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            out = model(images[batch])
        loss = nn.functional.cross_entropy(out.float(), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def accuracy(model: nn.Module) -> float:
    *_, images, labels = digits()
    with torch.no_grad():
        return (model(images).argmax(-1) == labels).float().mean().item()


@functools.cache
def plain_training(half: bool = False) -> tuple[list[float], float]:
    model = plain_twin(new_model())
    return train(model, half=half), accuracy(model)


def per_twenty(losses: list[float]) -> Tensor:
    return torch.tensor(losses).view(-1, 20).mean(1)


def test_training_follows_plain_torch(kernels: Target):
    theirs, their_accuracy = plain_training()
    model = new_model()
    ours = train(model)
    # Adam divides by the gradient's own size: a rounding error becomes a step, and steps drift apart.
    assert ours[:5] == pytest.approx(theirs[:5], rel=1e-2)
    torch.testing.assert_close(per_twenty(ours), per_twenty(theirs), rtol=0.3, atol=0.02)
    assert their_accuracy > 0.95
    assert accuracy(model) > their_accuracy - 0.015


def test_the_first_gradient_is_that_of_plain_torch(kernels: Target):
    """Sixty-four layers, each parameter's."""
    images, labels, *_ = digits()
    model = new_model()
    twin = plain_twin(model)
    for network in (model, twin):
        nn.functional.cross_entropy(network(images[:BATCH]), labels[:BATCH]).backward()
    blocks = [module for module in twin if isinstance(module, Block)]
    for i in range(DEPTH):
        linear, norm, _ = blocks[i // 4].layers[i % 4]
        own = (model.stack.weight, model.stack.bias, model.stack.ln_weight, model.stack.ln_bias)
        for ours, theirs in zip(own, (linear.weight, linear.bias, norm.weight, norm.bias), strict=True):
            size = theirs.grad.abs().max().item()
            torch.testing.assert_close(ours.grad[i], theirs.grad, rtol=1e-3, atol=1e-3 * size)
    torch.testing.assert_close(model.input.weight.grad, twin[0].weight.grad, rtol=1e-3, atol=1e-5)


def test_training_in_bfloat16_follows_plain_torch(kernels: Target):
    """Under autocast, as mixed precision is used: weights and their gradients stay float32."""
    theirs, their_accuracy = plain_training(half=True)
    model = new_model(checkpoint="block")
    ours = train(model, half=True)
    torch.testing.assert_close(per_twenty(ours)[:5], per_twenty(theirs)[:5], rtol=0.3, atol=0.05)
    assert per_twenty(ours)[5:].max() < 0.15
    assert their_accuracy > 0.93
    assert accuracy(model) > their_accuracy - 0.02


def test_twin_networks_in_one_call_learn_as_if_alone(kernels: Target):
    """Two seeds as two groups: the losses are added up, and each network has its own."""
    images, labels, *_ = digits()
    torch.manual_seed(2)
    stack = nsk.nn.ResidualMLPStack(64, 8, groups=2)
    alone = [nsk.nn.ResidualMLPStack(64, 8) for _ in range(2)]
    for group, one in enumerate(alone):
        one.load_state_dict({name: t[group] for name, t in stack.state_dict().items()})

    def step(network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(network(x)[..., :10].reshape(-1, 10), y, reduction="none").view(-1, BATCH)
        optimizer.zero_grad()
        loss.mean(1).sum().backward()
        optimizer.step()
        return loss.mean(1).detach()

    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (stack, *alone)]
    for start in range(0, 1280, BATCH):
        x, y = images[start : start + BATCH], labels[start : start + BATCH]
        together = step(stack, optimizers[0], x.expand(2, -1, -1), y.repeat(2))
        apart = torch.cat([step(m, o, x, y) for m, o in zip(alone, optimizers[1:], strict=True)])
        torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-4)
