"""A sweep's folder: what it is of, and what is done."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streammerge.checkpoints import disk
from streammerge.checkpoints.checkpoint import MANIFEST_FILE
from streammerge.checkpoints.identity import differences
from streammerge.checkpoints.json_text import parse_object
from streammerge.checkpoints.output import WORK_DIR, check_output, transfer_errors
from streammerge.checkpoints.work import WorkFolder
from streammerge.errors import HeaderError, OutputExistsError

SWEEP_FILE, PAGE_FILE, PICTURE_FILE = "sweep.json", "sweep.md", "sweep.png"
FISHER_FOLDER, POINTS_FOLDER = "fisher", "points"


class SweepFolder:
    """The folder of a sweep, this process's alone within `locked`.

    `sweep.json` has the scores of every point that is done, from the moment it is.

    Args:
        identity: what scores depend on, as JSON; a folder of another one is refused.
        inputs: folders of the models, which the sweep's may not be nor lie in.

    Attributes:
        done: point name -> its settings and scores.

    Raises:
        OutputExistsError: the folder holds something else.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], inputs: list[Path | None]) -> None:
        self.folder, self._identity = folder, json.loads(json.dumps(identity))
        self.done: dict[str, dict[str, Any]] = {}
        if (folder / SWEEP_FILE).is_file():
            self._read()
        else:
            check_output(folder, inputs, overwrite=False, manifest=None)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other sweeps out; what is left here by a kill is no hindrance to the next."""
        with transfer_errors(self.folder, "cannot be prepared"):
            work = WorkFolder(self.folder, fresh=False, label=f"sweep in {self.folder}")
        try:
            if (self.folder / SWEEP_FILE).is_file():
                self._read()  # another may have gone on in the meantime
            self.write()
            yield
            with transfer_errors(self.folder, "cannot be tidied up"):
                work.remove()
        finally:
            work.close()

    def merged(self, name: str) -> Path:
        """Where a point's merge goes."""
        return self.folder / POINTS_FOLDER / name

    def is_merged(self, name: str) -> bool:
        folder = self.merged(name)
        return (folder / MANIFEST_FILE).is_file() and not (folder / WORK_DIR).exists()

    def record(self, name: str, settings: Mapping[str, Any], scores: Mapping[str, Any]) -> None:
        """A point is done, and stays so whatever happens next."""
        self.done[name] = {"settings": dict(settings), "scores": dict(scores)}
        self.write()

    def drop(self, name: str) -> None:
        """Remove a point's merge, but for its manifest, which goes beside it."""
        with transfer_errors(self.merged(name), "cannot be removed"):
            if self.is_merged(name):
                content = disk.read_file(self.merged(name) / MANIFEST_FILE)
                disk.replace_file(self.folder / POINTS_FOLDER / f"{name}.json", content)
            disk.remove_tree(self.merged(name))
            disk.remove_tree(self.merged(f"{name}.removed"))  # where a kill ended an earlier removal

    def write(self, **found: Any) -> None:
        """Write `sweep.json`: what the sweep is of, what is done and, at the end, what was found."""
        values = {**found, "identity": self._identity, "done": self.done}
        with transfer_errors(self.folder / SWEEP_FILE, "cannot be written"):
            disk.replace_file(self.folder / SWEEP_FILE, json.dumps(values, indent=2, allow_nan=False).encode() + b"\n")

    def _read(self) -> None:
        path = self.folder / SWEEP_FILE
        try:
            with transfer_errors(path, "cannot be read"):
                values = parse_object(disk.read_file(path), str(path))
            known, done = dict(values["identity"]), dict(values["done"])
            if not all({"settings", "scores"} <= entry.keys() for entry in done.values()):
                raise ValueError("a point without scores")
        except (HeaderError, KeyError, TypeError, ValueError, AttributeError):
            raise OutputExistsError(f"{path}: damaged, or of no sweep: choose another --out, or remove it") from None
        if differing := differences(known, self._identity):
            raise OutputExistsError(
                f"folder {self.folder} holds a sweep that differs in {', '.join(differing)}: repeat that one, or "
                "choose another --out"
            )
        self.done = done
