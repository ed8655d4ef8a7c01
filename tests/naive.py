"""Naive whole-model reference: every formula as printed, all tensors in memory, no streaming.

Written from the papers' formulas alone; it must never import the package that is tested against it.
Statistics run in float64; element-wise work in float32 with multiply and add as separate operations.
"""

import math
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]
BLOCK = re.compile(r"^model\.layers\.(\d+)\.")


# ---- Fisher -----------------------------------------------------------------------------------------------------


def naive_fisher(model: nn.Module, samples: int = 8, length: int = 64, seed: int = 42) -> tuple[Tensors, float]:
    """Diagonal Fisher on uniform random ids: F = (1/N) sum_i (d log p(x_i) / d theta)^2 (FIM-Merging, Alg. 1 step 1).

    One backward per sequence; log p(x_i) is the *sum* over the `length - 1` next tokens.

    Returns:
        F by parameter name (a tied parameter once), float32; and the mean over sequences of -log p(x_i).
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    vocabulary: int = model.config.vocab_size
    ids = torch.randint(0, vocabulary, (samples, length), generator=generator, dtype=torch.int64)
    device = next(model.parameters()).device
    fisher = {name: torch.zeros(p.shape, dtype=torch.float32, device=device) for name, p in model.named_parameters()}
    total = 0.0
    for row in ids.to(device):
        model.zero_grad()
        logits = model(row[None], use_cache=False).logits.float()  # [1, length, V]
        loss = nn.functional.cross_entropy(logits[0, :-1], row[1:], reduction="sum")
        loss.backward()
        total += loss.item()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                fisher[name] += parameter.grad.float() ** 2
    model.zero_grad()
    return {name: (f / samples).cpu() for name, f in fisher.items()}, total / samples


# ---- Shared steps -----------------------------------------------------------------------------------------------


def keep_count(density: float, numel: int) -> int:
    """k = round(density * n)."""
    return round(density * numel)


def top_k_mask(weight: Tensor, k: int) -> Tensor:
    """True at exactly k elements: the largest weights, ties to the lower flat index."""
    order = torch.argsort(weight.flatten(), descending=True, stable=True)
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[order[:k]] = True
    return mask.reshape(weight.shape)


def elected_sign(ys: list[Tensor]) -> Tensor:
    """S = sign(sum_i y_i), with 0 counted as +1. Sums run in list order."""
    return torch.where(add_all(ys) >= 0, 1.0, -1.0)


def add_all(ys: list[Tensor]) -> Tensor:
    """y_0 + y_1 + ..., left to right."""
    total = ys[0].clone()
    for y in ys[1:]:
        total = total + y
    return total


# ---- FIM-Merging ------------------------------------------------------------------------------------------------


@dataclass
class FimResult:
    """What `naive_fim` found. Blocks are listed by rising block number, experts in the given order."""

    blocks: list[int]  # the block numbers
    fisher_mean: list[float]  # [block]
    task_vector_mean_square: list[list[float]]  # [expert][block]
    scores: list[list[float]]  # [expert][block], natural log; -inf for a zero block
    alphas: list[list[float]]  # [expert][block], before the gate factor
    merged: Tensors = field(default_factory=dict)  # float32, every tensor of the base
    kept: dict[str, int] = field(default_factory=dict)  # trimmed tensors: k (the same for every expert)
    threshold: dict[str, list[float]] = field(default_factory=dict)  # trimmed: k-th largest w per expert; k = 0: inf
    weight: dict[str, list[Tensor]] = field(default_factory=dict)  # trimmed: w = F |delta| per expert
    norm_ratio: dict[str, float] = field(default_factory=dict)  # calibrated: ||W X|| / ||W0 X|| before any rescale
    rescaled: dict[str, bool] = field(default_factory=dict)  # calibrated: was it rescaled

    def alpha(self, expert: int, name: str) -> float:
        """The block coefficient of the tensor (without the gate factor)."""
        return self.alphas[expert][self.blocks.index(block_of(name))]


def naive_fim(
    base: Tensors,
    experts: list[Tensors],
    fisher: Tensors,
    *,
    density: float = 0.2,
    gate_factor: float = 0.7,
    norm_tolerance: float | None = 0.05,
    trim: bool = True,
    elect: bool = True,
    theta: str | float = "adaptive",
    importance: str = "product",
) -> FimResult:
    """FIM-Merging (arXiv 2603.21705 Alg. 1) with every ambiguity fixed as in papers.md 1.4, default column.

    Per block (matrices only): s = log(mean(F) mean(delta^2)), alpha = 1 - sigmoid(theta (s - max s)).
    Per tensor of a block: y_i = alpha_i (delta_i masked to the top k of F |delta_i|; biases and norms untrimmed),
    sign election and disjoint mean over experts, W = W0 + y, then W *= ||W0 X|| / ||W X|| where they differ by
    more than `norm_tolerance`. Outside the blocks: the base.

    FIM-TA is `trim=False, elect=False, gate_factor=1.0, norm_tolerance=None`.

    Args:
        trim: False keeps every element.
        elect: False sums the y_i (plain task arithmetic). Without effect for one expert.
        theta: "adaptive" = 1 / (max s - min s), or a fixed number.
        importance: log of mean(F) mean(delta^2) ("product"), mean(F) ("fim") or mean(delta^2) ("norm").
        norm_tolerance: None leaves the norms alone.
    """
    base = {name: tensor.float() for name, tensor in base.items()}
    deltas = [{name: expert[name].float() - tensor for name, tensor in base.items()} for expert in experts]

    blocks = sorted({block for name in base if (block := block_of(name)) is not None})
    matrices = {b: [n for n, t in base.items() if block_of(n) == b and t.ndim > 1] for b in blocks}
    fisher_mean = [pooled_mean([fisher[n].double() for n in matrices[b]]) for b in blocks]
    mean_square = [[pooled_mean([d[n].double() ** 2 for n in matrices[b]]) for b in blocks] for d in deltas]
    scores = [[block_score(f, m, importance) for f, m in zip(fisher_mean, row, strict=True)] for row in mean_square]
    result = FimResult(blocks, fisher_mean, mean_square, scores, [block_alphas(row, theta) for row in scores])

    for name, origin in base.items():
        if block_of(name) is None:
            result.merged[name] = origin.clone()
            continue
        gate = gate_mask(name, base)
        ys = []
        for i, delta in enumerate(deltas):
            d = delta[name]
            if trim and origin.ndim > 1:
                d = _trim_by_fisher(name, d, fisher[name].float(), density, result)
            alpha = result.alpha(i, name)
            ys.append(torch.where(gate, (gate_factor * alpha) * d, alpha * d))
        merged = origin + (disjoint_mean(ys) if elect else add_all(ys))
        if norm_tolerance is not None and origin.ndim > 1:
            merged = _calibrate(name, origin, merged, norm_tolerance, result)
        result.merged[name] = merged
    return result


def block_of(name: str) -> int | None:
    """N of `model.layers.N.`, or None outside the decoder blocks."""
    match = BLOCK.match(name)
    return int(match[1]) if match else None


def gate_mask(name: str, tensors: Tensors) -> Tensor:
    """True at the entries of W_g in W_d (act(W_g x) * (W_u x)), wherever the checkpoint keeps it.

    `gate_up_proj` is W_g [I, H] above W_u, or one such matrix per expert, if the W_d beside it is [H, I]; else unknown.
    """
    tensor, parts = tensors[name], name.split(".")
    mask = torch.zeros(tensor.shape, dtype=torch.bool)
    if "gate_proj" in parts or ("experts" in parts and "w1" in parts):
        mask[...] = True
    down = tensors.get(name.replace("gate_up_proj", "down_proj"))
    if "gate_up_proj" in parts and tensor.ndim > 1 and down is not None:
        gate, up = mask.tensor_split(2, dim=-2)
        if gate.shape == up.shape == down.mT.shape:
            gate[...] = True
    return mask


def pooled_mean(tensors: list[Tensor]) -> float:
    """Mean over the elements of all tensors together (not the mean of their means)."""
    return sum(t.sum().item() for t in tensors) / sum(t.numel() for t in tensors)


def block_score(fisher_mean: float, mean_square: float, importance: str) -> float:
    """s = log(mean(F) mean(delta^2)), or the log of one factor alone; log 0 = -inf."""
    signal = {"product": fisher_mean * mean_square, "fim": fisher_mean, "norm": mean_square}[importance]
    return math.log(signal) if signal > 0 else -math.inf


def block_alphas(scores: list[float], theta: str | float) -> list[float]:
    """alpha = 1 - sigmoid(theta (s - max s)), theta = 1 / (max s - min s) when adaptive (papers.md 1.2).

    Equal scores give 0.5. A score of -inf is left out of max and min and gets the alpha of the least important
    scored block; with no scored block every alpha is 0.5.
    """
    scored = [s for s in scores if s > -math.inf]
    if not scored:
        return [0.5 for _ in scores]
    high, low = max(scored), min(scored)
    if high == low:
        return [0.5 for _ in scores]
    slope = 1 / (high - low) if theta == "adaptive" else float(theta)
    return [1 - 1 / (1 + math.exp(-slope * (max(s, low) - high))) for s in scores]


def disjoint_mean(ys: list[Tensor]) -> Tensor:
    """Mean of the y_i whose sign is the elected one; exact zeros never agree; no agreement gives 0 (TIES)."""
    sign = elected_sign(ys)
    agree = [torch.sign(y) == sign for y in ys]
    total = add_all([torch.where(a, y, 0.0) for a, y in zip(agree, ys, strict=True)])
    count = add_all([a.float() for a in agree])
    return torch.where(count > 0, total / count.clamp(min=1), 0.0)


def _trim_by_fisher(name: str, delta: Tensor, fisher: Tensor, density: float, result: FimResult) -> Tensor:
    """delta where w = F |delta| is among the tensor's k largest, else 0."""
    w = fisher * delta.abs()
    k = keep_count(density, w.numel())
    result.kept[name] = k
    result.weight.setdefault(name, []).append(w)
    kth = torch.topk(w.flatten(), k).values[-1].item() if k else math.inf
    result.threshold.setdefault(name, []).append(kth)
    return torch.where(top_k_mask(w, k), delta, 0.0)


def _calibrate(name: str, origin: Tensor, merged: Tensor, tolerance: float, result: FimResult) -> Tensor:
    """merged * ||W0 X||_F / ||W X||_F if the norms differ by more than the tolerance; X: [in, 8] Gaussian, seed 42.

    A zero norm on either side: left alone.
    """
    probes = torch.randn(origin.shape[-1], 8, generator=torch.Generator().manual_seed(42)).double()
    before = torch.linalg.norm(origin.double() @ probes).item()
    after = torch.linalg.norm(merged.double() @ probes).item()
    ratio = after / before if before else (1.0 if not after else math.inf)
    rescale = bool(before and after and abs(ratio - 1) > tolerance)
    result.norm_ratio[name], result.rescaled[name] = ratio, rescale
    return merged * (before / after) if rescale else merged


# ---- The classic methods ----------------------------------------------------------------------------------------


def naive_task_arithmetic(base: Tensors, experts: list[Tensors], coefficients: list[float]) -> Tensors:
    """theta0 + sum_i c_i d_i, d_i = theta_i - theta0 (arXiv 2212.04089). The sum comes first, then the base."""
    return {
        name: b.float()
        + add_all([c * (e[name].float() - b.float()) for e, c in zip(experts, coefficients, strict=True)])
        for name, b in base.items()
    }


def naive_linear(tensors_list: list[Tensors], coefficients: list[float]) -> Tensors:
    """sum_i c_i theta_i / sum_i c_i."""
    return {
        name: add_all([c * t[name].float() for t, c in zip(tensors_list, coefficients, strict=True)])
        / sum(coefficients)
        for name in tensors_list[0]
    }


def naive_ties(
    base: Tensors,
    experts: list[Tensors],
    coefficients: list[float],
    density: float,
    scale: float = 1.0,
    normalize: bool = True,
) -> Tensors:
    """TIES (arXiv 2306.01708) in mergekit's convention (mergekit.md 1.1, GTA).

    d_i trimmed per tensor, unweighted, to exactly k by |d_i|; y_i = c_i d_i; S = sign(sum y_i), 0 -> +1;
    M_i = [sign(y_i) == S]; delta = sum M_i y_i, over sum M_i c_i if `normalize` (0 -> 1); theta0 + scale delta.
    """
    merged = {}
    for name, tensor in base.items():
        origin = tensor.float()
        ys = []
        for expert, coefficient in zip(experts, coefficients, strict=True):
            d = expert[name].float() - origin
            mask = top_k_mask(d.abs(), keep_count(density, d.numel()))
            ys.append(coefficient * torch.where(mask, d, 0.0))
        sign = elected_sign(ys)
        agree = [(torch.sign(y) == sign).float() for y in ys]
        delta = add_all([m * y for m, y in zip(agree, ys, strict=True)])
        if normalize:
            divisor = add_all([m * c for m, c in zip(agree, coefficients, strict=True)])
            delta = delta / torch.where(divisor == 0, 1.0, divisor)
        merged[name] = origin + scale * delta
    return merged
