"""Why Apollo diverges at learning rates at which SGD is stable, on a noisy quadratic.

    python benchmarks/noisy_quadratic.py [--out benchmarks/results]

The loss is x'Hx / 2 with 200 curvatures from 0.01 to 1, and the gradient has unit noise. The script
takes about a minute on one core. docs/stability.md explains the tables. Near the limit of
stability a training is chaotic: with other rounding, other seeds diverge.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy
from numpy.typing import NDArray

Array = NDArray[numpy.float64]

BETA, SIGMA, EPS = 0.9, 1.0, 1e-4
CURVATURES = numpy.linspace(0.01, 1.0, 200)
STEPS, WARMUP = 3000, 100
DIVERGED = 1e12  # loss; the largest that stays is below 1e4
RATES = (1.0, 5.0, 10.0, 15.0, 18.0, 20.0, 25.0, 30.0, 37.0, 39.0)
SEEDS = range(10)
LAST = 60  # steps at the end, in which D is looked at


@dataclass(frozen=True)
class Trajectory:
    """One training: the loss after each step, and D and B of each step."""

    loss: Array  # shape=(steps,)
    scale: Array  # D, shape=(steps, elements)
    diagonal: Array  # B, shape=(steps, elements)
    inward: NDArray[numpy.bool_]  # the step leads towards the minimum, shape=(steps, elements)

    @property
    def diverged(self) -> bool:
        return bool(self.loss[-1] > DIVERGED)

    @property
    def settled(self) -> float:
        """Mean loss of the last 500 steps."""
        return float(self.loss[-500:].mean())


def train(
    rate: float,
    seed: int,
    method: str = "apollo",
    steps: int = STEPS,
    average: float = 0.0,
    noise: float = 1.0,
    curvatures: Array = CURVATURES,
) -> Trajectory:
    """Train with Algorithm 1 from x = 1, with a linear warmup.

    Args:
        rate: learning rate.
        seed: seed of the gradient noise.
        method: "apollo", or "sgd", which is Apollo with B = 0.
        steps: number of updates.
        average: share of each update of B that is left out; 0 is Apollo.
        noise: standard deviation of the gradient noise.
        curvatures: h of each element.
    """
    draws = numpy.random.default_rng(seed)
    x = numpy.ones_like(curvatures)
    m, b = numpy.zeros_like(x), numpy.zeros_like(x)
    losses, scales, diagonals, inwards = [], [], [], []
    for step in range(steps):
        gradient = curvatures * x + noise * draws.standard_normal(x.size)
        update = (1 - BETA) / (1 - BETA ** (step + 1)) * (gradient - m)
        if method == "apollo":
            d = m / numpy.maximum(abs(b), SIGMA)
            norm = float((d**4).sum()) ** 0.25
            a = float(d @ update + d @ (b * d)) / (norm + EPS / SIGMA) ** 4
            b = average * b + (1 - average) * (b - a * d * d)
        m = m + update
        scale = numpy.maximum(abs(b), SIGMA)
        inwards.append(x * m > 0)
        x = x - rate * min(1.0, step / WARMUP) * m / scale
        losses.append(float(curvatures @ (x * x)) / 2)
        scales.append(scale)
        diagonals.append(b)
        if losses[-1] > DIVERGED:
            break
    return Trajectory(*(numpy.array(lines) for lines in (losses, scales, diagonals, inwards)))


def growth(rate: float, curvatures: Array, scales: Array) -> Array:
    """Return the growth per step of each element's error without noise: below 0, it shrinks.

    The error and its momentum are multiplied by one 2 x 2 matrix per step, which D makes.

    Args:
        rate: learning rate.
        curvatures: shape=(elements,).
        scales: D of each step, shape=(steps, elements).
    """
    product = numpy.tile(numpy.eye(2), (len(curvatures), 1, 1))
    total = numpy.zeros(len(curvatures))
    for scale in scales:
        one = numpy.empty_like(product)
        one[:, 0, 0] = 1 - rate * (1 - BETA) * curvatures / scale
        one[:, 0, 1] = -rate * BETA / scale
        one[:, 1, 0] = (1 - BETA) * curvatures
        one[:, 1, 1] = BETA
        product = one @ product
        size = abs(product).max(axis=(1, 2))
        product /= size[:, None, None]
        total += numpy.log(size)
    return total / len(scales)


def resonance(k: float) -> float | None:
    """Return the least relative swing of D at twice the oscillation's frequency that makes it grow.

    Args:
        k: rate * (1 - beta) * curvature / D, of the mean D; the oscillation is stable below 3.8.

    Returns:
        The swing as a share of D, in steps of 0.01; None: none up to 0.99 does.
    """
    frequency = float(numpy.arccos((1 + BETA - k) / (2 * BETA**0.5)))
    phases = numpy.linspace(0.0, 2 * numpy.pi, 24, endpoint=False)
    times = numpy.arange(1200)[:, None]
    ones = numpy.ones(len(phases))
    for percent in range(1, 100):
        scales = 1 + percent / 100 * numpy.cos(2 * frequency * times + phases)
        if growth(k / (1 - BETA), ones, scales).max() > 0:
            return percent / 100
    return None


def rates_table() -> list[str]:
    """Return the table of SGD and Apollo at each rate."""
    lines = [
        "| lr | SGD: loss | Apollo: loss | diverged | B above sigma (%) | mean of B "
        "| mean of lr (1 - beta) h | Apollo, a tenth of each update of B: loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rate in RATES:
        sgd = [train(rate, seed, "sgd") for seed in SEEDS]
        apollo = [train(rate, seed) for seed in SEEDS]
        averaged = [train(rate, seed, average=0.9) for seed in SEEDS]
        fine = [path for path in apollo if not path.diverged]
        last = [path.diagonal[-500:] for path in fine]
        share = f"{100 * numpy.mean([(abs(b) > SIGMA).mean() for b in last]):.1f}" if fine else "-"
        mean = f"{numpy.mean([b.mean() for b in last]):.2f}" if fine else "-"
        lines.append(
            f"| {rate:g} | {loss(sgd)} | {loss(apollo)} | {len(apollo) - len(fine)} of "
            f"{len(apollo)} | {share} | {mean} | {rate * (1 - BETA) * CURVATURES.mean():.2f} | "
            f"{loss(averaged)} |"
        )
    return lines


def loss(paths: list[Trajectory]) -> str:
    """Return the mean settled loss of the trainings that did not diverge."""
    fine = [path.settled for path in paths if not path.diverged]
    return f"{numpy.mean(fine):.1f}" if fine else "diverged"


def timing_table(rate: float = 25.0) -> list[str]:
    """Return what D is like in the last steps of trainings that diverge.

    The element is the one that grows fastest. Its growth is that under its own D, under the same
    values of D in another order, and the largest under one of them held.
    """
    lines = [
        "| seed | diverged after | the element's h | its D, step inwards | its D, step outwards "
        "| growth per step | the same D, shuffled | one D, held |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for seed in SEEDS:
        path = train(rate, seed)
        last, inward = path.scale[-LAST:], path.inward[-LAST:]
        grown = growth(rate, CURVATURES, last)
        worst = int(grown.argmax())
        one, own = CURVATURES[worst : worst + 1], last[:, worst : worst + 1]
        draws = numpy.random.default_rng(seed)
        orders = [draws.permutation(len(own)) for _ in range(20)]
        shuffled = numpy.mean([growth(rate, one, own[order])[0] for order in orders])
        held = max(growth(rate, one, numpy.full((2000, 1), value))[0] for value in own[:, 0])
        inwards, outwards = (own[inward[:, worst] == way].mean() for way in (True, False))
        lines.append(
            f"| {seed} | {f'{len(path.loss)} steps' if path.diverged else '-'} | "
            f"{CURVATURES[worst]:.2f} | {inwards:.2f} | {outwards:.2f} | {grown[worst]:+.3f} | "
            f"{shuffled:+.3f} | {held:+.3f} |"
        )
    return lines


def elements_table() -> list[str]:
    """Return how many of the trainings of a tensor with few elements diverge, at each rate."""
    rates = (1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 30.0)
    lines = [
        f"| elements | {' | '.join(f'lr {rate:g}' for rate in rates)} |",
        "|---" * (len(rates) + 1) + "|",
    ]
    for count in (1, 2, 5, 20, 200):
        curvatures = CURVATURES if count == CURVATURES.size else numpy.linspace(1.0, 0.01, count)
        cells = [
            f"{sum(train(rate, seed, curvatures=curvatures).diverged for seed in SEEDS)}"
            for rate in rates
        ]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return lines


def resonance_table() -> list[str]:
    """Return the table of the swing of D that suffices."""
    lines = ["| lr (1 - beta) h / D | swing of D that suffices (%) |", "|---|---|"]
    for k in (0.1, 0.5, 1.0, 1.5, 1.9, 2.5, 3.0, 3.7):
        least = resonance(k)
        lines.append(f"| {k:g} | {'none' if least is None else f'{100 * least:.0f}'} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    out = parser.parse_args().out
    text = "\n".join(
        [
            "# Noisy quadratic",
            "",
            "Made by `python benchmarks/noisy_quadratic.py`; docs/stability.md explains it.",
            "",
            "## Rates",
            "",
            *rates_table(),
            "",
            "## Timing of D, at lr 25",
            "",
            *timing_table(),
            "",
            f"## Diverged trainings of {len(SEEDS)}, by elements in the tensor",
            "",
            *elements_table(),
            "",
            "## Resonance",
            "",
            *resonance_table(),
            "",
        ]
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "noisy_quadratic.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
