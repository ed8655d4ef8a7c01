"""Passthrough: the one model, as it is or scaled."""

import pytest
import torch
from methods.driver import make_models, merge, resolve
from methods.sparse_truth import of

from streammerge.errors import RecipeError


def test_by_hand() -> None:
    models = of([0.25, -3.0, 0.0], base=1.0)
    assert merge("passthrough", models).tensors["w"].tolist() == [1.25, -2.0, 1.0]
    found = merge("passthrough", models, coefficient=0.5)
    assert found.tensors["w"].tolist() == [0.625, -1.0, 0.5]
    assert found.reports["w"] == {"coefficient": [0.5]}


def test_the_models_values() -> None:
    models = make_models(1, extra={"scalar": ()})
    found = merge("passthrough", models).tensors
    assert all(torch.equal(found[key], tensor.float()) for key, tensor in models.experts[0].items())


def test_several_models() -> None:
    with pytest.raises(RecipeError, match="method passthrough takes one fine-tuned model, not 2"):
        resolve("passthrough", experts=2)
