"""NearSwap: take over what is near, and less of what is far."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from streammerge.methods.api import Method, Results, RowBlock, TensorContext
from streammerge.methods.scaled import add_scaled
from streammerge.schema import Strict

if TYPE_CHECKING:
    from torch import Tensor


class NearswapParameters(Strict):
    t: float = Field(0.0001, ge=0, description="largest change of an entry; smaller differences are taken over whole")


class Nearswap(Method):
    """Interpolate every entry with a weight of t over the difference, at most 1:

        w_i = min(1, t / |d_i|), d_i = theta_i - theta_0;   theta = theta_0 + sum_i c_i w_i d_i

    Convention: w_i d_i is d_i clamped to [-t, t], and computed so. mergekit takes one model, and differs for t below
    1e-6 only, where it floors |d| at that; it has no default for t, ours is its author's. Here several models add up.
    Reference: alchemonaut, QuartetAnemoi-70B-t0.0001, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001
    """

    Parameters = NearswapParameters
    summary = "task vectors clamped to a small range"
    reference = "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001"

    parameters: NearswapParameters

    def apply(self, block: RowBlock, results: Results) -> Tensor:
        t = self.parameters.t
        vectors = (vector.clamp(-t, t) for vector in block.task_vectors)
        return add_scaled(block.base, vectors, [expert.coefficient for expert in self.experts])

    def report(self, tensor: TensorContext, results: Results) -> dict[str, Any]:
        return {"coefficient": [expert.coefficient for expert in self.experts]}
