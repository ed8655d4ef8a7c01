"""The task files of lm-evaluation-harness in `tasks/`, as far as this package reads them itself.

They are complete: `lm_eval --include_path FOLDER --tasks streammerge_gsm8k` runs them without this package's command.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from streammerge.checkpoints import disk

FOLDER = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class HubFile:
    """A file of a data set on the Hub.

    Attributes:
        repository: organisation and name.
        revision: the commit.
        name: its path there.
        size: bytes.
        sha256: the first 16 digits; None where only the size is known.
    """

    repository: str
    revision: str
    name: str
    size: int
    sha256: str | None

    def is_it(self, size: int, sha256: str) -> bool:
        """Whether a file of this size and SHA-256 is this one."""
        return size == self.size and sha256.startswith(self.sha256 or "")


@dataclass(frozen=True)
class TaskFile:
    """One task.

    Attributes:
        name: as users write it.
        registered: its name for lm-evaluation-harness.
        prompt: a Jinja template of a problem.
        until: what ends a response.
        max_new_tokens: most tokens of a response.
        hub: where its problems are; None where the package draws them itself.
    """

    name: str
    registered: str
    prompt: str
    until: tuple[str, ...]
    max_new_tokens: int
    hub: HubFile | None


def read_task(name: str) -> TaskFile:
    """Read the file of one of `TASKS`."""
    values = _read(f"{name}.yaml")
    drawn, hub = values["generation_kwargs"], None
    if "dataset_path" in values:
        place, known = values["dataset_kwargs"], values["metadata"]
        hub = HubFile(
            values["dataset_path"], place["revision"], place["data_files"]["test"], known["bytes"], known.get("sha256")
        )
    return TaskFile(name, values["task"], values["doc_to_text"], tuple(drawn["until"]), drawn["max_gen_toks"], hub)


def _read(file: str) -> Mapping[str, Any]:
    """The values of a file and of what it includes; functions stay names."""
    values = yaml.safe_load(disk.read_file(FOLDER / file).decode().replace("!function ", ""))
    return {**(_read(values["include"]) if "include" in values else {}), **values}
