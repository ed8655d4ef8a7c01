"""FIM-TIES and FIM-TA: what is a gate projection, alone or fused, and what becomes of it."""

import math
from typing import Any

import pytest
import torch
from methods.driver import Models, make_models, merge
from methods.fim_truth import TA, Q, assert_like_naive, close
from naive import naive_fim
from torch import Tensor

from streammerge.methods import api

ALL, NONE = slice(None), slice(0)
FUSED = {"mlp.gate_up_proj.weight": (8, 3), "mlp.experts.gate_up_proj": (2, 6, 4)}
DOWN = {"mlp.down_proj.weight": (3, 4), "mlp.experts.down_proj": (2, 4, 3)}
FUSED_SHAPES = {f"model.layers.{block}.{name}": shape for block in (0, 2) for name, shape in (FUSED | DOWN).items()}


@pytest.mark.parametrize(
    ("name", "shape", "down", "gate"),
    [
        ("mlp.gate_proj.weight", (4, 3), None, ALL),
        ("mlp.gate_proj.bias", (4,), None, ALL),
        ("mlp.experts.3.gate_proj.weight", (4, 3), None, ALL),
        ("mlp.experts.gate_proj", (2, 4, 3), None, ALL),
        ("mlp.shared_expert.gate_proj.weight", (4, 3), None, ALL),
        ("mlp.shared_experts.gate_proj.weight", (4, 3), None, ALL),
        ("block_sparse_moe.experts.11.w1.weight", (4, 3), None, ALL),
        ("block_sparse_moe.experts.11.w2.weight", (3, 4), None, NONE),
        ("block_sparse_moe.experts.11.w3.weight", (4, 3), None, NONE),
        ("feed_forward.w1.weight", (4, 3), None, NONE),  # another model's w1
        ("experts_of_old.0.w1.weight", (4, 3), None, NONE),
        ("other_experts.0.w1.weight", (4, 3), None, NONE),
        ("mlp.gate.weight", (4, 3), None, NONE),  # routers
        ("block_sparse_moe.gate.weight", (4, 3), None, NONE),
        ("mlp.shared_expert_gate.weight", (1, 3), None, NONE),
        ("mlp.router.weight", (4, 3), None, NONE),
        ("mlp.up_proj.weight", (4, 3), None, NONE),
        ("mlp.investigate_project.weight", (4, 3), None, NONE),
        ("mlp.gate_up_proj.weight", (8, 3), (3, 4), slice(4)),
        ("mlp.gate_up_proj.weight", (2, 3), (3, 1), slice(1)),
        ("mlp.gate_up_proj.weight", (8, 4), (4, 4), slice(4)),
        ("mlp.gate_up_proj.weight", (8, 3), None, NONE),
        ("mlp.gate_up_proj.weight", (7, 3), (3, 4), NONE),
        ("mlp.gate_up_proj.bias", (8,), (3,), NONE),
        ("mlp.shared_expert.gate_up_proj.weight", (8, 3), (3, 4), slice(4)),
        ("mlp.experts.0.gate_up_proj.weight", (8, 3), (3, 4), slice(4)),
        ("mlp.experts.gate_up_proj", (2, 8, 3), (2, 3, 4), slice(4)),
        ("mlp.experts.gate_up_proj", (2, 8, 8), (2, 8, 4), slice(4)),
        ("mlp.experts.gate_up_proj", (2, 8, 8), (2, 4, 8), NONE),  # the same shape, transposed
        ("mlp.experts.gate_up_proj", (2, 3, 8), (2, 4, 3), NONE),  # transposed
        ("mlp.experts.gate_up_proj", (2, 4, 8), (2, 4, 4), NONE),  # transposed, W_d square
        ("mlp.experts.gate_up_proj", (2, 8, 3), None, NONE),
        ("mlp.experts.gate_up_proj", (2, 8, 3), (1, 3, 4), NONE),
        ("mlp.experts.gate_up_proj_bias", (2, 8), None, NONE),
    ],
)
def test_what_is_a_gate_projection(
    name: str, shape: tuple[int, ...], down: tuple[int, ...] | None, gate: slice
) -> None:
    shapes = {name: shape} | ({name.replace("gate_up_proj", "down_proj"): down} if down else {})
    base = {f"model.layers.0.{key}": torch.zeros(size) for key, size in shapes.items()}
    models = Models(base, [{n: b + 2 for n, b in base.items()}], {n: torch.ones_like(b) for n, b in base.items()})
    if len(shape) == 1:
        models = with_a_matrix(models)  # to be scored by
    expected = {key: torch.ones_like(tensor) for key, tensor in models.base.items()}
    rows = expected[f"model.layers.0.{name}"]
    rows[(..., gate, ALL) if len(shape) > 1 else gate] = 0.6
    close(merge("fim_ta", models, gate_factor=0.6).tensors, expected)
    close(naive_fim(models.base, models.experts, models.fisher, **(TA | {"gate_factor": 0.6})).merged, expected)


def with_a_matrix(models: Models) -> Models:
    """The models and another matrix in block 0, with a task vector of 2."""
    more = {f"model.layers.0.{Q}": torch.zeros(1, 2)}
    return Models(
        models.base | more,
        [expert | {n: t + 2 for n, t in more.items()} for expert in models.experts],
        models.fisher | {n: t + 1 for n, t in more.items()},
    )


def test_a_fused_gate_by_hand() -> None:
    """Coefficient 0.5, and 0.7 * 0.5 for the gates: row 0 of [2, 2], rows 0 and 2 of the stack [2, 2, 1]."""
    prefix = "model.layers.0.mlp."
    deltas = {
        "gate_up_proj.weight": [[2.0, -2.0], [4.0, 1.0]],
        "down_proj.weight": [[0.0], [0.0]],
        "experts.gate_up_proj": [[[2.0], [2.0]], [[4.0], [4.0]]],
        "experts.down_proj": [[[0.0]], [[0.0]]],
    }
    base = {prefix + name: torch.ones_like(torch.tensor(delta)) for name, delta in deltas.items()}
    tuned = {prefix + name: 1 + torch.tensor(delta) for name, delta in deltas.items()}
    models = Models(base, [tuned], {name: torch.ones_like(tensor) for name, tensor in base.items()})
    plain = merge("fim_ties", models, density=1.0, norm_tolerance="off")
    expected = {
        "gate_up_proj.weight": [[1.7, 0.3], [3.0, 1.5]],
        "down_proj.weight": [[1.0], [1.0]],
        "experts.gate_up_proj": [[[1.7], [2.0]], [[2.4], [3.0]]],
        "experts.down_proj": [[[1.0]], [[1.0]]],
    }
    close(plain.tensors, {prefix + name: torch.tensor(values) for name, values in expected.items()})
    fused = {"coefficient": [0.5], "gate_coefficient": [0.35], "kept": [4]}
    assert plain.reports == {
        prefix + "gate_up_proj.weight": fused,
        prefix + "down_proj.weight": {"coefficient": [0.5], "kept": [2]},
        prefix + "experts.gate_up_proj": fused,
        prefix + "experts.down_proj": {"coefficient": [0.5], "kept": [2]},
    }

    name = prefix + "experts.gate_up_proj"  # of one column: its output norm is its own, whatever the probes
    ratio = math.sqrt((1.7**2 + 2.0**2 + 2.4**2 + 3.0**2) / 4)
    calibrated = merge("fim_ties", models, density=1.0)
    torch.testing.assert_close(calibrated.tensors[name], torch.tensor(expected["experts.gate_up_proj"]) / ratio)
    assert calibrated.reports[name] == fused | {"norm_ratio": pytest.approx(ratio, rel=1e-6), "rescaled": True}


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("options", [{}, {"gate_factor": 0.0}, {"density": 1.0}, {"norm_tolerance": 0.0}], ids=str)
def test_fused_gates_equal_the_naive_reference(options: dict[str, Any], experts: int) -> None:
    models = make_models(experts, extra=FUSED_SHAPES)
    merged = merge("fim_ties", models, **options)
    assert_like_naive(merged, naive_fim(models.base, models.experts, models.fisher, **options), trims=True)
    fused = {name for name, entry in merged.reports.items() if "gate_coefficient" in entry}
    assert fused == {name for name in FUSED_SHAPES if "gate_up_proj" in name}
    for name in fused:
        entry = merged.reports[name]
        factor = options.get("gate_factor", 0.7)
        assert entry["gate_coefficient"] == [factor * alpha for alpha in entry["coefficient"]]


@pytest.mark.parametrize("scope", ["tensor", "block"])
@pytest.mark.parametrize("elements", [1, 9, 16, 20, 31])
def test_fused_gates_in_row_blocks_of_any_size(elements: int, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = make_models(2, extra=FUSED_SHAPES)
    whole = merge("fim_ties", models, trim_scope=scope)
    monkeypatch.setattr(api, "TILE_ELEMENTS", elements)
    cut = merge("fim_ties", models, trim_scope=scope)
    assert all(torch.equal(cut.tensors[name], tensor) for name, tensor in whole.tensors.items())


@pytest.mark.parametrize("experts", [1, 2])
def test_a_fused_gate_has_the_bits_of_a_separate_one(experts: int) -> None:
    """[gate; up] fused, or as two tensors with the same coefficients."""
    fused, down = "model.layers.0.mlp.gate_up_proj.weight", "model.layers.0.mlp.down_proj.weight"
    models = make_models(experts, blocks=1, extra={fused: (8, 6)})
    for tensors in (models.base, *models.experts, models.fisher):
        tensors[down] = tensors[down][:, :4].contiguous()

    def split(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        halves = dict(zip(("gate_proj", "up_proj"), tensors[fused].chunk(2), strict=True))
        return {n: t for n, t in tensors.items() if n != fused} | {
            fused.replace("gate_up_proj", half): tensor for half, tensor in halves.items()
        }

    apart = Models(split(models.base), [split(expert) for expert in models.experts], split(models.fisher))
    one, two = (merge("fim_ta", m, gate_factor=0.7).tensors for m in (models, apart))
    assert torch.equal(one[fused], torch.cat([two[fused.replace("gate_up_proj", h)] for h in ("gate_proj", "up_proj")]))
