"""Spherical linear interpolation between the base and one fine-tuned model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from streammerge.errors import RecipeError
from streammerge.methods.api import Method, ModelFacts, Pass, Results, RowBlock, TensorContext, Unit
from streammerge.methods.gram import ANTIPODAL, Combination, Gram, GramPass, combine, models_of, stored_models_of
from streammerge.schema import Strict

if TYPE_CHECKING:
    from torch import Tensor


class SlerpParameters(Strict):
    t: float = Field(
        0.5, description="slerp: where between the base (0) and the fine-tuned model (1); nearswap: largest change"
    )


class SlerpExpert(Strict):
    """A fine-tuned model has no parameters of its own here."""


class Slerp(Method):
    """Spherical interpolation between the base theta_0 and one fine-tuned model theta_1, w the angle between them:

        theta = sin((1 - t) w) / sin w * theta_0 + sin(t w) / sin w * theta_1

    Convention: as in mergekit a tensor is one vector, and the vectors themselves are combined, not their directions,
    so norms are interpolated too. mergekit interpolates linearly where |cos w| > 0.9995, w < 0.032 rad, which is where
    most fine-tunes lie; here the angle comes from the distance, in float64, and the formula holds down to 0 rad.
    Linear, (1 - t) theta_0 + t theta_1, only where there is no angle to speak of: a zero tensor, a tensor of one
    element, or within 0.001 rad of opposite directions; the report then has no `angle`. `t` is 0.5 unless given
    (mergekit: must be given).
    Reference: Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985, doi 10.1145/325165.325242

    Raises:
        RecipeError: more than one fine-tuned model.
    """

    Parameters = SlerpParameters
    Expert = SlerpExpert
    most_experts = 1
    summary = "spherical interpolation between the base and one model"
    reference = "doi 10.1145/325165.325242"

    parameters: SlerpParameters

    def __init__(self, parameters: SlerpParameters, experts: Sequence[SlerpExpert], model: ModelFacts) -> None:
        super().__init__(parameters, experts, model)
        if len(experts) != 1:
            raise RecipeError(
                f"method slerp merges the base with one fine-tuned model, not {len(experts)}: "
                "choose nuslerp, multislerp or karcher"
            )

    def passes(self, unit: Unit) -> Sequence[Pass]:
        return [GramPass(stored_models_of, lambda gram, unit: interpolate(gram, unit, self.parameters.t))]

    def apply(self, block: RowBlock, results: Results) -> Tensor:
        return combine(models_of(block), results["combination"].coefficients)

    def report(self, tensor: TensorContext, results: Results) -> dict[str, Any]:
        base, expert = results["combination"].coefficients
        return {"coefficient": [expert], "base_coefficient": base, **results["combination"].facts}


def interpolate(gram: Gram, unit: Unit, t: float) -> Combination:
    """Slerp of two vectors of which the Gram matrix is known."""
    import torch

    one = torch.ones(1, dtype=torch.float64)
    squares, distance = gram.squares, gram.distances[0][1]
    sums = [one * squares[0], one * squares[1], one * distance]
    first, second, angle = slerp_coefficients(sums, unit.numel, t)
    found = angle.item()
    return Combination((first.item(), second.item()), {"angle": None if math.isnan(found) else found})


def slerp_coefficients(sums: Sequence[Tensor], elements: int, t: float) -> tuple[Tensor, Tensor, Tensor]:
    """What v_0 and v_1 are multiplied by, and the angle between them; for many pairs of vectors at once, in float64.

        |u_0 - u_1|^2 = (|v_0 - v_1|^2 - (|v_0| - |v_1|)^2) / (|v_0| |v_1|);   angle = 2 asin(|u_0 - u_1| / 2)

    Args:
        sums: |v_0|^2, |v_1|^2 and |v_0 - v_1|^2.
        elements: of each vector; one element has no angle.
        t: 0 gives v_0, 1 gives v_1.

    Returns:
        The coefficients, 1 - t and t where there is no angle; and the angle in rad, NaN where there is none.
    """
    square_0, square_1, distance = sums
    norm_0, norm_1 = square_0.sqrt(), square_1.sqrt()
    difference = (square_0 - square_1) / (norm_0 + norm_1)
    chord2 = ((distance - difference.square()) / norm_0 / norm_1).clamp(0.0, 4.0)
    angle = 2 * (chord2.sqrt() / 2).clamp(max=1.0).asin()
    angle = angle.masked_fill((norm_0 == 0) | (norm_1 == 0) | (angle > math.pi - ANTIPODAL), math.nan)
    if elements <= 1:
        angle = angle.fill_(math.nan)
    linear = angle.isnan() | (angle == 0)
    sine = angle.sin()
    first = (((1 - t) * angle).sin() / sine).masked_fill(linear, 1 - t)
    second = ((t * angle).sin() / sine).masked_fill(linear, t)
    return first, second, angle
