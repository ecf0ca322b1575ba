"""A frozen network for digits, and training of adapters on images it was not made for."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate, pad

from expunge.exact import adapters as sl
from expunge.workloads.mnist import mnist_5k


def network(classes=10):
    return nn.Sequential(
        # without padding: with it the untouched base is at .07 and .36, not at the card's .018 and .464
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 25, classes),
    )  # fmt: skip


def digits(seed):
    """Images [5000, 1, 28, 28] with values from 0 to 1, and labels, in an order of the seed."""
    images, labels = mnist_5k()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return (images * 0.3081 + 0.1307)[order], labels[order]


def inverted(images):
    return 1 - images


def shrunk(images):
    small = interpolate(images, scale_factor=0.7, mode="bilinear")
    left = 28 - small.shape[-1]
    return pad(small, (left // 2, left - left // 2) * 2)


SHIFTS = {"inverted": inverted, "shrunk": shrunk}


def train(model, images, labels, *, epochs, lr, seed):
    """Adam with batches of 64 on whatever may train."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(64):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


def base(images, labels, seed, classes=10):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(classes)
    return train(model, images, labels, epochs=3, lr=1e-3, seed=seed)


@torch.no_grad()
def accuracy(model, images, labels):
    return (model(images).argmax(1) == labels).double().mean().item()


def put(model, adapters, seed, also=()):
    """Adapters by module, one group each, all of which train; returns how many numbers they are."""
    for n, (module, adapter) in enumerate(adapters.items()):
        adapter.attach(model, [module], f"g{n}", seed + n)
    model.requires_grad_(False)
    for group in sl.groups(model):
        for parameter in sl.parameters(model, group).values():
            parameter.requires_grad_(True)
    for name in also:
        model.get_submodule(name).requires_grad_(True)
    return sum(sl.count(model, group) for group in sl.groups(model))


FIRST, SECOND = "0", "3"


def both(adapter):
    return {FIRST: adapter, SECOND: adapter}


CHOICES = {
    "SSF": both(sl.ScaleShift()),
    "LoRA 2": both(sl.LoRA(2, alpha=2)),
    "LoRA 4": both(sl.LoRA(4, alpha=4)),
    "LoRA 4, α 8": both(sl.LoRA(4, alpha=8)),
    "FLoRA": {FIRST: sl.Tucker((1, 4, 2, 2)), SECOND: sl.Tucker((6, 6, 2, 2))},
    "FLoRA, whole kernel": {FIRST: sl.Tucker((1, 4, 3, 3)), SECOND: sl.Tucker((6, 6, 3, 3))},
}


def adapted(choices, shifts, seeds=(0, 1)):
    """Parameters, and mean test accuracy by shift, of adapters on the convolutions of a base."""
    found = {name: {"parameters": 0, **{s: [] for s in shifts}} for name in ("none", *choices)}
    hashes = []
    for seed in seeds:
        images, labels = digits(seed)
        frozen = base(images[:2500], labels[:2500], seed)
        before = sl.base_hash(frozen)
        for shift in shifts:
            moved = SHIFTS[shift](images)
            few, test = slice(2500, 3000), slice(3500, 5000)
            found["none"][shift].append(accuracy(frozen, moved[test], labels[test]))
            for name, chosen in choices.items():
                model = copy.deepcopy(frozen)
                if chosen is None:  # both convolutions whole
                    model.requires_grad_(False)
                    for module in (FIRST, SECOND):
                        model.get_submodule(module).requires_grad_(True)
                    number = sum(p.numel() for p in model.parameters() if p.requires_grad)
                else:
                    number = put(model, chosen, seed)
                train(model, moved[few], labels[few], epochs=15, lr=5e-3, seed=seed)
                if chosen is not None:
                    hashes.append(sl.base_hash(model) == before)
                    made = sl.merged(model)
                    gap = (made(moved[test]) - model(moved[test])).abs().max().item()
                    assert gap < 1e-3, f"merging {name} moved logits by {gap}"
                found[name]["parameters"] = number
                found[name][shift].append(accuracy(model, moved[test], labels[test]))
    return found, all(hashes)


def mean(values):
    return sum(values) / len(values)
