"""The losses once more, image by image in plain loops from the papers' equations: slow, and sharing no code with medssl."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def cos(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


def barlow_twins(z1: Tensor, z2: Tensor, lambda_: float) -> Tensor:
    rows, width = z1.shape
    columns = []
    for z in (z1, z2):
        normalised = []
        for d in range(width):
            mean = sum(z[i, d] for i in range(rows)) / rows
            variance = sum((z[i, d] - mean) ** 2 for i in range(rows)) / rows
            normalised.append((z[:, d] - mean) / (variance + 1e-5) ** 0.5)
        columns.append(normalised)
    loss = torch.zeros((), dtype=z1.dtype)
    for i in range(width):
        for j in range(width):
            c = (columns[0][i] * columns[1][j]).sum() / rows
            loss = loss + ((1 - c) ** 2 if i == j else lambda_ * c**2)
    return loss


def contrastive(z1: Tensor, z2: Tensor, temperature: float, *, positive_in_denominator: bool) -> Tensor:
    every = [*z1, *z2]
    rows, loss = len(z1), torch.zeros((), dtype=z1.dtype)
    for i in range(2 * rows):
        partner = (i + rows) % (2 * rows)
        denominator = torch.zeros((), dtype=z1.dtype)
        for k in range(2 * rows):
            if k != i and (k != partner or positive_in_denominator):
                denominator = denominator + torch.exp(cos(every[i], every[k]) / temperature)
        loss = loss - torch.log(torch.exp(cos(every[i], every[partner]) / temperature) / denominator)
    return loss / (2 * rows)


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    return contrastive(z1, z2, temperature, positive_in_denominator=True)


def dcl(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    return contrastive(z1, z2, temperature, positive_in_denominator=False)


def vicreg(z1: Tensor, z2: Tensor, invariance: float, variance: float, covariance: float) -> Tensor:
    rows, width = z1.shape
    same = sum(((z1[i] - z2[i]) ** 2).sum() for i in range(rows)) / (rows * width)
    spread, together = torch.zeros((), dtype=z1.dtype), torch.zeros((), dtype=z1.dtype)
    for z in (z1, z2):
        centred = z - sum(z[i] for i in range(rows)) / rows
        for d in range(width):
            std = ((centred[:, d] ** 2).sum() / (rows - 1) + 1e-4) ** 0.5
            spread = spread + (torch.clamp(1 - std, min=0) / width) / 2
            for e in range(width):
                if e != d:
                    together = together + ((centred[:, d] * centred[:, e]).sum() / (rows - 1)) ** 2 / width
    return invariance * same + variance * spread + covariance * together


def simsiam(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    z1, z2 = z1.detach(), z2.detach()
    both = [-(cos(p1[i], z2[i]) + cos(p2[i], z1[i])) / 2 for i in range(len(p1))]
    return sum(both, torch.zeros((), dtype=p1.dtype)) / len(p1)


def byol(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    total = torch.zeros((), dtype=p1.dtype)
    for p, z in ((p1, z2.detach()), (p2, z1.detach())):
        for i in range(len(p)):
            unit_p, unit_z = p[i] / p[i].square().sum().sqrt(), z[i] / z[i].square().sum().sqrt()
            total = total + ((unit_p - unit_z) ** 2).sum() / len(p)
    return total


def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Row and column scaling on Python floats."""
    q = [[math.exp(value / epsilon) for value in row] for row in scores.tolist()]
    rows, prototypes = len(q), len(q[0])
    for _ in range(iterations):
        for k in range(prototypes):
            share = sum(row[k] for row in q) * prototypes
            for row in q:
                row[k] /= share
        for row in q:
            share = sum(row) * rows
            row[:] = [value / share for value in row]
    return torch.tensor(q, dtype=scores.dtype) * rows


def swav(scores: Tensor, assignments: Tensor, temperature: float) -> Tensor:
    loss = torch.zeros((), dtype=scores.dtype)
    for b in range(len(scores)):
        total = sum(torch.exp(s / temperature) for s in scores[b])
        for k in range(scores.shape[1]):
            loss = loss - assignments[b, k].detach() * torch.log(torch.exp(scores[b, k] / temperature) / total)
    return loss / len(scores)


def swapped(scores: Sequence[Tensor], epsilon: float, iterations: int, temperature: float) -> Tensor:
    """SwAV's loss of all views' scores, the first two large."""
    loss = torch.zeros((), dtype=scores[0].dtype)
    for large in range(2):
        q = sinkhorn(scores[large].detach(), epsilon, iterations)
        others = [v for v in range(len(scores)) if v != large]
        for v in others:
            loss = loss + swav(scores[v], q, temperature) / (2 * len(others))
    return loss
