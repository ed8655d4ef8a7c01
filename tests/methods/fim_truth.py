"""Small models whose merge by FIM-TIES is worked out by hand, and the comparison with the naive reference."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from methods.driver import Merged, Models
from naive import FimResult
from torch import Tensor

MOST, LEAST = 0.5, 1 / (1 + math.exp(-1))
Q, GATE, BIAS = "self_attn.q_proj.weight", "mlp.gate_proj.weight", "self_attn.q_proj.bias"
PLAIN: dict[str, Any] = {"gate_factor": 1.0, "norm_tolerance": "off"}  # nothing but coefficients and trim
TA = {"trim": False, "elect": False, "gate_factor": 1.0, "norm_tolerance": None}  # what FIM-TA is to `naive_fim`


def close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def one_matrix(*task_vectors: list[float], base: float = 0.0, fisher: list[float] | None = None) -> Models:
    """One block with one matrix of one row; its coefficient is 0.5."""
    name = f"model.layers.0.{Q}"
    rows = [torch.tensor([vector]) for vector in task_vectors]
    origin = torch.full_like(rows[0], base)
    weights = torch.ones_like(origin) if fisher is None else torch.tensor([fisher])
    return Models({name: origin}, [{name: origin + row} for row in rows], {name: weights})


def two_blocks() -> Models:
    """Base 1 everywhere. Block 0: mean F = 64 / 8 = 8, mean d^2 = 1, score log 8; block 1: 1, 2, log 2."""
    deltas = {
        "model.embed_tokens.weight": [[1.0, 1.0], [1.0, 1.0]],
        f"model.layers.0.{Q}": [[1.0, -1.0], [1.0, 1.0]],
        f"model.layers.0.{GATE}": [[1.0, -1.0, 1.0, 1.0]],
        f"model.layers.0.{BIAS}": [100.0, 200.0],
        f"model.layers.1.{Q}": [[2.0, 0.0]],
        "model.norm.weight": [1.0, 1.0],
    }
    base = {name: torch.ones_like(torch.tensor(delta)) for name, delta in deltas.items()}
    fisher = {name: torch.full_like(tensor, 1e9) for name, tensor in base.items()}
    fisher[f"model.layers.0.{Q}"] = torch.tensor([[1.0, 9.0], [2.0, 4.0]])
    fisher[f"model.layers.0.{GATE}"] = torch.full((1, 4), 12.0)
    fisher[f"model.layers.1.{Q}"] = torch.ones(1, 2)
    return Models(base, [{name: base[name] + torch.tensor(delta) for name, delta in deltas.items()}], fisher)


def assert_like_naive(merged: Merged, truth: FimResult, trims: bool) -> None:
    close(merged.tensors, truth.merged)
    rows = iter(merged.blocks)
    for squares, scores, alphas in zip(truth.task_vector_mean_square, truth.scores, truth.alphas, strict=True):
        for block, mean, square, score, alpha in zip(
            truth.blocks, truth.fisher_mean, squares, scores, alphas, strict=True
        ):
            row = next(rows)
            assert row["block"] == block
            assert row["fisher_mean"] is None or row["fisher_mean"] == pytest.approx(mean, rel=1e-12)
            assert row["task_vector_mean_square"] == pytest.approx(square, rel=1e-12)
            assert row["score"] == (pytest.approx(score, rel=1e-12) if score > -math.inf else None)
            assert row["alpha"] == pytest.approx(alpha, rel=1e-12)
    assert next(rows, None) is None
    for name, entry in merged.reports.items():
        assert ("kept" in entry) is (trims and name in truth.kept)
        if "kept" in entry:
            assert entry["kept"] == [truth.kept[name]] * len(truth.alphas)
        assert ("norm_ratio" in entry) is (name in truth.norm_ratio)
        if "norm_ratio" in entry:
            assert entry["norm_ratio"] == pytest.approx(truth.norm_ratio[name], rel=1e-6)
            assert entry["rescaled"] is truth.rescaled[name]
