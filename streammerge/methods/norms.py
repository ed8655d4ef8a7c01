"""Output-norm calibration: a merged matrix whose outputs shrank or grew is scaled back to the base's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streammerge.methods.api import Pass, Results, RowBlock, Unit

if TYPE_CHECKING:
    from torch import Tensor

PROBES, PROBE_SEED = 8, 42


@dataclass(frozen=True)
class Calibration:
    """Output norm of a merged matrix over the base's, and the factor that mends it (1: within the tolerance)."""

    ratio: float | None
    scale: float


class OutputNorm(Pass):
    """||W X||_F of the merged and of the base matrix on the same Gaussian probes X [c, 8], in float64:

        ratio = ||W X|| / ||W_0 X||;   scale = 1 / ratio where |ratio - 1| > tolerance, else 1

    In expectation the ratio is that of the Frobenius norms. A zero or non-finite norm is left alone.

    Args:
        merged: row block and results so far -> merged rows, before calibration.
        tolerance: relative change that is left alone.

    Reference: FIM-Merging, arXiv 2603.21705, algorithm 1, step 5.
    """

    name = "norm"

    def __init__(self, merged: Callable[[RowBlock, Results], Tensor], tolerance: float) -> None:
        self.merged, self.tolerance = merged, tolerance

    def start(self, unit: Unit, done: Results) -> Any:
        state: dict[str, Any] = {tensor.name: ([], []) for tensor in unit.tensors}
        return {"done": done, "sums": state, "probes": {}}

    def update(self, state: Any, block: RowBlock) -> None:
        columns = block.tensor.columns
        if columns not in state["probes"]:
            state["probes"][columns] = gaussian_probes(columns).to(block.base.device)
        probes = state["probes"][columns]
        for values, sums in zip(
            (block.base, self.merged(block, state["done"])), state["sums"][block.tensor.name], strict=True
        ):
            sums.append((values.double() @ probes).square().sum().item())

    def finish(self, state: Any) -> dict[str, Calibration]:
        return {name: self._calibration(*sums) for name, sums in state["sums"].items()}

    def _calibration(self, base: list[float], merged: list[float]) -> Calibration:
        before, after = math.sqrt(math.fsum(base)), math.sqrt(math.fsum(merged))
        if not 0 < before < math.inf or not 0 < after < math.inf:
            return Calibration(None, 1.0)
        ratio = after / before
        return Calibration(ratio, before / after if abs(ratio - 1) > self.tolerance else 1.0)


def gaussian_probes(columns: int) -> Tensor:
    """X [columns, 8], standard normal float32 draws of a CPU generator with seed 42, as float64."""
    import torch

    generator = torch.Generator("cpu").manual_seed(PROBE_SEED)
    return torch.randn(columns, PROBES, generator=generator).double()
