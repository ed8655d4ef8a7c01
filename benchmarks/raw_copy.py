"""The floor of a merge: the same bytes read and written by two threads, with nothing done to them.

    python benchmarks/raw_copy.py --read pair/base --read pair/ft --write raw            # as a merge of the two would
    python benchmarks/raw_copy.py --read pair/base --read pair/ft --write raw --durable  # and synced to disk, as it is

Pieces of 512 KiB are read from every folder's weights into reused buffers (`preadv`), and those of the first written
to one file (`pwrite`): that is fastest where it was measured (see README.md). Read with care: a merge also makes sure
that what it wrote is on disk, and hashes it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

PIECE = 512 << 10


def copy(folders: Sequence[Path], out: Path, threads: int = 2, durable: bool = False) -> None:
    """Read all weights in the folders; write those of the first."""
    files = [[os.open(path, os.O_RDONLY) for path in sorted(folder.glob("*.safetensors"))] for folder in folders]
    target = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    pieces, lock = _pieces(files), Lock()

    def loop() -> None:
        buffer = memoryview(bytearray(PIECE))
        while True:
            with lock:
                piece = next(pieces, None)
            if piece is None:
                return
            for source, offset, place in piece:
                count = os.preadv(source, [buffer], offset)
                if place is not None:
                    os.pwrite(target, buffer[:count], place)

    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(loop) for _ in range(threads)]:
            future.result()
    if durable:
        os.fsync(target)
    for descriptor in [target, *(source for of_folder in files for source in of_folder)]:
        os.close(descriptor)


Piece = list[tuple[int, int, int | None]]  # a file, an offset in it, and in the output where it is written


def _pieces(files: Sequence[Sequence[int]]) -> Iterator[Piece]:
    """Pieces that are read together: one from each folder, as long as it has any."""
    lists = []
    for number, of_folder in enumerate(files):
        place, found = 0, []
        for source in of_folder:
            size = os.fstat(source).st_size
            found += [(source, offset, place + offset if number == 0 else None) for offset in range(0, size, PIECE)]
            place += size
        lists.append(found)
    for i in range(max(map(len, lists))):
        yield [found[i] for found in lists if i < len(found)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--read", type=Path, action="append", required=True, metavar="FOLDER", help="repeat")
    parser.add_argument("--write", type=Path, required=True, metavar="FILE")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--durable", action="store_true", help="return once it is on disk")
    arguments = parser.parse_args(argv)
    copy(arguments.read, arguments.write, arguments.threads, arguments.durable)


if __name__ == "__main__":
    main()
