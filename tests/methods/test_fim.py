"""FIM-TIES and FIM-TA: by hand, against the naive reference, on degenerate models, and their parameters."""

import math
from typing import Any

import pytest
import torch
from methods.driver import Models, make_models, merge, resolve
from methods.fim_truth import BIAS, GATE, LEAST, MOST, TA, Q, assert_like_naive, close, one_matrix, two_blocks
from naive import block_of, naive_fim

from streammerge.errors import CheckpointError, RecipeError

# --- By hand ----------------------------------------------------------------------------------------------------------


def test_by_hand_on_two_blocks() -> None:
    """Scores log 8 and log 2: the most and the least important, so 1 - sigmoid(0) and 1 - sigmoid(-1) = 0.7310586."""
    merged = merge("fim_ties", two_blocks(), density=0.5, norm_tolerance="off")
    expected = {
        "model.embed_tokens.weight": [[1.0, 1.0], [1.0, 1.0]],
        f"model.layers.0.{Q}": [[1.0, 0.5], [1.0, 1.5]],  # w = (1, 9, 2, 4): the two largest, times 0.5
        f"model.layers.0.{GATE}": [[1.35, 0.65, 1.0, 1.0]],  # times 0.7 * 0.5; the first of four ties
        f"model.layers.0.{BIAS}": [51.0, 101.0],  # untrimmed, and not in the score
        f"model.layers.1.{Q}": [[1 + 2 * LEAST, 1.0]],
        "model.norm.weight": [1.0, 1.0],
    }
    close(merged.tensors, {name: torch.tensor(values) for name, values in expected.items()})
    assert merged.blocks == [
        {"block": 0, "fisher_mean": 8.0, "task_vector_mean_square": 1.0, "score": math.log(8), "alpha": MOST},
        {"block": 1, "fisher_mean": 1.0, "task_vector_mean_square": 2.0, "score": math.log(2), "alpha": LEAST},
    ]
    assert merged.reports == {
        f"model.layers.0.{Q}": {"coefficient": [0.5], "kept": [2]},
        f"model.layers.0.{GATE}": {"coefficient": [0.35], "kept": [2]},
        f"model.layers.0.{BIAS}": {"coefficient": [0.5]},
        f"model.layers.1.{Q}": {"coefficient": [LEAST], "kept": [1]},
    }


def test_by_hand_whole_task_vectors_on_two_blocks() -> None:
    """The coefficients of `fim_ties` on all of (1, -1, 1, 1), the gate's (1, -1, 1, 1), (100, 200) and (2, 0)."""
    merged = merge("fim_ta", two_blocks())
    expected = {
        "model.embed_tokens.weight": [[1.0, 1.0], [1.0, 1.0]],
        f"model.layers.0.{Q}": [[1.5, 0.5], [1.5, 1.5]],
        f"model.layers.0.{GATE}": [[1.5, 0.5, 1.5, 1.5]],
        f"model.layers.0.{BIAS}": [51.0, 101.0],
        f"model.layers.1.{Q}": [[2.4621172, 1.0]],
        "model.norm.weight": [1.0, 1.0],
    }
    close(merged.tensors, {name: torch.tensor(values) for name, values in expected.items()})
    assert merged.alphas == [MOST, LEAST]


@pytest.mark.parametrize(
    ("method", "density", "expected"),
    [
        # scaled by 0.5: (2, -1, 0.5, 0) and (1, 1, -1.5, 0); elected (+, +, -, +), averaged by their count
        ("fim_ties", 1.0, [1.5, 1.0, -1.5, 0.0]),
        # each keeps its largest: (2, 0, 0, 0) and (0, 0, -1.5, 0)
        ("fim_ties", 0.25, [2.0, 0.0, -1.5, 0.0]),
        ("fim_ta", 1.0, [3.0, 0.0, -1.0, 0.0]),  # summed
    ],
)
def test_two_experts(method: str, density: float, expected: list[float]) -> None:
    models = one_matrix([4.0, -2.0, 1.0, 0.0], [2.0, 2.0, -3.0, 0.0])
    merged = merge(method, models, density=density)
    assert merged.tensors[f"model.layers.0.{Q}"].tolist() == [expected]
    assert [(row["expert"], row["alpha"]) for row in merged.blocks] == [("ft0", 0.5), ("ft1", 0.5)]


def test_parameters_of_each_expert() -> None:
    """0.5 * 2 * (4, 0) and 0.5 * 1 * (2, 2): elected (+, +)."""
    models = one_matrix([4.0, -2.0], [2.0, 2.0])
    merged = merge("fim_ties", models, density=[0.5, 1.0], coefficient=[2.0, 1.0])
    assert merged.tensors[f"model.layers.0.{Q}"].tolist() == [[2.5, 1.0]]
    assert merged.reports[f"model.layers.0.{Q}"] == {
        "coefficient": [1.0, 0.5],
        "kept": [1, 2],
        "norm_ratio": None,  # a base of zeros has no norm to match
        "rescaled": False,
    }


# --- Against the naive reference --------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"density": 0.37},
        {"density": 0.0},
        {"density": 1.0},
        {"importance": "fim"},
        {"importance": "norm"},
        {"theta": 0.3},
        {"theta": 0.0},
        {"gate_factor": 0.0},
        {"gate_factor": 1.3},
        {"norm_tolerance": 0.0},
        {"norm_tolerance": 0.01, "density": 1.0},
        {"norm_tolerance": None},
    ],
    ids=str,
)
def test_fim_ties_equals_the_naive_reference(options: dict[str, Any], experts: int) -> None:
    models = make_models(experts)
    ours = {key: "off" if value is None else value for key, value in options.items()}
    truth = naive_fim(models.base, models.experts, models.fisher, **options)
    assert_like_naive(merge("fim_ties", models, **ours), truth, trims=True)


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("options", [{}, {"theta": 0.2}, {"importance": "fim"}, {"importance": "norm"}], ids=str)
def test_fim_ta_equals_the_naive_reference(options: dict[str, Any], experts: int) -> None:
    models = make_models(experts, dtype=torch.float32)
    truth = naive_fim(models.base, models.experts, models.fisher, **TA, **options)
    assert_like_naive(merge("fim_ta", models, **options), truth, trims=False)


@pytest.mark.parametrize("method", ["fim_ties", "fim_ta"])
def test_a_common_factor_of_the_fisher_changes_nothing(method: str) -> None:
    models = make_models(2)
    scaled = Models(models.base, models.experts, {name: 64 * f for name, f in models.fisher.items()})
    a, b = merge(method, models), merge(method, scaled)
    assert len(set(a.alphas)) > 3 and a.alphas == pytest.approx(b.alphas, rel=1e-12)
    close(b.tensors, a.tensors)


# --- Degenerate models ------------------------------------------------------------------------------------------------


ALL_OPTIONS = [
    {},
    {"importance": "quadratic", "trim": "quadratic"},
    {"importance": "fim", "granularity": "tensor"},
    {"importance": "norm", "trim": "magnitude", "trim_scope": "block"},
    {"theta": 5.0, "norm_tolerance": 0.0, "other": "mean"},
]


def changed(models: Models, what: str, block: int | None) -> Models:
    """The models with the Fisher, the task vectors or the base zero in one block, or (None) everywhere."""
    named = {name for name in models.base if block is None or block_of(name) == block}
    zero = {name: torch.zeros_like(models.base[name]) for name in named}
    if what == "fisher":
        return Models(models.base, models.experts, models.fisher | zero)
    if what == "task vector":
        same = {name: models.base[name] for name in named}
        return Models(models.base, [expert | same for expert in models.experts], models.fisher)
    return Models(models.base | zero, models.experts, models.fisher)


@pytest.mark.parametrize("method", ["fim_ties", "fim_ta"])
@pytest.mark.parametrize("options", ALL_OPTIONS, ids=str)
@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("block", [0, 1, None])
@pytest.mark.parametrize("what", ["fisher", "task vector", "base"])
def test_zeros_give_a_finite_result(
    method: str, options: dict[str, Any], experts: int, block: int | None, what: str
) -> None:
    models = changed(make_models(experts), what, block)
    merged = merge(method, models, **options)
    assert all(tensor.isfinite().all() for tensor in merged.tensors.values())
    assert all(0.5 <= alpha <= 1 for alpha in merged.alphas)
    if what == "task vector":
        for name in models.base:
            if block is None or block_of(name) == block:
                assert torch.equal(merged.tensors[name], models.base[name].float()), name


@pytest.mark.parametrize("what", ["fisher", "task vector"])
@pytest.mark.parametrize("experts", [1, 2])
def test_a_block_without_importance_counts_as_the_least_important(what: str, experts: int) -> None:
    models = changed(make_models(experts), what, 1)
    merged = merge("fim_ties", models)
    assert_like_naive(merged, naive_fim(models.base, models.experts, models.fisher), trims=True)
    for i in range(experts):
        rows = merged.blocks[3 * i : 3 * i + 3]
        assert rows[1]["score"] is None and rows[1]["alpha"] == LEAST
        assert sorted(row["alpha"] for row in rows) == [MOST, LEAST, LEAST]


@pytest.mark.parametrize("what", ["fisher", "task vector"])
def test_no_block_has_any_importance(what: str) -> None:
    merged = merge("fim_ties", changed(make_models(1), what, None))
    assert [(row["score"], row["alpha"]) for row in merged.blocks] == [(None, 0.5)] * 3


@pytest.mark.parametrize("theta", ["adaptive", 3.0])
def test_a_single_block_and_equal_scores(theta: float | str) -> None:
    assert merge("fim_ta", make_models(1, blocks=1), theta=theta).alphas == [0.5]
    models = make_models(1, blocks=1)
    for tensors in (models.base, *models.experts, models.fisher):
        tensors.update({name.replace("layers.0.", "layers.1."): tensor for name, tensor in tensors.items()})
    merged = merge("fim_ta", models, theta=theta)
    assert merged.alphas == [0.5, 0.5]


def test_blocks_are_listed_by_number() -> None:
    merged = merge("fim_ta", make_models(2, blocks=11))
    assert [row["block"] for row in merged.blocks] == [*range(11), *range(11)]


def test_there_are_no_blocks() -> None:
    with pytest.raises(CheckpointError, match="no decoder blocks"):
        resolve("fim_ties").method.prepared({}, None)


# --- Parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fim_ties", "fim_ta"])
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"densty": 0.2}, "has no parameter 'densty': did you mean 'density'"),
        ({"density": 1.5}, "model ft0: .*density.*between 0 and 1.*1.5"),
        ({"density": -0.1}, "model ft0: .*density.*between 0 and 1"),
        ({"density": "most"}, "model ft0: .*density.*'most'"),
        ({"theta": -1}, "theta.*negative"),
        ({"theta": "steep"}, "theta.*'steep'"),
        ({"norm_tolerance": -0.05}, "norm_tolerance.*negative"),
        ({"gate_factor": -1}, "gate_factor: must be at least 0"),
        ({"importance": "hessian"}, "importance.*'product', 'fim', 'norm' or 'quadratic'"),
        ({"trim": "random"}, "trim.*'random'"),
        ({"trim_scope": "model"}, "trim_scope.*'model'"),
        ({"granularity": "row"}, "granularity.*'row'"),
        ({"other": "expert"}, "other.*'expert'"),
        ({"other": math.inf}, "other.*finite"),
    ],
)
def test_bad_parameters(method: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=f"method {method}.*{message}"):
        resolve(method, **parameters)


def test_numbers_may_be_written_as_text() -> None:
    parameters = resolve("fim_ties", theta="0.3", other="0.5", norm_tolerance="0.1", density="0.4")
    assert [parameters.parameters[key] for key in ("theta", "other", "norm_tolerance")] == [0.3, 0.5, 0.1]
    assert parameters.experts[0]["density"] == 0.4


def test_defaults_of_fim_ta() -> None:
    parameters = resolve("fim_ta").parameters
    assert (parameters["trim"], parameters["gate_factor"], parameters["norm_tolerance"]) == ("none", 1.0, "off")
