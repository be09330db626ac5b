"""Why Apollo diverges at learning rates at which SGD is stable, on a noisy quadratic.

    python benchmarks/noisy_quadratic.py [--out benchmarks/results]

The loss is x'Hx / 2 with 200 curvatures from 0.01 to 1, and the gradient has unit noise. The script
takes about a minute on one core. docs/stability.md explains the tables. Training is chaotic near
the limit of stability: with other rounding, other seeds diverge.
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
DIVERGED = 1e12  # loss; the largest loss of a stable training is below 1e4
RATES = (1.0, 5.0, 10.0, 15.0, 18.0, 20.0, 25.0, 30.0, 37.0, 39.0)
SEEDS = range(10)
LAST = 60  # last steps, in which D is examined


@dataclass(frozen=True)
class Trajectory:
    """The loss after each step of a training run, and D and B of each step."""

    loss: Array  # shape=(steps,)
    scale: Array  # D, shape=(steps, elements)
    diagonal: Array  # B, shape=(steps, elements)
    inward: NDArray[
        numpy.bool_
    ]  # whether the step goes towards the minimum, shape=(steps, elements)

    @property
    def diverged(self) -> bool:
        return bool(self.loss[-1] > DIVERGED)

    @property
    def final_loss(self) -> float:
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
        average: weight of the old B in a moving average; 0 is Apollo.
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
    """Return the logarithmic growth per step of each element's error, without noise.

    Each step multiplies the error and its momentum by a 2 x 2 matrix that depends on D. A negative
    value means that the error shrinks.

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
    """Return the smallest swing of D that makes an oscillation grow.

    D swings at twice the frequency of the oscillation, where the resonance is.

    Args:
        k: rate * (1 - beta) * curvature / mean D; with constant D the oscillation is stable below
            3.8.

    Returns:
        The swing relative to the mean D, in steps of 0.01; None: no swing up to 0.99 suffices.
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
        stable = [path for path in apollo if not path.diverged]
        last = [path.diagonal[-500:] for path in stable]
        share = (
            f"{100 * numpy.mean([(abs(b) > SIGMA).mean() for b in last]):.1f}" if stable else "-"
        )
        mean = f"{numpy.mean([b.mean() for b in last]):.2f}" if stable else "-"
        lines.append(
            f"| {rate:g} | {loss(sgd)} | {loss(apollo)} | {len(apollo) - len(stable)} of "
            f"{len(apollo)} | {share} | {mean} | {rate * (1 - BETA) * CURVATURES.mean():.2f} | "
            f"{loss(averaged)} |"
        )
    return lines


def loss(paths: list[Trajectory]) -> str:
    """Return the mean final loss of the runs that did not diverge."""
    stable = [path.final_loss for path in paths if not path.diverged]
    return f"{numpy.mean(stable):.1f}" if stable else "diverged"


def timing_table(rate: float = 25.0) -> list[str]:
    """Return the table of D in the last steps of diverging runs.

    It follows the element that grows fastest. Three growths are compared: with the element's own D,
    with the same values of D in random order, and the largest with one of them held constant.
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
    """Return the table of diverged runs by the number of elements and the learning rate."""
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
    """Return the table of the smallest swing of D that makes an oscillation grow."""
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
