"""Class offsets: the last biases alone, moved until no class lags behind; row by row, with no gradient of autograd."""

from __future__ import annotations

import math

import torch

from .attack import attack
from .method import evaluating, margin


class Offsets:
    """`step` makes one update of `bias` (classes,), the last one of the model."""

    def __init__(self, bias, eps, step_size, steps, norm="linf", floor=0.5):
        self.bias, self.floor = bias, floor
        self.attack = {"eps": eps, "step_size": step_size, "steps": steps, "norm": norm}
        self.right, self.counts, self.prices = ([0.0] * len(bias) for _ in range(3))
        self.updates = 0

    def step(self, model, x, y, seed, step):
        """Returns the loss, and the nearest that a row was to a tie of its label."""
        attacked = attack(model, x, y, **self.attack, seed=seed, step=step, raises="cw")
        labels, classes = y.tolist(), range(len(self.bias))
        seen = margin(attacked.seen, y)
        in_batch = [labels.count(c) for c in classes]
        for c in classes:
            hits = sum(m > 0 for m, label in zip(seen.tolist(), labels, strict=True) if label == c)
            self.right[c] = 0.9 * self.right[c] + hits
            self.counts[c] = 0.9 * self.counts[c] + in_batch[c]
        lag = self.lag()
        self.prices = [max(0.0, price + 0.2 * behind) for price, behind in zip(self.prices, lag, strict=True)]
        self.updates += 1

        width = 0.3 * math.sqrt(((seen - seen.mean()) ** 2).mean().item())
        with evaluating(model), torch.no_grad():
            z = model(attacked.x_adv)
        loss, gradient = 0.0, [0.0] * len(self.bias)
        for row, label in zip(z.tolist(), labels, strict=True):
            rival = max((c for c in classes if c != label), key=lambda c: row[c])
            failed = 1 / (1 + math.exp((row[label] - row[rival]) / width))  # softly
            weight = (1 + self.prices[label] + 2 * max(0.0, lag[label])) / (len(in_batch) * in_batch[label])
            loss += weight * failed
            slope = weight * failed * (1 - failed) / width
            gradient[label] -= slope
            gradient[rival] += slope
        length = 30 / (1 + self.updates / 50) * width**2
        with torch.no_grad():
            self.bias -= length * torch.tensor(gradient)
        return loss, attacked.least_margin

    def lag(self):
        """How far each class is below the floor, as a share of it; above it negative, -1 at the least."""
        everywhere = sum(self.right) / sum(self.counts)
        shares = [r / n if n else everywhere for r, n in zip(self.right, self.counts, strict=True)]
        floor = self.floor * sum(shares) / len(shares)
        return [max(-1.0, 1 - share / floor) if floor else (0.0 if share == 0 else -1.0) for share in shares]
