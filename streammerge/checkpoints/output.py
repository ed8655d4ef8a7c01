"""What an output folder may hold before it is written, and the errors of writing."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from streammerge.checkpoints import disk
from streammerge.checkpoints.checkpoint import MANIFEST_FILE, REPORT_FILE, Checkpoint
from streammerge.checkpoints.json_text import parse_object
from streammerge.errors import CheckpointError, HeaderError, OutputExistsError, RecipeError, TransferError
from streammerge.names import stays_inside, unsafe_name

WORK_DIR = ".streammerge"
REPORT_MARK = b"<!DOCTYPE html>\n<!-- Report of a merge by streammerge -->\n"  # how a report of ours begins


def check_output(
    folder: Path,
    inputs: Iterable[Path | None],
    overwrite: bool,
    manifest: str | None = MANIFEST_FILE,
    option: str = "--out",
) -> None:
    """Refuse an output folder that is an input, lies in one, or holds something else than an unfinished run of ours.

    With `overwrite`, a finished checkpoint of ours (one with `manifest`) is fine too, as long as it holds nothing
    we did not write.

    Args:
        inputs: folders; an input of None lies in none.
        manifest: what a finished checkpoint that may be replaced has; None: nothing may be.
        option: where the folder was named, for messages.

    Raises:
        OutputExistsError: naming what is in the way and what to do.
        TransferError: the folder cannot be looked into.
    """
    with transfer_errors(folder, "cannot be an output folder"):
        _check_output(folder, [path for path in inputs if path is not None], overwrite, manifest, option)


def _check_output(folder: Path, inputs: Iterable[Path], overwrite: bool, manifest: str | None, option: str) -> None:
    for path in inputs:
        if folder.resolve() == path.resolve():
            raise OutputExistsError(f"output folder {folder} is also an input: choose another {option}")
        if path.resolve() in folder.resolve().parents:
            raise OutputExistsError(f"output folder {folder} lies inside {path}: choose another {option}")
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"output {folder} is a file: choose another {option}")
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if not found:
        return
    if (link := _foreign_link(folder)) is not None:
        raise OutputExistsError(
            f"output folder {folder} holds the link {link}, which would be written through: remove it"
        )
    ours = files_of_manifest(folder, manifest) if manifest is not None else None
    if overwrite and ours is not None:
        foreign = found - {Path(name).parts[0] for name in ours} - {WORK_DIR}
        if foreign:
            raise OutputExistsError(f"output folder {folder} also holds {min(foreign)!r}, which is not ours to remove")
    elif WORK_DIR not in found:
        kind = "merge" if manifest == MANIFEST_FILE else "Fisher"
        advice = f"or replace that {kind} with --overwrite" if ours is not None else "or empty it"
        raise OutputExistsError(
            f"output folder {folder} is not empty ({min(found)!r}): choose another {option} {advice}"
        )


def _foreign_link(folder: Path) -> Path | None:
    """A link to another folder, or any in the work folder: none is ours, and what goes there would go elsewhere."""
    for root, folders, files in os.walk(folder):
        ours = WORK_DIR in Path(root).relative_to(folder).parts
        for path in (Path(root) / name for name in [*folders, *(files if ours else [])]):
            if path.is_symlink():
                return path
    return None


def files_of_manifest(folder: Path, manifest: str) -> list[str] | None:
    """The files of a finished checkpoint of ours; None where there is none, or its manifest names a file elsewhere.

    They are to be removed, so that a file in a linked folder is elsewhere too. A merge's report, which its manifest
    does not name, is among them.
    """
    try:
        names = parse_object((folder / manifest).read_bytes(), str(folder / manifest))["files"]
        if any(unsafe_name(name) or not stays_inside(folder, str(PurePosixPath(name).parent / "x")) for name in names):
            return None
    except (OSError, HeaderError, KeyError, TypeError, AttributeError):
        return None
    return [manifest, *names, *([REPORT_FILE] if manifest == MANIFEST_FILE and _has_report(folder) else [])]


def _has_report(folder: Path) -> bool:
    try:
        file = disk.open_to_read(folder / REPORT_FILE)
    except OSError:
        return False
    try:
        return disk.read_at(file, len(REPORT_MARK), 0) == REPORT_MARK
    except OSError:  # a folder
        return False
    finally:
        disk.close(file)


@contextmanager
def void_with_inputs(models: Iterable[Checkpoint], discard: Callable[[], None]) -> Iterator[None]:
    """Discard what was made of models that turn out to be unusable, or whose files have changed meanwhile."""
    try:
        try:
            yield
        except TransferError:
            for model in models:
                model.require_unchanged()
            raise
    except (CheckpointError, RecipeError):
        discard()  # running again would not help
        raise


@contextmanager
def transfer_errors(path: Path | str, doing: str) -> Iterator[None]:
    """Turn what the operating system refuses into TransferError."""
    try:
        yield
    except TransferError:
        raise
    except OSError as error:
        raise TransferError(f"{path}: {doing}: {error.strerror or error}") from error
