"""Checks of the element-wise methods, of what concerns all methods, and of what mergekit 0.1.4 did."""

from __future__ import annotations

from collections.abc import Callable

import torch

from parity.bench import Bench
from parity.checking import ONE, as_bfloat16, expect, refused, same, with_tensor
from parity.models import MATRIX, NORM, make_models
from parity.ulps import gaps, largest


def linear_base(bench: Bench) -> str:
    models = bench.models(make_models(0.002, experts=2))
    said = refused(lambda: bench.theirs("linear", models, each={"weight": [1, 1]}))
    expect(said is not None and "parameter weight" in said, f"mergekit: {said}")
    mean = torch.stack([state[MATRIX].double() for state in models.states()]).mean(0)
    off = largest(gaps(bench.ours("linear", models).tensors[MATRIX], mean))
    expect(off < 1e-7, f"ours is {off:.1g} off the mean of three")
    return "a base and two models: ours the mean of three"


def nearswap_floor(bench: Bench) -> str:
    models = bench.models(with_tensor(NORM, torch.zeros(3), torch.tensor([1e-7, 5e-7, -1e-3])))
    theirs = bench.theirs("nearswap", models, t=1e-7)[NORM]
    ours = bench.ours("nearswap", models, t=1e-7).tensors[NORM]
    expect(largest(gaps(theirs, torch.tensor([1e-8, 5e-8, -1e-7]))) < 1e-13, f"mergekit: {theirs.tolist()}")
    expect(largest(gaps(ours, torch.tensor([1e-7, 1e-7, -1e-7]))) < 1e-13, f"ours: {ours.tolist()}")
    return "t 1e-7, differences 1e-7 and 5e-7: moves 1e-8 and 5e-8, ours 1e-7 both"


def compute_dtype(bench: Bench) -> str:
    states = as_bfloat16(make_models(0.002, experts=2))
    models = bench.models(states)
    theirs = bench.theirs("task_arithmetic", models, each={"weight": [0.3, 0.9]}, dtype="bfloat16")
    ours = bench.ours("task_arithmetic", models, coefficient=[0.3, 0.9]).tensors
    wrong, total = [0, 0], 0
    for name, base in states[0].items():
        first, second = (state[name].double() - base.double() for state in states[1:])
        rounded = (base.double() + 0.3 * first + 0.9 * second).bfloat16()
        for side, merged in enumerate((theirs, ours)):
            wrong[side] += int((merged[name] != rounded).sum())
        total += base.numel()
    shares = [count / total for count in wrong]
    expect(shares[0] > 0.02, f"mergekit: only {shares[0]:.2%} are not the exact sum rounded once")
    expect(shares[1] < 0.002, f"ours: {shares[1]:.2%} are not the exact sum rounded once")
    return f"in bfloat16, entries that are not the exact result rounded once: {shares[0]:.1%}, ours {shares[1]:.1%}"


def unknown_parameter(bench: Bench) -> str:
    models = bench.models(make_models(0.002, experts=1))
    plain, typo = (bench.theirs("ties", models, each={**ONE, **more}) for more in ({}, {"densty": [0.2]}))
    expect(same(plain, typo), "mergekit: an unknown parameter changes the result")
    said = refused(lambda: bench.ours("ties", models, densty=0.2))
    expect(said is not None and "densty" in said, f"ours: {said}")
    return f"`densty`: no effect, ours “{said}”"


def output_dtype(method: str, experts: int) -> Callable[[Bench], str]:
    def check(bench: Bench) -> str:
        models = bench.models(as_bfloat16(make_models(0.002, experts=experts)))
        theirs = {value.dtype for value in bench.theirs(method, models, dtype="bfloat16").values()}
        expect(theirs == {torch.float32}, f"mergekit writes {theirs}")
        ours = {value.dtype for value in bench.ours(method, models).tensors.values()}
        expect(ours == {torch.bfloat16}, f"ours writes {ours}")
        return "bfloat16 models, `dtype: bfloat16`: all of the output is float32, ours bfloat16"

    return check


def breadcrumbs_small(bench: Bench) -> str:
    models = bench.models(with_tensor(NORM, torch.ones(16), torch.arange(1, 17) / 64))
    theirs = bench.theirs("breadcrumbs", models, each={**ONE, "density": [0.5]})[NORM]
    ours = bench.ours("breadcrumbs", models, density=0.5).tensors[NORM]
    expect(torch.equal(theirs, ours), f"mergekit: {theirs.tolist()}, ours: {ours.tolist()}")
    expect(int((ours != 1).sum()) == 8, "not half of the 16 are kept")
    return "16 elements, density 0.5, gamma 0.01: both keep the 8 largest"


def model_stock_singular(bench: Bench) -> str:
    vector = torch.tensor([2.0, 1.0, 0.0])
    models = bench.models(with_tensor(NORM, torch.ones(3), vector, -vector))
    theirs, ours = bench.theirs("model_stock", models)[NORM], bench.ours("model_stock", models).tensors[NORM]
    expect(torch.equal(theirs, torch.ones(3)), f"mergekit: {theirs.tolist()}")
    expect(torch.equal(ours, torch.ones(3)), f"ours: {ours.tolist()}")
    return "task vectors d and -d: both give the base"


def sce_frozen(bench: Bench) -> str:
    models = bench.models(with_tensor(NORM, torch.ones(16), torch.zeros(16), torch.zeros(16)))
    theirs = bench.theirs("sce", models, select_topk=0.5)[NORM]
    ours = bench.ours("sce", models, select_topk=0.5).tensors[NORM]
    expect(torch.equal(theirs, torch.ones(16)), f"mergekit: shape {list(theirs.shape)}")
    expect(torch.equal(ours, torch.ones(16)), f"ours: {ours.tolist()}")
    return "a tensor all models share, select_topk 0.5: both give the base"
