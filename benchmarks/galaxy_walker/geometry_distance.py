"""Which space holds which distances: a plane, the sky and a tree, embedded in 2, 3 and 5 dimensions of E, S and H.

    python benchmarks/galaxy_walker/geometry_distance.py                  # 27 cells, three seeds: a few minutes of a core
    python benchmarks/galaxy_walker/geometry_distance.py --steps 100 --seeds 0 --tasks tree --widths 2

A perceptron reads attributes of objects and gives a tangent vector of D numbers; the geodesic distances of its points
(`models/geometry/product_space.py`), times a trained scale, are to equal the true distances of the objects. Three sets of 1,500:

    plane   points of a square; Euclidean distance; attributes: coordinates and functions of them
    sky     points of a sphere; great circles; attributes: functions of RA and Dec
    tree    nodes of a ternary tree of depth 7; path length; attributes drift along the branches

with four attributes of noise. Half of the objects are trained on, a sixth is for validation, a third for the test. The learning
rate is chosen for each cell and seed by the validation pairs. What is reported is the mean of |predicted - true| / true (true
distances below .2 count as .2) over 6,000 test pairs: mean over the seeds, and its 95 % interval by Student's t. The attributes,
so also the best that any space can do, differ from seed to seed: a difference of spaces is judged by the seeds' differences.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import append_rows, csv_option

from armillary.models.geometry.manifolds import exp0
from armillary.models.geometry.product_space import factor_distance
from armillary.models.geometry.sphere import exp_pole

OBJECTS, TRAIN, VALIDATION = 1500, 750, 250
BATCH, PAIRS, HIDDEN = 256, 6000, 96
RATES = (3e-3, 1e-2)
LEAST = 0.2
SPACES = {"euclidean": "E", "spherical": "S", "hyperbolic": "H"}
SEEDS = (7001, 7002, 7003)

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]


def plane(rng: np.random.Generator) -> tuple[np.ndarray, Distance]:
    """Attributes [N, 5], and the distance of rows."""
    p = rng.uniform(-1, 1, (OBJECTS, 2))
    attributes = np.concatenate([p, np.sin(3 * p), p[:, :1] * p[:, 1:]], 1)
    return attributes, lambda i, j: np.linalg.norm(p[i] - p[j], axis=1)


def sky(rng: np.random.Generator) -> tuple[np.ndarray, Distance]:
    """Attributes [N, 6], and the distance of rows."""
    u = rng.normal(size=(OBJECTS, 3))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    ra = np.arctan2(u[:, 1], u[:, 0])
    attributes = np.stack([np.sin(ra), np.cos(ra), u[:, 2], u[:, 2] ** 2, np.sin(2 * ra), np.cos(2 * ra)], 1)
    return attributes, lambda i, j: 2 * np.arcsin(np.clip(np.linalg.norm(u[i] - u[j], axis=1) / 2, 0, 1))


def tree(rng: np.random.Generator, branches: int = 3, depth: int = 7) -> tuple[np.ndarray, Distance]:
    """Attributes [N, 48], and the distance of rows."""
    parents, levels = [-1], [0]
    for level in range(1, depth + 1):
        parents += [p for p in range(len(parents)) if levels[p] == level - 1 for _ in range(branches)]
        levels += [level] * (len(parents) - len(levels))
    parent, level_of = np.array(parents), np.array(levels)
    ancestors = np.full((len(parent), depth + 1), -1)
    attributes = np.zeros((len(parent), 48))
    for node in range(len(parent)):
        if node:
            ancestors[node] = ancestors[parent[node]]
            attributes[node] = 0.8 * attributes[parent[node]] + 0.6 / 7 * rng.normal(size=48)
        ancestors[node, level_of[node]] = node
    chosen = rng.permutation(len(parent))[:OBJECTS]
    line, at = ancestors[chosen], level_of[chosen]

    def distance(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        shared = ((line[i] == line[j]) & (line[i] >= 0)).sum(1)
        return at[i] + at[j] - 2.0 * (shared - 1)

    return attributes[chosen] + 0.02 * rng.normal(size=(OBJECTS, 48)), distance


TASKS = {"plane": plane, "sky": sky, "tree": tree}


def points(u: Tensor, space: str) -> Tensor:
    """Points of tangent vectors, in float64: a tree reaches far out in the ball."""
    u = u.double()
    return exp0(u, 1.0) if space == "hyperbolic" else exp_pole(u, 1.0) if space == "spherical" else u


class Perceptrons(nn.Module):
    """One perceptron a seed, all at once: their matrices are too small to fill a core.

    Args:
        widths: Of the layers.
        seeds: Of the initialisation of each.
    """

    def __init__(self, widths: Sequence[int], seeds: Sequence[int]) -> None:
        super().__init__()
        networks = []
        for seed in seeds:
            torch.manual_seed(seed)
            networks.append([nn.Linear(a, b) for a, b in itertools.pairwise(widths)])
        layers = list(zip(*networks, strict=True))
        self.weights = nn.ParameterList(torch.stack([m.weight.detach().T for m in layer]) for layer in layers)
        self.biases = nn.ParameterList(torch.stack([m.bias.detach()[None] for m in layer]) for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        """[seeds, N, out] of [seeds, N, in]."""
        for place, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, nn.functional.gelu(x) if place else x, weight)
        return x


def train(
    sets: Sequence[tuple[Tensor, Distance]], space: str, width: int, steps: int, rate: float, seeds: Sequence[int]
) -> np.ndarray:
    """[2, seeds] mean relative errors of validation and test pairs."""
    x = torch.stack([attributes for attributes, _ in sets])
    rngs = [np.random.default_rng(seed) for seed in seeds]
    network = Perceptrons((x.shape[-1], HIDDEN, HIDDEN, width), seeds)
    scale = nn.Parameter(torch.zeros(len(seeds), 1))
    optimizer = torch.optim.Adam([*network.parameters(), scale], rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def errors(low: int, high: int, pairs: int) -> Tensor:
        drawn = [rng.integers(low, high, (2, pairs)) for rng in rngs]
        true = torch.from_numpy(np.stack([distance(*ij) for ij, (_, distance) in zip(drawn, sets, strict=True)]))
        rows = torch.from_numpy(np.stack(drawn)).flatten(1)
        u = network(x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1])))
        a, b = points(u, space).chunk(2, 1)
        apart = (factor_distance(a, b, space) * scale.exp() - true).abs() / true.clamp(min=LEAST)
        other = rows[:, :pairs] != rows[:, pairs:]
        return (apart * other).sum(1) / other.sum(1)

    for _ in range(steps):
        loss = errors(0, TRAIN, BATCH).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        parts = ((TRAIN, TRAIN + VALIDATION), (TRAIN + VALIDATION, OBJECTS))
        return np.stack([errors(low, high, PAIRS).numpy() for low, high in parts])


def prepared(task: str, seed: int) -> tuple[Tensor, Distance]:
    """Attributes [N, F], standardised by the objects that are trained on, and the distance of rows."""
    rng = np.random.default_rng(seed)
    attributes, distance = TASKS[task](rng)
    attributes = np.concatenate([attributes, 0.3 * rng.normal(size=(OBJECTS, 4))], 1)
    known = attributes[:TRAIN]
    return torch.tensor((attributes - known.mean(0)) / known.std(0), dtype=torch.float32), distance


def interval(values: np.ndarray) -> float:
    """Half of the 95 % interval of the mean by Student's t; NaN for one value."""
    n = len(values)
    return float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5) if n > 1 else float("nan")


def main() -> None:
    """Train, print and append to the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 3, 5])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    csv_option(parser, "geometry_distance")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    print(f"{'set':8}{'width':>6}" + "".join(f"{name:>20}" for name in SPACES) + "   the best two apart by")
    for task, width in itertools.product(args.tasks, args.widths):
        found, start = {}, time.process_time()
        sets = [prepared(task, seed) for seed in args.seeds]
        for space in SPACES:
            tried = np.stack([train(sets, space, width, args.steps, rate, args.seeds) for rate in RATES])
            best = tried[:, 0].argmin(0)  # by validation
            found[space] = tried[best, 1, np.arange(len(args.seeds))]
            rows += [
                {"benchmark": "geometry_distance", "device": "cpu", "task": task, "width": width, "space": space,
                 "steps": args.steps, "seed": seed, "lr": RATES[place], "error": float(error)}
                for seed, place, error in zip(args.seeds, best, found[space], strict=True)
            ]  # fmt: skip
        first, second = sorted(found, key=lambda space: found[space].mean())[:2]
        gap = found[second] - found[first]
        cells = "".join(f"{v.mean():>11.4f} ± {interval(v):.4f}" for v in found.values())
        verdict = f"{SPACES[second]} - {SPACES[first]} {gap.mean():+.4f} ± {interval(gap):.4f}"
        print(f"{task:8}{width:6}{cells}   {verdict}   ({time.process_time() - start:.0f} CPU s)", flush=True)
    append_rows(args.csv, rows)
    print(f"appended {len(rows)} rows to {args.csv}")


if __name__ == "__main__":
    main()
