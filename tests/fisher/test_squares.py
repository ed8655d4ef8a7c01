"""From gradients and factors to the Fisher of every tensor, handed to a sink that checks every element."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fisher.models import Collector, settings
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.errors import CheckpointError
from streammerge.fisher import fisher, linear, squares
from streammerge.fisher.linear import Factors
from streammerge.fisher.names import Part
from streammerge.fisher.squares import GradientSquares, emit, wanted_parts
from streammerge.workers import Workers

ROWS, COLUMNS, SAMPLES, TOKENS = 5, 6, 4, 3


def stored(folder: Path, *names: str, shape: tuple[int, ...] = (ROWS, COLUMNS)) -> Checkpoint:
    save_file({name: torch.zeros(shape) for name in names}, folder / "model.safetensors")
    return Checkpoint.open(folder, need_config=False)


def stack(base: Checkpoint, *names: str) -> tuple[Part, ...]:
    """The tensors one after the other."""
    return tuple(Part(base.info(name), number * base.info(name).numel) for number, name in enumerate(names))


def factors_of(start: int, rows: int, seed: int) -> tuple[Factors, Tensor]:
    """Thin factors in two groups, and the mean of squares they stand for, in float64."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(SAMPLES, TOKENS, rows, generator=generator)
    inputs = torch.randn(SAMPLES, TOKENS, COLUMNS, generator=generator)
    expected = (gradients.double().mT @ inputs.double()).square().mean(0)
    groups = list(zip(gradients.split(3), inputs.split(3), strict=True))
    return Factors(start, rows, COLUMNS, groups), expected


def emitted(
    base: Checkpoint,
    parts: Mapping[str, tuple[Part, ...]],
    factors: Mapping[str, list[Factors]],
    sums: Mapping[str, Tensor] | None = None,
    finished: Mapping[str, float | None] | None = None,
    workers: int = 1,
) -> Collector:
    sink = Collector(base, finished)
    with Workers(workers) as pool:
        known = [base.info(name) for name in finished or ()]
        emit(parts, factors, sums or {}, SAMPLES, sink, pool, "m", known)
    sink.sync()
    return sink


@pytest.fixture(autouse=True, params=[1, 3, 1 << 20], ids=lambda size: f"pieces of {size}")
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(squares, "_PIECE", request.param)
    monkeypatch.setattr(linear, "_SQUARES", {"cpu": (min(request.param, 256), 4)})


@pytest.mark.parametrize("workers", [1, 2])
def test_one_tensor_one_function(tmp_path: Path, workers: int) -> None:
    with stored(tmp_path, "w") as base:
        factors, expected = factors_of(0, ROWS, 0)
        sink = emitted(base, {"p": stack(base, "w")}, {"p": [factors]}, workers=workers)
    torch.testing.assert_close(sink.values["w"].double(), expected, rtol=1e-5, atol=1e-6)
    assert sink.reached == {"w": True}


def test_functions_and_tensors_need_not_have_the_same_borders(tmp_path: Path) -> None:
    """Three tensors of five rows in a parameter that three functions use: rows 0 to 8, 8 to 10, 10 to 15."""
    names = [f"layers.0.x{number}" for number in range(3)]
    with stored(tmp_path, *names) as base:
        made = [factors_of(start * COLUMNS, rows, start) for start, rows in ((10, 5), (0, 8), (8, 2))]
        sink = emitted(base, {"p": stack(base, *names)}, {"p": [factors for factors, _ in made]})
    expected = torch.cat([made[1][1], made[2][1], made[0][1]])
    found = torch.cat([sink.values[name] for name in names])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert all(sink.reached.values())


def test_only_the_wanted_part_is_written(tmp_path: Path) -> None:
    with stored(tmp_path, "a", "b") as base:
        factors, expected = factors_of(0, 2 * ROWS, 0)
        sink = emitted(base, {"p": stack(base, "a", "b")[1:]}, {"p": [factors]})
    assert set(sink.values) == {"b"}
    torch.testing.assert_close(sink.values["b"].double(), expected[ROWS:], rtol=1e-5, atol=1e-6)


def test_what_no_token_reached_has_the_mean_of_its_kind(tmp_path: Path) -> None:
    """Experts 0 and 2 are reached, 1 is not; w1 and w3 are different projections; nothing was reached of w9."""
    names = [f"layers.4.experts.{expert}.{leaf}.weight" for leaf in ("w1", "w3", "w9") for expert in range(3)]
    with stored(tmp_path, *names) as base:
        made = {leaf: [factors_of(e * ROWS * COLUMNS, ROWS, e + 7 * n) for e in (0, 2)] for n, leaf in enumerate("13")}
        sink = emitted(
            base,
            {leaf: stack(base, *[name for name in names if f".w{leaf}." in name]) for leaf in "139"},
            {leaf: [factors for factors, _ in both] for leaf, both in made.items()},
        )
    for leaf, both in made.items():
        unreached = sink.values[f"layers.4.experts.1.w{leaf}.weight"]
        mean = torch.cat([expected for _, expected in both]).mean()
        torch.testing.assert_close(unreached.double(), mean.expand(ROWS, COLUMNS), rtol=1e-6, atol=0)
    assert not any(sink.values[name].any() for name in names if ".w9." in name), "zero where nothing was reached"
    assert {name for name, reached in sink.reached.items() if not reached} == {
        name for name in names if ".w9." in name or ".1." in name
    }


def test_a_tensor_reached_in_part(tmp_path: Path) -> None:
    """Rows 2 and 3 of five; the others get the mean of these two, as would another tensor of its kind."""
    with stored(tmp_path, "experts.0.w", "experts.1.w") as base:
        factors, expected = factors_of(2 * COLUMNS, 2, 0)
        first, second = base.info("experts.0.w"), base.info("experts.1.w")
        parts = {"p": (Part(first, 0),), "q": (Part(second, 0),)}
        sink = emitted(base, parts, {"p": [factors]})
    found = sink.values["experts.0.w"].double()
    torch.testing.assert_close(found[2:4], expected, rtol=1e-5, atol=1e-6)
    for rows in (found[:2], found[4:], sink.values["experts.1.w"].double()):
        torch.testing.assert_close(rows, expected.mean().expand_as(rows), rtol=1e-6, atol=0)
    assert sink.reached == {"experts.0.w": False, "experts.1.w": False}


def test_what_an_interrupted_run_finished_counts_in_the_mean(tmp_path: Path) -> None:
    """But for what was itself filled in."""
    names = [f"experts.{expert}.w" for expert in range(4)]
    with stored(tmp_path, *names) as base:
        factors, expected = factors_of(0, ROWS, 0)
        parts = {"p": (Part(base.info(names[0]), 0),), "q": (Part(base.info(names[1]), 0),)}
        sink = emitted(base, parts, {"p": [factors]}, finished={names[2]: 7.0, names[3]: None})
    wanted = (expected.mean() + 7) / 2
    torch.testing.assert_close(sink.values[names[1]].double(), wanted.expand(ROWS, COLUMNS), rtol=1e-6, atol=0)


def test_wanted_parts(tmp_path: Path) -> None:
    with stored(tmp_path, "a", "b", "c", "d") as base:
        parts = {"p": stack(base, "a", "b"), "q": stack(base, "c"), "r": stack(base, "d")}
        found = wanted_parts(parts, ["p", "q"], {"a", "b", "c", "d"}, Collector(base, {"b": 1.0, "c": 1.0}))
        assert found == {"p": parts["p"][:1]}
        assert wanted_parts(parts, ["p", "q"], {"c"}, Collector(base)) == {"q": parts["q"]}


# ---- Everything that is no matrix of a linear function --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_are_squared_one_sequence_at_a_time(tmp_path: Path, dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.randn(ROWS, COLUMNS).to(dtype))
    other = nn.Parameter(torch.randn(COLUMNS).to(dtype))
    inputs = torch.randn(SAMPLES, COLUMNS).to(dtype)
    expected = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    for x in inputs:
        (gradient,) = torch.autograd.grad((parameter * (x * other)).square().sum(), parameter)
        expected += gradient.double() ** 2 / SAMPLES
    made = GradientSquares({"p": parameter}, 1, "m")
    for x in inputs:
        (parameter * (x * other)).square().sum().backward()
        assert parameter.grad is None, "freed at once"
    assert set(made.sums) == {"p"} and other.grad is not None
    assert made.sums["p"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    with stored(tmp_path, "w") as base:
        sink = emitted(base, {"p": stack(base, "w")}, {}, made.sums)
    torch.testing.assert_close(sink.values["w"].double(), expected, rtol=1e-5, atol=1e-6)


def test_several_sequences_at_a_time_are_refused(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.randn(3))
    GradientSquares({"model.w": parameter}, 2, "base")
    with pytest.raises(CheckpointError, match=r"^model base: the weight 'model.w' of a linear layer is also used"):
        parameter.sum().backward()


def test_a_parameter_with_factors_and_a_gradient_is_refused(tmp_path: Path) -> None:
    with stored(tmp_path, "w") as base:
        factors, _ = factors_of(0, ROWS, 0)
        with pytest.raises(CheckpointError, match="^model m: parameter 'p' is used in a linear function and in"):
            emitted(base, {"p": stack(base, "w")}, {"p": [factors]}, {"p": torch.ones(ROWS, COLUMNS)})


@pytest.mark.parametrize("everything", [True, False])
def test_a_weight_in_two_roles_is_refused_by_name(
    qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, everything: bool
) -> None:
    plain = Qwen2MLP.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        return plain(self, x) + 1e-3 * self.up_proj.weight.mean(0)

    monkeypatch.setattr(Qwen2MLP, "forward", forward)
    with pytest.raises(CheckpointError, match=r"'model.layers.2.mlp.up_proj.weight'.* another way"):
        fisher(str(qwen2), tmp_path / "out", settings(all_parameters=everything), device="cpu")
