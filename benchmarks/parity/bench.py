"""The same merge by both tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import streammerge
from parity.environment import Peer
from parity.models import State, load, save

Role = Literal["base", "point", "none"]  # the base model in mergekit: `base_model`, one of `models`, not there


@dataclass(frozen=True)
class Models:
    """Checkpoints in folders: a base and fine-tunes of it."""

    paths: tuple[Path, ...]

    @property
    def base(self) -> Path:
        return self.paths[0]

    @property
    def experts(self) -> tuple[Path, ...]:
        return self.paths[1:]

    def first(self, experts: int) -> Models:
        return Models(self.paths[: experts + 1])

    def states(self) -> list[State]:
        return [load(path) for path in self.paths]


@dataclass(frozen=True)
class Merged:
    tensors: State
    report: dict[str, Any]  # the manifest's `tensors`


class Bench:
    """A folder for models and merges, and mergekit."""

    def __init__(self, folder: Path, peer: Peer) -> None:
        self.folder, self.peer, self._count = folder, peer, 0

    def models(self, states: Sequence[State]) -> Models:
        """Write checkpoints."""
        folder = self._next("models")
        return Models(tuple(save(folder / str(number), state) for number, state in enumerate(states)))

    def ours(self, method: str, models: Models, **parameters: Any) -> Merged:
        """Raises StreammergeError."""
        recipe = {
            "base": str(models.base),
            "models": [str(path) for path in models.experts],
            "method": method,
            "parameters": parameters,
        }
        folder = self._next("ours")
        manifest = streammerge.merge(recipe, folder)
        return Merged(load(folder), manifest["tensors"])

    def theirs(
        self,
        method: str,
        models: Models,
        *,
        role: Role = "base",
        each: Mapping[str, Sequence[float]] | None = None,
        dtype: str | None = "float32",
        seed: int | None = None,
        **parameters: Any,
    ) -> State:
        """mergekit's result.

        Args:
            role: of the base model; a point stands first among the models.
            each: per-model parameters, a value for every model.
            dtype: mergekit's compute dtype; None: that of the checkpoints.

        Raises:
            PeerRefused: mergekit's own exception.
        """
        listed = models.paths if role == "point" else models.experts
        values = [{key: column[i] for key, column in (each or {}).items()} for i in range(len(listed))]
        config: dict[str, Any] = {
            "merge_method": method,
            "models": [{"model": str(m), "parameters": v} for m, v in zip(listed, values, strict=True)],
            "parameters": parameters,
        }
        if role == "base":
            config["base_model"] = str(models.base)
        if dtype is not None:
            config["dtype"] = dtype
        folder = self._next("theirs")
        self.peer.merge(config, folder, seed)
        return load(folder)

    def _next(self, kind: str) -> Path:
        self._count += 1
        return self.folder / f"{self._count:03}-{kind}"
