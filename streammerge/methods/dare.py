"""DARE: drop entries of the task vectors at random and rescale the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.methods.api import Results, RowBlock
from streammerge.methods.indicators import below
from streammerge.methods.sparse import RandomlySparseMethod, RandomParameters, Sparse

if TYPE_CHECKING:
    from torch import Tensor


class DareLinear(RandomlySparseMethod):
    """Keep each entry of the task vectors with probability density, and divide it by that:

        d_i = m_i * (theta_i - theta_0) / density_i,   m_i ~ Bernoulli(density_i)
        theta = theta_0 + scale * sum_i c_i d_i        (over sum_i c_i where normalize is on)

    Convention: `rescale` density is the paper's 1 / (1 - p) for a drop rate p: the expectation is the task vector, and
    no pass is needed. mergekit restores the L1 norm of each tensor instead: `l1`, 1 where a norm is zero or not
    finite. Draws are a hash of (random_seed, tensor, model's number, element), so they do not depend on the row
    blocks, and a model keeps its draws only in its place in the recipe. The default density 0.7 is that of
    long-to-short merging (p = 0.3, arXiv 2503.20641, table 7); mergekit's, 1, drops nothing.
    Reference: Yu et al., Language models are super Mario, arXiv 2311.03099.

    Raises:
        RecipeError: the coefficients sum to zero where they should be normalised.
    """

    Parameters = RandomParameters
    summary = "drop at random, rescale, sum"
    reference = "arXiv 2311.03099"
    elects = False

    def sparsify(self, expert: int, vector: Tensor, block: RowBlock, results: Results) -> Sparse:
        mask = below(self.draws(expert, block), self.experts[expert].density)
        return mask, vector * mask

    def factors(self, results: Results) -> list[float] | None:
        if self.parameters.rescale == "density":
            return [1 / expert.density if expert.density else 1.0 for expert in self.experts]
        return super().factors(results)


class DareTies(DareLinear):
    """The random drop of `dare_linear`, then the sign election and disjoint merge of `ties`:

        y_i = c_i d_i;   S = sign(sum_i y_i);   theta = theta_0 + scale * sum_{i: sign(y_i) = S} y_i

    Convention: as `dare_linear` and, for the election, as `ties`: zero counts as +, what is dropped never agrees.
    `normalize` divides by the sum of the agreeing coefficients; it is off, as in mergekit.
    Reference: Yu et al., Language models are super Mario, arXiv 2311.03099.
    """

    summary = "drop at random, rescale, elect sign, disjoint sum"
    elects = True
