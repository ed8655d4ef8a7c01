"""Moving a finished checkpoint into place: at no moment does a part of it, or of what it replaces, load."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from streammerge.checkpoints import disk
from streammerge.checkpoints.layout import Shard
from streammerge.checkpoints.output import WORK_DIR, files_of_manifest, transfer_errors
from streammerge.checkpoints.weight_files import INDEX_FILE, SINGLE_FILE

LOADABLE = (INDEX_FILE, SINGLE_FILE)  # what makes a folder a checkpoint


def move_into_place(
    folder: Path,
    shards: Sequence[Shard],
    files: Mapping[str, bytes | Path],
    beside: Mapping[str, bytes | Path],
    manifest: str,
) -> None:
    """Put a checkpoint in the place of a finished one of ours, if there is one; durable when it returns.

    Args:
        folder: the output folder, accepted by `check_output`.
        shards: those of them that are not in the hidden folder were moved by an earlier run.
        files: name -> content, or the file to copy, of everything else.
        beside: likewise, what is no part of the checkpoint; it comes after all the rest.
        manifest: the file among `files` that lists them all.
    """
    work = folder / WORK_DIR
    staged = {name: _stage(work, name, content) for name, content in files.items()}
    staged_beside = {name: _stage(work, name, content) for name, content in beside.items()}
    _take_back(folder, work, shards)
    moved = {shard.file for shard in shards if not (work / shard.file).exists()}
    everything = staged | {shard.file: work / shard.file for shard in shards if shard.file not in moved}
    _remove_previous(folder, manifest, moved)
    _move(folder, {name: path for name, path in everything.items() if name not in LOADABLE}, manifest)
    _move(folder, {name: path for name, path in everything.items() if name in LOADABLE}, manifest)
    if staged_beside:
        _move(folder, staged_beside, manifest)


def _stage(work: Path, name: str, content: bytes | Path) -> Path:
    path = work / "files" / name
    doing = f"cannot be copied from {content}" if isinstance(content, Path) else "cannot be written"
    with transfer_errors(path, doing):
        disk.make_folder(path.parent)
        disk.write_file(path, content)
    return path


def _take_back(folder: Path, work: Path, shards: Sequence[Shard]) -> None:
    """A single file that an earlier run moved last makes a model: not while what is beside it moves again."""
    if shards[0].file == SINGLE_FILE and not (work / SINGLE_FILE).exists():
        with transfer_errors(folder / SINGLE_FILE, "moving it out of sight"):
            disk.rename(folder / SINGLE_FILE, work / SINGLE_FILE)


def _remove_previous(folder: Path, manifest: str, moved: set[str]) -> None:
    """Remove a finished checkpoint of ours, what makes it loadable first; not what an earlier run has moved already."""
    previous = files_of_manifest(folder, manifest) or []
    for name in sorted(previous, key=lambda name: (name not in LOADABLE, name == manifest)):
        if name not in moved:
            disk.remove(folder / name)
            if name in LOADABLE:
                disk.sync_folder(folder)  # not even after a power failure does it name files of ours


def _move(folder: Path, files: Mapping[str, Path], manifest: str) -> None:
    """Move files into the output folder, the manifest last; durable when it returns."""
    for name in sorted(files, key=lambda name: name == manifest):
        target = folder / name
        disk.make_folder(target.parent)
        disk.rename(files[name], target)
    for parent in {folder, *((folder / name).parent for name in files)}:
        disk.sync_folder(parent)
