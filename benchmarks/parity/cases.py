"""What is compared: for every method its parameters in both tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from parity.bench import Role
from parity.unsettled import Unsettled, importance_quartiles, magnitude_ties, variance_ties

NO_PEER = {
    "fim_ties": "mergekit has no Fisher",
    "fim_ta": "mergekit has no Fisher",
    "fisher_average": "mergekit has no Fisher",
    "sens": "mergekit takes no gradients",
    "acm_ties": "mergekit takes no activations",
    "acm_ta": "mergekit takes no activations",
    "regmean": "mergekit takes no activations",
}


@dataclass(frozen=True)
class Case:
    """One method with one set of parameters.

    Attributes:
        ours, theirs: the parameters in each tool; `each`: mergekit's per model.
        models: near (task vectors of rms 0.002), far (0.05), or grid (near, with the few values bfloat16 has).
        role: of the base model in mergekit.
        unsettled: the positions not to be compared.
    """

    method: str
    variant: str = ""
    ours: Mapping[str, Any] = field(default_factory=dict)
    theirs: Mapping[str, Any] = field(default_factory=dict)
    each: Mapping[str, Sequence[float]] = field(default_factory=dict)
    experts: int = 2
    models: str = "near"
    role: Role = "base"
    unsettled: Unsettled | None = None


WEIGHTS = [0.3, 0.9, 0.5]
TWO = WEIGHTS[:2]
ROWS = {"nuslerp_flatten": False}
COLUMNS = {"nuslerp_flatten": False, "nuslerp_row_wise": True}
HALF, TL = {"select_topk": 0.5}, {"r": 0.5, "alpha": 2.0, "epsilon": 1e-4}
KARCHER = {"max_iter": 10, "tol": 1e-5}  # mergekit's defaults
DENSITIES = [0.5, 0.25, 0.25]  # of these, and of this gamma, every tensor here has a whole number of elements
GAMMA = 1 / 32


def _nuslerp() -> list[Case]:
    cases = []
    for text, how in (("flat", {}), ("rows", ROWS), ("columns", COLUMNS)):
        weights = {"coefficient": TWO, **how}
        cases += [
            Case("nuslerp", f"{text}, task vectors", weights, how, {"weight": TWO}),
            Case("nuslerp", f"{text}, models", {**weights, "task_vectors": False}, how, {"weight": TWO}, role="none"),
        ]
    pair = {"base_coefficient": 0.3, "coefficient": 0.9}
    return [*cases, Case("nuslerp", "flat, base and model", pair, {}, {"weight": TWO}, 1, role="point")]


def _trimmed(method: str, variant: str, experts: int, models: str = "near", gamma: float = 0.0, **more: Any) -> Case:
    each = {"weight": WEIGHTS[:experts], "density": DENSITIES[:experts]}
    outliers = {"gamma": gamma} if gamma else {}
    ours = {"coefficient": WEIGHTS[:experts], "density": DENSITIES[:experts], **outliers, **more}
    theirs = {**outliers, **{{"scale": "lambda"}.get(key, key): value for key, value in more.items()}}
    ties = magnitude_ties(DENSITIES[:experts], gamma)
    return Case(method, variant, ours, theirs, each, experts, models, unsettled=ties)


def _dense(method: str) -> Case:
    """A method that drops at random, told to drop nothing."""
    ours = {"coefficient": WEIGHTS, "density": 1.0, "rescale": "l1"}
    return Case(method, "density 1", ours, {}, {"weight": WEIGHTS, "density": [1.0] * 3}, 3)


CASES = [
    Case("linear", "", {"base_coefficient": 0, "coefficient": WEIGHTS}, {}, {"weight": WEIGHTS}, 3, role="none"),
    Case(
        "linear",
        "with the base, not normalised",
        {"base_coefficient": 0.2, "coefficient": TWO, "normalize": False},
        {"normalize": False},
        {"weight": [0.2, *TWO]},
        role="point",
    ),
    Case("slerp", "", {"t": 0.3}, {"t": 0.3}, experts=1, models="far"),
    *_nuslerp(),
    Case("multislerp", "task vectors", {"coefficient": WEIGHTS}, {}, {"weight": WEIGHTS}, 3),
    Case(
        "multislerp", "models", {"coefficient": WEIGHTS, "task_vectors": False}, {}, {"weight": WEIGHTS}, 3, role="none"
    ),
    Case("karcher", "", {"base_coefficient": 0, **KARCHER}, KARCHER, experts=3, role="none"),
    Case("karcher", "", {"base_coefficient": 0, **KARCHER}, KARCHER, experts=3, models="far", role="none"),
    Case("karcher", "with the base", KARCHER, KARCHER, role="point"),
    Case("task_arithmetic", "", {"coefficient": WEIGHTS}, {}, {"weight": WEIGHTS}, 3),
    _trimmed("ties", "", 3),
    _trimmed("ties", "not normalised, scaled", 2, normalize=False, scale=0.7),
    _trimmed("ties", "", 3, "grid"),
    _trimmed("breadcrumbs", "", 2, gamma=GAMMA),
    _trimmed("breadcrumbs", "", 2, "grid", GAMMA),
    _trimmed("breadcrumbs_ties", "", 3, gamma=GAMMA),
    Case("model_stock", "", experts=3),
    Case("model_stock", "filter-wise", {"filter_wise": True}, {"filter_wise": True}, experts=3),
    Case("nearswap", "", {"t": 0.001}, {"t": 0.001}, experts=1),
    Case("passthrough", "", {"coefficient": 1.7}, {}, {"scale": [1.7]}, 1, role="none"),
    Case("sce", "", experts=3),
    Case("sce", "half selected", HALF, HALF, experts=3, unsettled=variance_ties(0.5)),
    Case("ram", "", experts=3),
    Case("ramplus_tl", "", experts=3),
    Case("ramplus_tl", "larger factors", TL, TL, experts=3),
    Case("arcee_fusion", "", experts=1, unsettled=importance_quartiles),
    *(_dense(method) for method in ("dare_linear", "dare_ties", "della_linear", "della")),
]
