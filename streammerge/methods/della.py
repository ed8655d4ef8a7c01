"""DELLA: drop entries of the task vectors at random, the smaller the likelier."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from streammerge.methods.api import Results, RowBlock
from streammerge.methods.indicators import below, one_for_zero
from streammerge.methods.sparse import RandomExpert, RandomlySparseMethod, RandomParameters, Sparse
from streammerge.schema import Strict

if TYPE_CHECKING:
    from torch import Tensor


class DellaLinearParameters(RandomParameters):
    epsilon: float = Field(
        0.15,
        ge=0,
        le=0.5,
        description="della: keep probabilities are density - epsilon to + epsilon; ram: smaller changes count as none",
    )


class DellaParameters(DellaLinearParameters):
    normalize: bool = Field(True, description="divide by the coefficients that agree; off: plain sum")


class Della(RandomlySparseMethod):
    """Keep entries with a probability that grows with their rank in the row, divide by it, then merge as `ties`:

        p_ij = density_i - epsilon + 2 epsilon r_ij / (c - 1),   r_ij = 0 .. c - 1 the rank of |d_ij| in its row of c
        d_ij <- m_ij d_ij / p_ij,   m_ij ~ Bernoulli(p_ij);   y_i = c_i d_i;   S = sign(sum_i y_i)
        theta = theta_0 + scale * sum_{i: sign(y_i) = S} y_i / sum_{i: sign(y_i) = S} c_i

    Convention: p is the probability of keeping, epsilon half the width of its window, as in mergekit; where the window
    would leave [0, 1] epsilon is cut to what fits, so that densities 0 and 1 keep nothing and everything (mergekit:
    an error below 1). A row is what shares all indices but the last, also in stacks of matrices (mergekit ranks those
    along the second); a vector is one row, a row of one entry has p = density. Equal magnitudes rank by their
    column, so that the ranks are the same everywhere. `rescale` density is the paper's 1 / p_ij; mergekit restores the
    L1 norm of each tensor instead: `l1`. Draws as in `dare_linear`. The default density 0.7 is that of `dare_linear`.
    Reference: Deep et al., DELLA-Merging, arXiv 2406.11617.
    """

    Parameters: ClassVar[type[Strict]] = DellaParameters
    Expert = RandomExpert
    summary = "drop at random by rank, rescale, elect sign, disjoint mean"
    reference = "arXiv 2406.11617"
    elects = True

    parameters: DellaLinearParameters

    def sparsify(self, expert: int, vector: Tensor, block: RowBlock, results: Results) -> Sparse:
        keep = keep_probabilities(vector, self.experts[expert].density, self.parameters.epsilon)
        mask = below(self.draws(expert, block), keep)
        sparse = vector * mask
        if self.parameters.rescale == "density":
            sparse = sparse / one_for_zero(keep)
        return mask, sparse


class DellaLinear(Della):
    """The random drop of `della`, then a plain sum: theta = theta_0 + scale * sum_i c_i d_i.

    Convention: as `della`; no sign is elected, and `normalize` (off, as in mergekit) divides by the sum of the
    coefficients.
    Reference: Deep et al., DELLA-Merging, arXiv 2406.11617.

    Raises:
        RecipeError: the coefficients sum to zero where they should be normalised.
    """

    Parameters = DellaLinearParameters
    summary = "drop at random by rank, rescale, sum"
    elects = False


def keep_probabilities(vector: Tensor, density: float, epsilon: float) -> Tensor:
    """p [r, c], float32: by rank in the row, from density - epsilon for the smallest to density + epsilon."""
    import torch

    columns = vector.shape[-1]
    epsilon = min(epsilon, density, 1 - density)
    if columns < 2 or epsilon == 0:
        return torch.full(vector.shape, density, dtype=torch.float32, device=vector.device)
    bits = vector.abs().view(torch.int32 if vector.dtype == torch.float32 else torch.int64)
    order = bits.argsort(dim=-1, stable=True)  # non-negative floats order like their bit patterns, which sort faster
    places = torch.arange(columns, dtype=torch.float32, device=vector.device)
    ranks = torch.empty(vector.shape, dtype=torch.float32, device=vector.device)
    ranks.scatter_(-1, order, places.expand(vector.shape))
    return ranks.mul_(2 * epsilon / (columns - 1)).add_(density - epsilon)
