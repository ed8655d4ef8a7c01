"""The local disk: the one seam through which models are read and everything of ours is written.

Each function does all it says, however little the system does at once, or raises OSError; its caller says what was
being done (`transfer_errors`). Tests put something else in the place of `os` here and break it on purpose.
"""

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

PIECE = 1 << 20  # bytes that are read at once where it does not matter how many


def open_to_read(path: Path) -> int:
    """A descriptor. A pipe that nobody writes to is opened, not waited for."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)


def open_to_append(path: Path) -> int:
    """A descriptor of a file that is made if it is not there."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)


def open_to_write(path: Path, *, make: bool = True, empty: bool = False) -> int:
    """A descriptor to read and write with.

    Args:
        make: make the file if it is not there.
        empty: remove what is in it.
    """
    flags = (os.O_CREAT if make else 0) | (os.O_TRUNC if empty else 0)
    return os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o666)


def close(fd: int) -> None:
    os.close(fd)


def status(file: int | Path) -> os.stat_result:
    return os.stat(file)


def read_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill the buffer from byte `offset` of the file on; how many bytes there were, fewer where the file ends."""
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def read_at(fd: int, count: int, offset: int) -> bytes:
    """At most `count` bytes, none at the end of the file only."""
    return os.pread(fd, count, offset)


def read_file(path: Path) -> bytes:
    """All of a small file."""
    fd = open_to_read(path)
    try:
        pieces = []
        while piece := os.read(fd, PIECE):
            pieces.append(piece)
        return b"".join(pieces)
    finally:
        os.close(fd)


def write_at(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def append(fd: int, data: bytes) -> None:
    """Write at the end of the file, or where the last `append` ended."""
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def write_file(path: Path, content: bytes | Path) -> None:
    """Write a file, or copy one, and return once its content is on disk; its name may not be."""
    source = open_to_read(content) if isinstance(content, Path) else -1
    try:
        fd = open_to_write(path, empty=True)
        try:
            pieces = [content] if isinstance(content, bytes) else iter(lambda: os.read(source, PIECE), b"")
            for piece in pieces:
                append(fd, piece)
            os.fsync(fd)
        finally:
            os.close(fd)
    finally:
        if source >= 0:
            os.close(source)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file that is whole or not there, whatever happens; durable, name and all, when this returns."""
    partial = path.with_name(f"{path.name}.partial")
    write_file(partial, content)
    os.replace(partial, path)
    sync_folder(path.parent)


def sync(fd: int) -> None:
    """Return once all that was written is on disk."""
    os.fsync(fd)


def sync_data(fd: int) -> None:
    """`sync`, but for times and the like."""
    getattr(os, "fdatasync", os.fsync)(fd)  # macOS has only the latter


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def set_length(fd: int, size: int) -> None:
    os.ftruncate(fd, size)


def reserve(fd: int, size: int) -> None:
    """Have the disk set `size` bytes aside, so that a full one shows now; only set the length where it cannot."""
    try:
        os.posix_fallocate(fd, 0, size)
    except AttributeError:  # not on macOS
        os.ftruncate(fd, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(fd, size)


def advise(fd: int, offset: int, count: int, *, soon: bool) -> None:
    """Tell the system that these bytes will be read, in order or soon; it may read them into its cache meanwhile."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, count, os.POSIX_FADV_WILLNEED if soon else os.POSIX_FADV_SEQUENTIAL)


def rename(source: Path, target: Path) -> None:
    """Move a file to a name in the same file system, over what has that name."""
    os.replace(source, target)


def remove(path: Path) -> None:
    """Remove a file, if it is there."""
    _unless_missing(os.unlink, path)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are not there; their names are durable when this returns."""
    try:
        _mkdir(folder)
    except FileExistsError:
        if not folder.is_dir():
            raise
        return
    sync_folder(folder.parent)


def remove_folder(folder: Path) -> None:
    """Remove an empty folder."""
    os.rmdir(folder)


def remove_tree(folder: Path) -> None:
    """Remove a folder of ours with all that is in it, if it is there. Links are removed, not followed.

    It first gets another name: interrupted half-way, nobody takes what is left for the whole.
    """
    if folder.is_dir():
        doomed = folder.with_name(f"{folder.name}.removed")
        _remove_tree(doomed)
        os.rename(folder, doomed)
        _remove_tree(doomed)


def _remove_tree(folder: Path) -> None:
    if folder.is_dir():
        for entry in list(os.scandir(folder)):
            if entry.is_dir(follow_symlinks=False):
                _remove_tree(Path(entry.path))
            else:
                remove(Path(entry.path))
        _unless_missing(os.rmdir, folder)


def scratch_file(folder: Path) -> IO[bytes]:
    """An unbuffered file without a name, gone when it is closed or the process ends."""
    return tempfile.TemporaryFile(dir=folder, buffering=0)


def _mkdir(folder: Path) -> None:
    try:
        os.mkdir(folder)
    except FileNotFoundError:
        make_folder(folder.parent)
        os.mkdir(folder)


def _unless_missing(remove: Callable[[Path], None], path: Path) -> None:
    try:
        remove(path)
    except FileNotFoundError:
        return
