"""Where the tools differ on purpose: each difference is shown on the smallest models that have it.

A check merges with both and measures; it raises `Changed` where mergekit, or ours, does not behave as stated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from parity import check_angles, check_entries, check_rest
from parity.bench import Bench


@dataclass(frozen=True)
class Difference:
    """One difference; `check` returns what was measured."""

    method: str
    theirs: str
    ours: str
    check: Callable[[Bench], str]


_FLOAT32 = "float32 output whatever `dtype` says"

DIFFERENCES = [
    Difference(
        "karcher",
        "averages a base model in as one more",
        "so too, by `base_coefficient`; 0 leaves it out",
        check_angles.karcher_base,
    ),
    Difference("karcher", "ignores weights", "takes them", check_angles.karcher_weights),
    Difference(
        "karcher",
        "in bfloat16 a cosine above 0.998 is 1: no iteration, the normalised mean",
        "iterates in float64",
        check_angles.karcher_bfloat16,
    ),
    Difference("karcher", "stops at a step of 1e-5 rad", "at 1e-12", check_angles.karcher_tolerance),
    Difference(
        "slerp", "linear where the cosine is above 0.9995", "spherical down to 0 rad", check_angles.slerp_linear
    ),
    Difference("nuslerp", "weights that sum to 0 count as equal", "refused", check_angles.nuslerp_zero_sum),
    Difference(
        "multislerp",
        "refuses three or more models whose mean vanishes",
        "takes the linear mean",
        check_angles.multislerp_antipodal,
    ),
    Difference(
        "model_stock",
        "a negative cosine leads away from the models",
        "gives the base",
        check_angles.model_stock_negative,
    ),
    Difference(
        "model_stock", "the lengths' product counts as 1e-6 or more", "as it is", check_angles.model_stock_floor
    ),
    Difference("ties", "k rounds down", "to the nearest", check_entries.ties_rounding),
    Difference("ties", "k is at least 1", "may be 0", check_entries.ties_tiny),
    Difference(
        "dare_linear", "restores the L1 norm", "divides by the density, or `rescale: l1`", check_entries.dare_rescale
    ),
    Difference(
        "della_linear", "ranks in stacks of matrices along the second axis", "along the last", check_entries.della_rows
    ),
    Difference("della_linear", "fails on tensors of one column", "p = density", check_entries.della_column),
    Difference(
        "della", "refuses a window of probabilities that leaves (0, 1)", "narrows it", check_entries.della_window
    ),
    Difference(
        "sce", "energies below 1e-6 in all: equal coefficients", "the energies' shares", check_entries.sce_uniform
    ),
    Difference("arcee_fusion", "quartiles of a random million entries", "of all", check_entries.arcee_sampling),
    Difference(
        "arcee_fusion", "quartiles are the lower neighbour", "linear between neighbours", check_entries.arcee_quartiles
    ),
    Difference("arcee_fusion", "divergences in float32", "in float64", check_entries.arcee_float32),
    Difference("arcee_fusion", _FLOAT32, "the base's dtype", check_rest.output_dtype("arcee_fusion", 1)),
    Difference("ramplus_tl", _FLOAT32, "the base's dtype", check_rest.output_dtype("ramplus_tl", 2)),
    Difference(
        "linear", "refuses a base model without a weight", "its weight is `base_coefficient`, 1", check_rest.linear_base
    ),
    Difference("nearswap", "differences count as 1e-6 or more", "as they are", check_rest.nearswap_floor),
    Difference("task_arithmetic", "computes in `dtype`", "in float32", check_rest.compute_dtype),
    Difference("ties", "ignores unknown parameters, as every method", "refuses them", check_rest.unknown_parameter),
]

GONE = [
    Difference(
        "breadcrumbs",
        "zeroed the task vectors of tensors without an outlier to drop",
        "never did",
        check_rest.breadcrumbs_small,
    ),
    Difference("ties", "refused tensors of which it would keep nothing", "never did", check_entries.ties_tiny),
    Difference("model_stock", "divided by zero at cosine -1/(N - 1)", "never did", check_rest.model_stock_singular),
    Difference("sce", "added a dimension where nothing was selected", "never did", check_rest.sce_frozen),
]
