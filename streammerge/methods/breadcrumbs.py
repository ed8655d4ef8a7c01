"""Model Breadcrumbs: drop the outliers and the small entries of the task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from streammerge.methods.api import Pass, Results, RowBlock, Unit
from streammerge.methods.selection import kept_count, top_k_passes
from streammerge.methods.sparse import Sparse, SparseExpert, SparseMethod, SparseParameters

if TYPE_CHECKING:
    from torch import Tensor


class BreadcrumbsParameters(SparseParameters):
    gamma: float = Field(0.01, ge=0, le=1, description="fraction of each tensor's largest entries that is dropped")


class Breadcrumbs(SparseMethod):
    """Drop the largest entries of each task vector, keep the next largest, and sum:

        d_i = theta_i - theta_0 without its round(gamma * n) largest entries and, of the others, all but the
            round(density_i * n) largest
        theta = theta_0 + scale * sum_i c_i d_i        (over sum_i c_i where normalize is on)

    Convention: per tensor, without a rescale. Exactly that many are dropped and kept, equal magnitudes in flat-index
    order (mergekit: both numbers round down); where both do not fit, fewer outliers are dropped. A tensor too small
    for an outlier to drop keeps its round(density * n) largest; mergekit up to 0.1.4 zeroed the whole task vector of
    such a tensor, by an empty slice (int(gamma * n) = 0: below 100 elements, or gamma 0). The default density is that
    of `ties` here; mergekit's, 1, drops nothing.
    Reference: Davari and Belilovsky, Model Breadcrumbs, arXiv 2312.06795.

    Raises:
        RecipeError: the coefficients sum to zero where they should be normalised.
    """

    Parameters = BreadcrumbsParameters
    Expert = SparseExpert
    summary = "drop outliers and small entries, sum"
    reference = "arXiv 2312.06795"
    elects = False

    parameters: BreadcrumbsParameters

    def passes(self, unit: Unit) -> Sequence[Pass]:
        shares = []
        for expert in self.experts:
            kept = kept_count(expert.density, unit.numel)
            outliers = min(kept_count(self.parameters.gamma, unit.numel), unit.numel - kept)
            shares += [count / max(unit.numel, 1) for count in (outliers, outliers + kept)]
        return top_k_passes(lambda block: [v for vector in block.task_vectors for v in [vector] * 2], shares)

    def sparsify(self, expert: int, vector: Tensor, block: RowBlock, results: Results) -> Sparse:
        outliers, largest = results["selection"][2 * expert : 2 * expert + 2]
        mask = largest.mask(vector, block.offset).sub_(outliers.mask(vector, block.offset))  # of which they are a part
        return mask, vector * mask


class BreadcrumbsTies(Breadcrumbs):
    """The trim of `breadcrumbs`, then the sign election and disjoint merge of `ties`:

        y_i = c_i d_i;   S = sign(sum_i y_i);   theta = theta_0 + scale * sum_{i: sign(y_i) = S} y_i

    Convention: as `breadcrumbs` and, for the election, as `ties`: zero counts as +, what is dropped never agrees.
    `normalize` divides by the sum of the agreeing coefficients; it is off, as in mergekit.
    Reference: Davari and Belilovsky, Model Breadcrumbs, arXiv 2312.06795; mergekit's combination with TIES.
    """

    summary = "drop outliers and small entries, elect sign, disjoint sum"
    elects = True
