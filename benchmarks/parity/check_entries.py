"""Checks of the methods that select entries."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from parity.bench import Bench
from parity.checking import ONE, expect, refused, same, with_tensor
from parity.equality import as_float64
from parity.models import MATRIX, NORM, make_models
from parity.ulps import gaps, largest


def ties_rounding(bench: Bench) -> str:
    models = bench.models(with_tensor(NORM, torch.ones(16), torch.arange(1, 17) / 64))
    theirs = bench.theirs("ties", models, each={**ONE, "density": [0.6]})[NORM]
    ours = bench.ours("ties", models, density=0.6).tensors[NORM]
    kept = [int((merged != 1).sum()) for merged in (theirs, ours)]
    expect(kept == [9, 10], f"of 16 at density 0.6 mergekit keeps {kept[0]}, ours {kept[1]}")
    return "16 elements, density 0.6: keeps 9, ours 10"


def ties_tiny(bench: Bench) -> str:
    models = bench.models(with_tensor(NORM, torch.ones(2), torch.tensor([0.5, 0.25])))
    theirs = bench.theirs("ties", models, each={**ONE, "density": [0.2]})[NORM]
    ours = bench.ours("ties", models, density=0.2).tensors[NORM]
    expect(theirs.tolist() == [1.5, 1.0], f"mergekit: {theirs.tolist()}")
    expect(ours.tolist() == [1.0, 1.0], f"ours: {ours.tolist()}")
    return "2 elements, density 0.2: keeps 1, ours 0"


def dare_rescale(bench: Bench) -> str:
    models = bench.models(make_models(0.002, experts=1, zeros=0.0))
    base, tuned = (state[MATRIX].double() for state in models.states())
    theirs = bench.theirs("dare_linear", models, each={**ONE, "density": [0.5]}, seed=1)
    l1, ours = (bench.ours("dare_linear", models, density=0.5, **how).tensors for how in ({"rescale": "l1"}, {}))
    changes = [merged[MATRIX].double() - base for merged in (theirs, l1, ours)]
    norms = [float(change.abs().sum() / (tuned - base).abs().sum()) for change in changes]
    expect(abs(norms[0] - 1) < 1e-5, f"mergekit: L1 norm times {norms[0]:.6f}")
    expect(abs(norms[1] - 1) < 1e-5, f"ours with l1: L1 norm times {norms[1]:.6f}")
    kept = changes[2] != 0
    off = largest(gaps(changes[2][kept], 2 * (tuned - base)[kept]))
    expect(off < 1e-8, f"ours: what is kept is {off:.1g} off its double")
    return f"density 0.5: L1 norm times {norms[0]:.6f}, ours {norms[2]:.3f}, ours with l1 {norms[1]:.6f}"


def della_rows(bench: Bench) -> str:
    down, right = 1 + torch.arange(64)[:, None] / 64, 1 - torch.arange(64) / 256  # grows down, falls to the right
    models = bench.models(with_tensor(MATRIX, torch.zeros(8, 64, 64), (down * right).expand(8, 64, 64)))
    theirs = bench.theirs("della_linear", models, each={**ONE, "density": [0.5]}, epsilon=0.49, seed=1)[MATRIX]
    ours = bench.ours("della_linear", models, density=0.5, epsilon=0.49).tensors[MATRIX]
    slopes = [_slope(merged, axis) for merged in (theirs, ours) for axis in (1, 2)]
    expect(slopes[0] > 0.8 and abs(slopes[1]) < 0.1, f"mergekit: slopes {slopes[0]:.2f} and {slopes[1]:.2f}")
    expect(abs(slopes[2]) < 0.1 and slopes[3] < -0.8, f"ours: slopes {slopes[2]:.2f} and {slopes[3]:.2f}")
    found = "[8, 64, 64], larger downwards, smaller to the right: fraction kept changes by {:+.2f} and {:+.2f}"
    return (found + ", ours {:+.2f} and {:+.2f}").format(*slopes)


def _slope(merged: Tensor, axis: int) -> float:
    """How much the fraction kept grows from the first to the last place along an axis, by least squares."""
    kept = (merged != 0).double().mean([i for i in range(merged.dim()) if i != axis])
    places = torch.linspace(-0.5, 0.5, kept.numel(), dtype=torch.float64)
    return float((places * kept).sum() / places.square().sum())


def della_window(bench: Bench) -> str:
    models = bench.models(make_models(0.002, experts=1, zeros=0.0))
    said = refused(lambda: bench.theirs("della", models, each={**ONE, "density": [0.9]}))
    expect(said is not None and "Epsilon" in said, f"mergekit: {said}")
    base = models.states()[0][MATRIX]
    kept = float((bench.ours("della", models, density=0.9).tensors[MATRIX] != base).double().mean())
    expect(abs(kept - 0.9) < 4 * math.sqrt(0.09 / base.numel()), f"ours keeps {kept:.3f}")
    return f"density 0.9, epsilon 0.15: ours keeps {kept:.3f}"


def della_column(bench: Bench) -> str:
    models = bench.models(with_tensor(MATRIX, torch.zeros(4000, 1), torch.ones(4000, 1)))
    said = refused(lambda: bench.theirs("della_linear", models, each={**ONE, "density": [0.5]}))
    expect(said is not None and "p_in" in said, f"mergekit: {said}")
    kept = float((bench.ours("della_linear", models, density=0.5).tensors[MATRIX] != 0).double().mean())
    expect(abs(kept - 0.5) < 4 * math.sqrt(0.25 / 4000), f"ours keeps {kept:.3f}")
    return f"[4000, 1], density 0.5: ours keeps {kept:.3f}"


def sce_uniform(bench: Bench) -> str:
    task_vectors = torch.tensor([3e-4, 0.0]), torch.tensor([1e-4, 0.0])  # energies 9 to 1, 5e-8 in all
    models = bench.models(with_tensor(NORM, torch.zeros(2), *task_vectors))
    theirs, ours = bench.theirs("sce", models)[NORM], bench.ours("sce", models).tensors[NORM]
    expect(largest(gaps(theirs, torch.tensor([2e-4, 0.0]))) < 1e-10, f"mergekit: {theirs.tolist()}")
    expect(largest(gaps(ours, torch.tensor([2.8e-4, 0.0]))) < 1e-10, f"ours: {ours.tolist()}")
    return "3e-4 and 1e-4, energies 9 to 1: 2e-4, ours 2.8e-4"


def arcee_sampling(bench: Bench) -> str:
    generator = torch.Generator().manual_seed(1)
    base, change = (torch.randn(1100, 1000, generator=generator) * rms for rms in (0.02, 0.002))
    models = bench.models(with_tensor(MATRIX, base, change))
    first, again, second = (bench.theirs("arcee_fusion", models, seed=seed) for seed in (1, 1, 2))
    expect(same(first, again), "mergekit: the same seed gives other bits")
    differ = int((first[MATRIX] != second[MATRIX]).sum())
    expect(differ > 0, "mergekit: two seeds give the same bits")
    return f"1,100,000 entries, two seeds: {differ} differ"


def arcee_float32(bench: Bench) -> str:
    states = make_models(0.002, experts=1, zeros=0.0)
    models, wide = bench.models(states), bench.models([as_float64(state) for state in states])
    theirs, exact = bench.theirs("arcee_fusion", models), bench.theirs("arcee_fusion", wide, dtype=None)
    ours = bench.ours("arcee_fusion", models).tensors
    taken = [
        {name: (merged[name] != base).flatten() for name, base in states[0].items()}
        for merged in (theirs, ours, {name: value.float() for name, value in exact.items()})
    ]
    wrong = [sum(int((side[name] ^ taken[2][name]).sum()) for name in side) for side in taken[:2]]
    total = sum(int(side.sum()) for side in taken[2].values())
    expect(wrong[0] > 5 * wrong[1], f"entries on the wrong side: mergekit {wrong[0]}, ours {wrong[1]}")
    return f"of {total} entries mergekit takes over in float64, {wrong[0]} more or fewer in float32, ours {wrong[1]}"


def arcee_quartiles(bench: Bench) -> str:
    change = torch.tensor([1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 4.5]) / 10  # lower: 1 + 1.5 (3 - 1) = 4; between: 2 + 3
    models = bench.models(with_tensor(NORM, torch.zeros(8), change))
    theirs = bench.theirs("arcee_fusion", models)[NORM]
    ours = bench.ours("arcee_fusion", models).tensors[NORM]
    expect(int((theirs != 0).sum()) == 1 and theirs[7] != 0, f"mergekit: {theirs.tolist()}")
    expect(not ours.any(), f"ours: {ours.tolist()}")
    return "importances 1, 1, 1, 1, 3, 3, 3, 4.5: takes 4.5 (threshold 4), ours nothing (5)"
