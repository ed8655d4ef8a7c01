"""Activation-informed merging: a post-step of any method that spares what the base uses most."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from streammerge.calibration.store import Calibrated, Measurement
from streammerge.fisher.store import FisherRecord
from streammerge.methods.api import Method, Pass, Results, RowBlock, TensorContext, Unit

if TYPE_CHECKING:
    from torch import Tensor


class Aim(Method):
    """Another method's result, drawn back to the base where the base's activations are large:

        A_c = mean over the tokens of a calibration text of |x_c|, x what goes into the module, c its input channel
        theta[:, c] = theta_0[:, c] + (merged[:, c] - theta_0[:, c]) (1 - (1 - omega) A_c / max_c A_c)

    So omega is what is left of the change at the largest channel; 1 changes nothing.

    Convention: for every module of the base with a weight that is not an embedding: linear layers and experts (by the
    tokens that reach them), norms (their weight has one row) and a head of its own. Biases, and experts that no token
    reached, are left as they are merged. The report has `aim`, the mean of the factors. An omega of 0.2 to 0.6 is
    usual; the authors calibrate on 256 texts of 512 tokens.
    Reference: Nobari et al., Activation-informed merging of large language models, arXiv 2502.02421.
    """

    def __init__(self, method: Method, omega: float) -> None:
        super().__init__(method.parameters, method.experts, method.model)
        self.method, self.omega = method, omega
        self.summary, self.reference = f"{method.summary}; AIM", f"{method.reference}, arXiv 2502.02421"  # type: ignore[misc]
        self.fisher_of_experts = method.fisher_of_experts  # type: ignore[misc]

    @property
    def needs_fisher(self) -> bool:
        return self.method.needs_fisher

    @property
    def calibration(self) -> tuple[Measurement, ...]:
        return (*self.method.calibration, "channels")

    def workspace(self, tensor: TensorContext) -> int:
        return self.method.workspace(tensor) + 8 * tensor.columns

    def merges(self, tensor: TensorContext) -> bool:
        return self.method.merges(tensor)

    def unit_of(self, tensor: TensorContext) -> str:
        return self.method.unit_of(tensor)

    def reads_fisher(self, tensor: TensorContext) -> bool:
        return self.method.reads_fisher(tensor)

    def survey(self, tensor: TensorContext) -> Pass | None:
        return self.method.survey(tensor)

    def prepared(
        self, surveys: Mapping[TensorContext, Any], fishers: Sequence[FisherRecord], calibrated: Calibrated | None
    ) -> Self:
        known = copy.copy(self)
        known.method = self.method.prepared(surveys, fishers, calibrated)
        return known

    def passes(self, unit: Unit) -> Sequence[Pass]:
        return self.method.passes(unit)

    def apply(self, block: RowBlock, results: Results) -> Tensor:
        merged = self.method.apply(block, results)
        factors = self._factors(block.tensor, results)
        if factors is None:
            return merged
        return block.base + (merged - block.base) * factors.to(merged.dtype)

    def report(self, tensor: TensorContext, results: Results) -> dict[str, Any]:
        factors = self._factors(tensor, results)
        entry = self.method.report(tensor, results)
        return entry if factors is None else {**entry, "aim": factors.double().mean().item()}

    def block_table(self) -> list[dict[str, Any]]:
        return self.method.block_table()

    def _factors(self, tensor: TensorContext, results: Results) -> Tensor | None:
        """[c], float32: what is left of the change of each column; None: nothing was measured."""
        found = results["calibrated"][tensor.name].get("channels")
        if not found:
            return None
        magnitudes: Tensor = found[0].float()
        most = magnitudes.max()
        return 1 - magnitudes / most * (1 - self.omega) if most > 0 else None
