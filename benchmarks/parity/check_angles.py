"""Checks of the methods that go by angles: karcher, slerp, nuslerp, multislerp, model_stock."""

from __future__ import annotations

import math

import torch

from parity.bench import Bench, Models
from parity.checking import as_bfloat16, expect, refused, same, with_tensor
from parity.equality import as_float64
from parity.models import MATRIX, NORM, State, make_models, shapes
from parity.ulps import gaps, largest, ulp


def karcher_base(bench: Bench) -> str:
    models = bench.models(make_models(0.002, experts=2))
    given = bench.theirs("karcher", models)
    listed = bench.theirs("karcher", Models((models.base, *models.experts, models.base)), role="none")
    expect(same(given, listed), "mergekit: a base model does not give what it gives as one more model")
    left_out = bench.theirs("karcher", models, role="none")
    expect(not same(given, left_out), "mergekit: a base model changes nothing")
    apart = largest(gaps(bench.ours("karcher", models, base_coefficient=0).tensors[MATRIX], left_out[MATRIX]))
    expect(apart < 1e-7, f"ours with base_coefficient 0: {apart:.1g} from mergekit without a base")
    moved = largest(gaps(given[MATRIX], left_out[MATRIX]))
    return f"same bits as with the base listed, {moved:.1g} from without"


def karcher_weights(bench: Bench) -> str:
    models = bench.models(make_models(0.002, experts=2))
    plain, weighted = (bench.theirs("karcher", models, role="none", each={"weight": w}) for w in ([1, 1], [1, 9]))
    expect(same(plain, weighted), "mergekit: weights change the result")
    ours = [bench.ours("karcher", models, base_coefficient=0, coefficient=w).tensors for w in ([1, 1], [1, 9])]
    moved = largest(gaps(ours[0][MATRIX], ours[1][MATRIX]))
    expect(moved > 1e-4, f"ours moves by {moved:.1g}")
    return f"weights 1, 9 instead of 1, 1: same bits, ours moves by {moved:.1g}"


def karcher_bfloat16(bench: Bench) -> str:
    models = bench.models(as_bfloat16(make_models(0.0005)))
    mean, iterated = (
        bench.theirs("karcher", models, role="none", dtype="bfloat16", max_iter=steps) for steps in (0, 10)
    )
    expect(same(mean, iterated), "mergekit: iterations change the bits in bfloat16")
    report = bench.ours("karcher", models, base_coefficient=0).report[MATRIX]
    expect(report["iterations"] > 0, "ours does not iterate")
    return f"cos {math.cos(report['angle']):.4f}: same bits with 0 and 10 iterations; ours makes {report['iterations']}"


def karcher_tolerance(bench: Bench) -> str:
    states = make_models(0.002)
    wide = bench.models([as_float64(state) for state in states])
    limit = bench.theirs("karcher", wide, role="none", dtype=None, max_iter=1000, tol=1e-12)
    theirs = bench.theirs("karcher", wide, role="none", dtype=None)
    ours = bench.ours("karcher", bench.models(states), base_coefficient=0).tensors
    off = [_relative(merged, limit) for merged in (theirs, ours)]
    expect(off[0] > 10 * off[1], f"mergekit is off the limit by {off[0]:.1g} of its norm, ours by {off[1]:.1g}")
    return f"off the limit by {off[0]:.0e} of its norm in float64; ours, in float32, by {off[1]:.0e}"


def _relative(left: State, right: State) -> float:
    return max(float((left[name].double() - value).norm() / value.norm()) for name, value in right.items())


def slerp_linear(bench: Bench) -> str:
    models = bench.models(make_models(0.002, experts=1))
    theirs, ours = bench.theirs("slerp", models, t=0.3), bench.ours("slerp", models, t=0.3)
    first, second = (state[NORM].double() for state in models.states())
    angle = math.acos(float(first @ second / first.norm() / second.norm()))
    line = 0.7 * first + 0.3 * second
    arc = (math.sin(0.7 * angle) * first + math.sin(0.3 * angle) * second) / math.sin(angle)
    unit = ulp(torch.stack([first, second]).abs().amax(0))
    off = [largest(gaps(theirs[NORM], line, unit)), largest(gaps(ours.tensors[NORM], arc, unit))]
    apart = largest(gaps(line, arc, unit))
    expect(apart > 2 + max(off), f"the line is only {apart:.1f} ulp from the arc")
    expect(off[0] <= 2, f"mergekit is {off[0]:.1f} ulp off the line")
    expect(off[1] <= 2, f"ours is {off[1]:.1f} ulp off the arc")
    expect(math.cos(angle) > 0.9995, f"the cosine is {math.cos(angle):.5f}")
    return f"line and arc {apart:.1f} ulp apart: mergekit {off[0]:.1f} from the line, ours {off[1]:.1f} from the arc"


def nuslerp_zero_sum(bench: Bench) -> str:
    models = bench.models(make_models(0.002, experts=2))
    zero, half = (bench.theirs("nuslerp", models, each={"weight": w}) for w in ([1, -1], [1, 1]))
    expect(same(zero, half), "mergekit: weights 1 and -1 do not give what 1 and 1 do")
    said = refused(lambda: bench.ours("nuslerp", models, coefficient=[1, -1]))
    expect(said is not None and "sum to 0" in said, f"ours: {said}")
    return "weights 1, -1: the bits of 1, 1"


def multislerp_antipodal(bench: Bench) -> str:
    generator = torch.Generator().manual_seed(1)
    vector = {name: torch.randn(shape, generator=generator) for name, shape in shapes().items()}
    states = [{n: torch.zeros_like(v) + c * v for n, v in vector.items()} for c in (0, 1, 1, -2)]
    models = bench.models(states)
    said = refused(lambda: bench.theirs("multislerp", models, each={"weight": [1, 1, 2]}))
    expect(said is not None and "weighted sum" in said, f"mergekit: {said}")
    merged = bench.ours("multislerp", models, coefficient=[1, 1, 2])
    expect(merged.report[MATRIX]["linear"], "ours does not take the linear mean")
    off = largest(gaps(merged.tensors[MATRIX], -0.5 * vector[MATRIX].double()))
    expect(off < 1e-6, f"ours is {off:.1g} off the linear mean")
    return "task vectors v, v, -2v, weights 1, 1, 2: ours -v/2"


def model_stock_negative(bench: Bench) -> str:
    first, second = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([-1.0, 0.0, 0.5])
    models = bench.models(with_tensor(NORM, torch.ones(3), first, second))
    cosine = -2 / math.sqrt(5 * 1.25)  # -0.8
    ratio = 2 * cosine / (1 + cosine)  # -8
    theirs = bench.theirs("model_stock", models)[NORM]
    off = largest(gaps(theirs, 1 + ratio * (first + second) / 2))
    expect(off < 1e-4, f"mergekit is {off:.1g} off t = {ratio:.0f}")
    ours = bench.ours("model_stock", models).tensors[NORM]
    expect(torch.equal(ours, torch.ones(3)), f"ours: {ours.tolist()}")
    return f"cosine {cosine:.1f}: t = {ratio:.0f}, ours 0"


def model_stock_floor(bench: Bench) -> str:
    task_vectors = torch.tensor([3e-4, 0.0, 0.0]), torch.tensor([3e-4, 4e-4, 0.0])  # cosine 0.6: t 0.75
    models = bench.models(with_tensor(NORM, torch.zeros(3), *task_vectors))
    results = bench.theirs("model_stock", models), bench.ours("model_stock", models).tensors
    ratios = [merged[NORM][0].item() / 3e-4 for merged in results]  # of the mean's first entry
    cosine = 9e-8 / 1e-6
    floored = 2 * cosine / (1 + cosine)
    expect(abs(ratios[0] - floored) < 1e-5, f"mergekit: t = {ratios[0]:.3f}, not {floored:.3f}")
    expect(abs(ratios[1] - 0.75) < 1e-5, f"ours: t = {ratios[1]:.3f}, not 0.75")
    return f"lengths 3e-4 and 5e-4, cosine 0.6: t = {ratios[0]:.3f}, ours {ratios[1]:.3f}"
