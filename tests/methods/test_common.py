"""What every method must pass: each row of METHODS is tested unasked."""

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.driver import Merged, Models, in_order, make_models, merge, resolve
from torch import Tensor

from streammerge.errors import RecipeError
from streammerge.methods import METHODS, Method, api

# What a method needs, besides density 1 and the coefficients, to return the model that all its inputs are:
# coefficients that sum to 1 and are exact in binary.
SAME_MODELS: dict[str, dict[str, Any]] = {"linear": {"base_coefficient": 0.5}, "passthrough": {"coefficient": 1.0}}
# What a method needs for the order of the experts not to matter: a random draw belongs to a place in the recipe.
IN_ANY_ORDER: dict[str, dict[str, Any]] = {
    name: {"density": 1.0} for name in ("dare_linear", "dare_ties", "della", "della_linear")
}
SHAPES = {
    "model.layers.1.mlp.experts.gate_up_proj": (2, 10, 6),
    "model.layers.1.mlp.experts.down_proj": (2, 6, 5),
    "model.layers.1.scale": (),
    "model.layers.2.one": (1, 1),
}

every_method = pytest.mark.parametrize("name", METHODS)


def parameters_at_home(name: str, **values: Any) -> dict[str, Any]:
    """Those of the values that are parameters of the method."""
    cls = METHODS[name]
    return {
        key: value for key, value in values.items() if key in {**cls.Parameters.model_fields, **cls.Expert.model_fields}
    }


def mixed_models(experts: int) -> Models:
    """Matrices, vectors, a stack of matrices and a scalar; every input in another dtype."""
    models = make_models(experts, extra=SHAPES)
    dtypes = [torch.bfloat16, torch.float32, torch.float16]
    tuned = [{n: t.to(dtypes[i % 3]) for n, t in expert.items()} for i, expert in enumerate(models.experts)]
    return replace(models, experts=tuned)


def allowed(name: str, experts: int) -> int:
    """The number of fine-tuned models nearest to this one that the method merges."""
    cls = METHODS[name]
    return max(cls.fewest_experts, min(experts, cls.most_experts or experts))


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def assert_same(a: Merged, b: Merged) -> None:
    """The same bits in every tensor."""
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        assert tensor.dtype == b.tensors[name].dtype and torch.equal(bits(tensor), bits(b.tensors[name])), name


@every_method
@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("elements", [1, 12, 20, 37])
def test_row_blocks_of_any_size(name: str, experts: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 element: one row at a time. The blocks of a run are always cut the same; here they are cut otherwise, which
    may change a float64 sum in its last digit, and that is lost when the result is rounded to float32."""
    models = mixed_models(allowed(name, experts))
    whole = merge(name, models)
    monkeypatch.setattr(api, "TILE_ELEMENTS", elements)
    assert_same(merge(name, models), whole)


@every_method
@pytest.mark.parametrize("wide", [False, True])
def test_shape_and_dtype(name: str, wide: bool) -> None:
    """The driver asserts the same of every row block: the base's rows, in the dtype it computes in."""
    models = mixed_models(allowed(name, 2))
    if wide:
        models.experts[0].update({key: tensor.double() for key, tensor in models.experts[0].items()})
    merged = merge(name, models)
    method = resolve(name, len(models.experts)).method
    assert list(merged.tensors) == list(models.base)
    assert {key: tensor.shape for key, tensor in merged.tensors.items()} == {k: t.shape for k, t in models.base.items()}
    assert any(tensor.dtype == torch.float64 for tensor in merged.tensors.values()) is wide
    assert all(tensor.isfinite().all() for tensor in merged.tensors.values())
    changed = [
        key for key, tensor in merged.tensors.items() if not torch.equal(tensor, models.base[key].to(tensor.dtype))
    ]
    assert set(changed) <= set(merged.reports), "a tensor that is not merged was changed"
    assert changed, f"{name} with its default parameters returns the base"
    assert isinstance(method, METHODS[name])


@every_method
def test_same_inputs_same_bits(name: str) -> None:
    first, second = (merge(name, mixed_models(allowed(name, 2))) for _ in range(2))
    assert_same(first, second)
    assert (first.reports, first.blocks) == (second.reports, second.blocks)


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equal_models_return_themselves(name: str, dtype: torch.dtype) -> None:
    models = make_models(allowed(name, 2), dtype=dtype, extra=SHAPES)
    models = replace(models, experts=[models.base] * len(models.experts))
    parameters = parameters_at_home(name, density=1.0, coefficient=0.25) | SAME_MODELS.get(name, {})
    merged = merge(name, models, **parameters)
    for key, tensor in merged.tensors.items():
        if not torch.equal(bits(tensor), bits(models.base[key].to(tensor.dtype))):
            pytest.fail(
                f"{name} with {parameters} changes {key!r} although all models are equal; if it needs other parameters "
                "to return them, add a line to SAME_MODELS"
            )


@every_method
def test_order_of_experts_matters_only_by_rounding(name: str) -> None:
    models = mixed_models(allowed(name, 3))
    parameters = IN_ANY_ORDER.get(name, {})
    merged = merge(name, models, **parameters)
    first, *others = range(len(models.experts))
    for order in ([*others, first], [*reversed(others), first]):
        turned = merge(name, in_order(models, order), **parameters)
        for key, tensor in merged.tensors.items():
            torch.testing.assert_close(
                turned.tensors[key], tensor, rtol=1e-6, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
            )


@every_method
@pytest.mark.parametrize("experts", [1, 2])
def test_inputs_are_not_changed(name: str, experts: int) -> None:
    """In float32 the row blocks are views of the inputs, as they are of the engine's read buffer."""
    models = make_models(allowed(name, experts), dtype=torch.float32, extra=SHAPES)
    inputs = [models.base, *models.experts, models.fisher]
    before = [{key: tensor.clone() for key, tensor in tensors.items()} for tensors in inputs]
    merge(name, models)
    for tensors, copies in zip(inputs, before, strict=True):
        for key, tensor in tensors.items():
            assert torch.equal(bits(tensor), bits(copies[key])), key


@every_method
def test_reports_are_plain_and_complete(name: str) -> None:
    models = mixed_models(allowed(name, 2))
    merged = merge(name, models)
    for key, entry in merged.reports.items():
        assert len(entry["coefficient"]) == len(models.experts), key
        for values in entry.values():
            for value in values if isinstance(values, list) else [values]:
                assert value is None or isinstance(value, (bool, int, float, str)), f"{key}: {values!r}"


@every_method
def test_documented(name: str) -> None:
    cls = METHODS[name]
    assert issubclass(cls, Method)
    assert cls.summary and cls.reference
    documentation = cls.__dict__["__doc__"]
    assert "Convention:" in documentation and "Reference:" in documentation
    assert cls.reference.split()[-1] in documentation.split("Reference:")[1]
    for key, field in {**cls.Parameters.model_fields, **cls.Expert.model_fields}.items():
        assert field.description, f"{key} has no description"
    assert not set(cls.Parameters.model_fields) & set(cls.Expert.model_fields), (
        "resolve_method could not tell them apart"
    )


@every_method
def test_has_an_example_by_hand(name: str) -> None:
    """A function `test_by_hand...`, its name in it, in the test file of the module that the method is in."""
    path = Path(__file__).parent / f"test_{METHODS[name].__module__.rpartition('.')[2]}.py"
    assert path.is_file(), f"there is no {path.name}"
    examples = [
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_by_hand")
    ]
    words = {node.value for example in examples for node in ast.walk(example) if isinstance(node, ast.Constant)}
    assert name in words, f"{path.name} needs a test_by_hand that merges by {name!r} and has worked-out numbers"


@every_method
def test_bad_parameters(name: str) -> None:
    cls = METHODS[name]
    for key in (*cls.Parameters.model_fields, *cls.Expert.model_fields):
        with pytest.raises(RecipeError, match=rf"method {name}.*'{key}x'.*did you mean '{key}'"):
            resolve(name, **{key + "x": 1})
        with pytest.raises(RecipeError, match=rf"method {name}.*\b{key}\b"):
            resolve(name, **{key: {"not": "a value"}})
    for key in cls.Expert.model_fields:
        with pytest.raises(RecipeError, match=rf"method {name}: 3 values of {key} for 2 fine-tuned models"):
            resolve(name, experts=2, **{key: [0.5, 0.5, 0.5]})
        with pytest.raises(RecipeError, match=rf"method {name}.*ft1.*\b{key}\b"):
            resolve(name, experts=2, **{key: [0.5, float("nan")]})


@pytest.mark.parametrize("name", ["acm_ta", "acm_ties", "sens"])
@pytest.mark.parametrize("experts", [1, 2])
def test_blocks_of_methods_that_have_a_coefficient_for_each(name: str, experts: int) -> None:
    """The table says of every block and model what its tensors were merged with."""
    merged = merge(name, make_models(experts))
    assert [row["block"] for row in merged.blocks] == [0, 1, 2] * experts
    for number, row in enumerate(merged.blocks):
        report = merged.reports[f"model.layers.{row['block']}.mlp.down_proj.weight"]
        assert row["alpha"] == pytest.approx(report["coefficient"][number // 3])
        assert row.get("expert") == (f"ft{number // 3}" if experts > 1 else None)
