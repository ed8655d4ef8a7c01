"""Room for two shards: how many lie on disk at once, whatever the units, the workers and their luck."""

import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from streammerge.checkpoints.layout import plan_shards
from streammerge.checkpoints.room import DiskRoom
from streammerge.checkpoints.writer import CheckpointWriter

LIMIT = 2


def run(
    folder: Path, works: Sequence[Sequence[str]], names: Sequence[str], per_shard: int, workers: int, seed: int
) -> int:
    """Write tensors of a byte each, work by work; another thread removes finished shards. The most files at once."""
    shards = plan_shards([(name, "U8", (1,)) for name in names], per_shard)
    finished: list[str] = []
    most = 0
    with CheckpointWriter(folder, shards, {}) as writer, ThreadPoolExecutor(workers + 1) as pool:
        room, done = DiskRoom(writer, LIMIT), threading.Event()
        writer.on_finished = finished.append
        room.expect({str(number): work for number, work in enumerate(works)})
        queue = iter(range(len(works)))
        lock = threading.Lock()
        generator = random.Random(seed)

        def remove() -> None:
            nonlocal most
            gone = 0
            while gone < len(shards):
                most = max(most, len(writer.on_disk()))
                if gone < len(finished) and generator.random() < 0.5:
                    (writer.work / finished[gone]).unlink()
                    room.release(finished[gone])
                    gone += 1
                time.sleep(0.0002)

        def work() -> None:
            while True:
                with lock:
                    mine = [
                        number
                        for number in (next(queue, None) for _ in range(generator.randint(1, 3)))
                        if number is not None
                    ]
                if not mine:
                    return
                time.sleep(generator.random() / 2000)
                for number in mine:
                    assert room.enter(str(number), done)
                    for name in works[number]:
                        writer.complete(name, {}, [writer.write(name, 0, memoryview(b"x"))])
                    room.leave(str(number))

        for future in [pool.submit(remove), *(pool.submit(work) for _ in range(workers))]:
            future.result(timeout=30)
    return most


@pytest.mark.parametrize("seed", range(12))
def test_one_tensor_after_another_never_needs_a_third_file(tmp_path: Path, seed: int) -> None:
    names = [f"t{number:02}" for number in range(24)]
    assert run(tmp_path / "out", [[name] for name in names], names, 1 + seed % 4, 1 + seed % 5, seed) <= LIMIT


@pytest.mark.parametrize("seed", range(12))
def test_works_across_shards_all_get_their_turn(tmp_path: Path, seed: int) -> None:
    names = [f"t{number:02}" for number in range(24)]
    generator = random.Random(seed)
    shuffled = generator.sample(names, len(names))
    works = [sorted(shuffled[start : start + 3]) for start in range(0, len(names), 3)]
    works.sort(key=lambda work: work[0])
    run(tmp_path / "out", works, names, 2, 3, seed)


def opened(folder: Path, count: int) -> tuple[CheckpointWriter, DiskRoom]:
    shards = plan_shards([(f"t{number}", "U8", (1,)) for number in range(count)], 1)
    writer = CheckpointWriter(folder, shards, {})
    room = DiskRoom(writer, LIMIT)
    room.expect({f"w{number}": [f"t{number}"] for number in range(count)})
    return writer, room


def write(writer: CheckpointWriter, number: int) -> None:
    writer.complete(f"t{number}", {}, [writer.write(f"t{number}", 0, memoryview(b"x"))])


def test_a_third_shard_waits_until_one_is_gone(tmp_path: Path) -> None:
    writer, room = opened(tmp_path / "out", 3)
    stop = threading.Event()
    with writer:
        for number in (0, 1):
            assert room.enter(f"w{number}", stop)
            write(writer, number)
            room.leave(f"w{number}")
        writer.wait()
        waiting = threading.Thread(target=room.enter, args=("w2", stop))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        (writer.work / "model-00001-of-00003.safetensors").unlink()
        room.release("model-00001-of-00003.safetensors")
        waiting.join(5)
        assert not waiting.is_alive()


def test_a_finished_shard_that_stays_takes_no_room(tmp_path: Path) -> None:
    writer, room = opened(tmp_path / "out", 4)
    with writer:
        for number in range(4):
            assert room.enter(f"w{number}", threading.Event())
            write(writer, number)
            writer.wait()
            room.release(f"model-0000{number + 1}-of-00004.safetensors")
            room.leave(f"w{number}")
        assert len(writer.on_disk()) == 4


def test_whoever_waits_learns_of_a_failure(tmp_path: Path) -> None:
    writer, room = opened(tmp_path / "out", 3)
    with writer, ThreadPoolExecutor(1) as pool:
        for number in (0, 1):
            assert room.enter(f"w{number}", threading.Event())
            write(writer, number)
            room.leave(f"w{number}")
        future = pool.submit(room.enter, "w2", threading.Event())
        room.fail(OSError("no more uploads"))
        with pytest.raises(OSError, match="no more uploads"):
            future.result(5)
        with pytest.raises(OSError, match="no more uploads"):
            DiskRoom.enter(room, "w2", threading.Event())


def test_whoever_waits_can_be_stopped(tmp_path: Path) -> None:
    writer, room = opened(tmp_path / "out", 3)
    stop = threading.Event()
    with writer:
        assert room.enter("w0", stop) and room.enter("w1", stop)
        stop.set()
        assert not room.enter("w2", stop)


def test_without_a_limit_nobody_waits(tmp_path: Path) -> None:
    writer, _ = opened(tmp_path / "out", 5)
    room = DiskRoom(writer, None)
    room.expect({f"w{number}": [f"t{number}"] for number in range(5)})
    with writer:
        assert all(room.enter(f"w{number}", threading.Event()) for number in (4, 0, 2, 1, 3))
