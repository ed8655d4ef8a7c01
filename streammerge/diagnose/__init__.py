"""What a merge did to the blocks of a model: collapse, and how far from linear they are. One block in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from streammerge.checkpoints.locate import open_model, require_pinned
from streammerge.compatibility import match_experts, refuse_quantised
from streammerge.diagnose.settings import DiagnoseSettings
from streammerge.fisher.placement import FisherRun
from streammerge.heap import large_imports
from streammerge.hub.pull import HubMode
from streammerge.names import Named
from streammerge.schema import build


def diagnose(
    model: Named,
    against: Named | Sequence[Named],
    settings: DiagnoseSettings | Mapping[str, Any] | None = None,
    *,
    hub_mode: HubMode = "cache",
    device: str | None = None,
    trust_remote_code: bool = False,
    plot: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Hold a merged model against its sources, decoder block by decoder block; all see the same tokens.

    Per block, H [tokens, features] being the block's output hidden states over all sequences, in float64:

        activation variance  = mean over the features of the population variance over the tokens
        effective rank       = exp(-sum p ln p), p the eigenvalues of H's covariance over their sum   (see `numbers.py`)
        norm shrinkage       = |merged block| / mean_i |source block_i|, all tensors of the block as one vector
        mean squared angle   = sum_i a_i d_i^2, d_i = angle between merged block and source block_i, a_i = 1 / sources
        proxy objective      = sum over the blocks of the mean squared angles

    and the ratios of the first two to their mean over the sources.

    With `nonlinearity`, the model is a fine-tune, th0 + d, and the one model it is held against its base, th0:

        NL            = |f(th0 + alpha d) - [f(th0) + alpha (f(th0 + d) - f(th0))]| / |f(th0 + d) - f(th0)|
        merging error = |f(th0 + alpha d) - [(1 - alpha) f(th0) + alpha f(th0 + d)]|
                        / |(1 - alpha) f(th0) + alpha f(th0 + d)|
        change        = |f(th0 + d) - f(th0)| / |f(th0)|

    in the Euclidean norm over a sequence's tokens and features, mean over the sequences; and Pearson's correlation of
    the first two over the blocks.

    Args:
        model: folder, org/name[@revision] or hf://org/name[@revision].
        against: the models it was merged from, likewise; with `nonlinearity` its base.
        settings: tokens, dtype, what is measured; a mapping is read as `DiagnoseSettings`.
        hub_mode: how models on the Hub are read: "cache" or "stream"; see `merge`.
        device: "cpu", "cuda", "cuda:1"; a GPU where there is one by default.
        trust_remote_code: run Python code that a model brings; a Hub model must then be pinned to a commit.
        plot: file for a figure, .png, .pdf or .svg; needs matplotlib.
        progress: show a progress bar on standard error.

    Returns:
        Plain values: version, settings, tokens (SHA-256 of the ids), device, compute_dtype, model, against (id and
        revision of each), `blocks` (a mapping each), `mean` (of the blocks, by column), notes; and proxy_objective, or
        pearson and correlated_blocks. Angles in rad. None: undefined.

    Convention: the papers leave open what follows.
        f is one decoder block, with the weights in question and applied to the base's hidden states at its input, with
        the base's masks and positions: the reading that one block in memory allows. The whole network would add what
        later blocks make of it.
        The relative merging error is defined here, not in the paper: the output of the merged block relative to the
        mean of the outputs it should give. Its numerator is NL's, so the correlation tells whether blocks that bend
        more, as a part of how much they change, are also those that err more as a part of their output.
        th0 + alpha d is rounded to the base's dtype, as a merge would. All models run in the dtype of the first;
        for NL in float32 or wider, since close outputs are subtracted. A block whose output does not change has NL 0
        and is left out of the correlation.

    Raises:
        RecipeError: settings that make no sense, no such device, a text that is too short, no matplotlib.
        CheckpointError: a model cannot be walked block by block, is quantised, or holds non-finite values.
        IncompatibleCheckpointsError: models of another architecture or with other shapes.
        MemoryBudgetError: the GPU is too small.
        TransferError: the plot cannot be written.

    References: the Fisher-Rao paper, arXiv 2603.04972, section 4.2; FIM-Merging, arXiv 2603.21705, equation 19 and
    appendix C; Roy and Vetterli, The effective rank, EUSIPCO 2007.
    """
    if not isinstance(settings, DiagnoseSettings):
        settings = build(DiagnoseSettings, settings or {}, "diagnosis")
    sources = [against] if isinstance(against, str | os.PathLike) else list(against)
    settings.check(len(sources))
    if plot is not None:
        from streammerge.diagnose.plot import check_plot

        check_plot(Path(plot))
    with ExitStack() as stack:
        opened = []
        for name in [*sources, model] if settings.nonlinearity else [model, *sources]:
            if trust_remote_code:
                require_pinned(name)
            opened.append(stack.enter_context(open_model(name, hub_mode, progress)))
            refuse_quantised(opened[-1])
        base, *others = opened if settings.nonlinearity else [*opened[1:], opened[0]]
        match_experts(base, others, "these models cannot be compared with")

        with large_imports():
            from streammerge.diagnose.measure import measure  # imports torch and transformers

        result = measure(opened, settings, FisherRun(device, trust_remote_code=trust_remote_code), progress)
    if plot is not None:
        from streammerge.diagnose.plot import write_plot

        write_plot(result, Path(plot))
    return result
