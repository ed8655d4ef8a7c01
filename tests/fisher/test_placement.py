"""Where a pass runs, what it takes, and which blocks stay: from headers, before anything is read."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fisher.models import saved, settings

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.errors import MemoryBudgetError, RecipeError
from streammerge.fisher import FisherRun, fisher, place
from streammerge.fisher.blocks import BlockModel
from streammerge.fisher.device_map import blocks_that_stay, room_for_blocks
from streammerge.fisher.placement import HEAD_BYTES, HEAD_LOGITS, IMPORT_BYTES, default_device, fisher_memory, head_rows
from streammerge.fisher.probes import random_tokens

CPU = torch.device("cpu")


def block_bytes(base: Checkpoint) -> list[int]:
    return [sum(i.nbytes for n, i in base.tensors.items() if f".layers.{block}." in n) for block in range(3)]


# ---- Memory ---------------------------------------------------------------------------------------------------------


def test_two_blocks_and_the_work(base: Checkpoint) -> None:
    memory = fisher_memory(base, settings())
    assert (
        memory.block == max(block_bytes(base))
        and memory.on_gpu == memory.on_cpu + memory.block == 2 * memory.block + memory.work
    )


def test_the_largest_block_counts(tmp_path: Path) -> None:
    """One block of two is a mixture, and larger than the other."""
    with Checkpoint.open(saved(tmp_path / "model", "qwen3_moe")) as base:
        sizes = block_bytes(base)
        assert sizes[0] > sizes[1] > 0 and fisher_memory(base, settings()).block == sizes[0]


def test_it_does_not_grow_with_the_number_of_blocks(tmp_path: Path) -> None:
    found = []
    for count in (2, 5):
        with Checkpoint.open(saved(tmp_path / str(count), num_hidden_layers=count)) as base:
            found.append(fisher_memory(base, settings()))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["qwen2", "mixtral"])
def test_it_grows_with_the_sample_and_the_dtype(tmp_path: Path, kind: str) -> None:
    with Checkpoint.open(saved(tmp_path / "model", kind, intermediate_size=512)) as base:
        work = fisher_memory(base, settings(samples=64, length=512)).work
        assert fisher_memory(base, settings(samples=128, length=512)).work > work
        assert fisher_memory(base, settings(samples=64, length=1024)).work > work
        assert fisher_memory(base, settings(samples=64, length=512, compute_dtype="float64")).work > work


def test_experts_count_as_often_as_tokens_choose_them(tmp_path: Path) -> None:
    """Two experts of eight: the same factors as two of four, in a block that is larger."""
    found = {}
    for count, chosen in ((4, 2), (8, 2), (8, 4)):
        sizes = {"num_local_experts": count, "num_experts_per_tok": chosen, "intermediate_size": 512}
        with Checkpoint.open(saved(tmp_path / f"{count}-{chosen}", "mixtral", **sizes)) as base:
            found[count, chosen] = fisher_memory(base, settings(samples=64, length=512))
    assert found[8, 2].block > 1.9 * found[4, 2].block
    assert found[8, 2].work == pytest.approx(found[4, 2].work, rel=0.01)
    assert found[8, 4].work > 1.5 * found[8, 2].work


@pytest.mark.parametrize("row_bytes", [64, 3072, 7168, 1 << 25])
@pytest.mark.parametrize("tokens", [1, 512, 100_000, 1 << 25])
def test_rows_of_the_head(row_bytes: int, tokens: int) -> None:
    """As many as stay below both limits, and at least one."""
    rows = head_rows(row_bytes, tokens)
    assert rows == 1 or (rows * row_bytes <= HEAD_BYTES and rows * tokens <= HEAD_LOGITS)
    assert (rows + 1) * row_bytes > HEAD_BYTES or (rows + 1) * tokens > HEAD_LOGITS


# ---- The device -----------------------------------------------------------------------------------------------------


def test_without_a_gpu_s_driver_torch_is_not_imported() -> None:
    code = (
        "import ctypes, sys\n"
        "def missing(*args, **kwargs): raise OSError('no such library')\n"
        "ctypes.CDLL = missing\n"
        "from streammerge.fisher.placement import default_device\n"
        "print(default_device(), 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["cpu", "False"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's peak memory from /proc")
def test_what_importing_takes(qwen2: Path, tmp_path: Path) -> None:
    """As the kernel has it: torch, transformers with what it imports by itself, accelerate, and an empty model."""
    code = (
        "import sys; from streammerge import fisher; fisher(sys.argv[1], sys.argv[2], device='cpu')\n"
        "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(qwen2), str(tmp_path / "fisher")], capture_output=True, text=True, check=True
    )
    assert 0.8 * IMPORT_BYTES < 1024 * int(run.stdout.split()[-1]) < IMPORT_BYTES + (20 << 20)  # a tiny pass besides


@pytest.mark.parametrize(("usable", "device"), [(True, "cuda"), (False, "cpu")])
def test_with_a_driver_torch_decides(monkeypatch: pytest.MonkeyPatch, usable: bool, device: str) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    assert default_device() == device


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:99", "--device cuda:99: there is no such device here"),
        ("nonsense", "--device nonsense: there is no such device here"),
        ("meta", "--device meta: models run on cpu or cuda"),
    ],
)
def test_a_device_that_is_none_is_refused(qwen2: Path, tmp_path: Path, device: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        fisher(str(qwen2), tmp_path / "out", settings(), device=device)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_max_vram_is_for_a_gpu(block_model: BlockModel) -> None:
    with pytest.raises(RecipeError, match="--max-vram is for a Fisher pass on a GPU"):
        blocks_that_stay(block_model, settings(), CPU, FisherRun("cpu", max_vram=10**9))
    assert blocks_that_stay(block_model, settings(), CPU, FisherRun("cpu")) == frozenset()


def test_on_a_gpu_blocks_stay_as_far_as_the_budget_goes(base: Checkpoint, block_model: BlockModel) -> None:
    """No GPU is touched: the budget is given, and only headers are read. accelerate keeps room for one block more."""
    cuda, need = torch.device("cuda", 0), fisher_memory(base, settings()).on_gpu
    for blocks, stay in ((0, 0), (1.5, 0), (2.5, 1), (3.5, 3)):
        room = need + int(blocks * max(block_bytes(base)))
        assert len(blocks_that_stay(block_model, settings(), cuda, FisherRun("cuda", max_vram=room))) == stay
    with pytest.raises(MemoryBudgetError, match=r"needs \d+ MiB on cuda:0, --max-vram allows \d+ MiB: give more"):
        blocks_that_stay(block_model, settings(), cuda, FisherRun("cuda", max_vram=need - 1))


# ---- accelerate's placement -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe", "mixtral"])
def test_more_room_keeps_more_blocks_and_never_more_than_there_is_room_for(tmp_path: Path, kind: str) -> None:
    with Checkpoint.open(saved(tmp_path / "model", kind, num_hidden_layers=3)) as base:
        model, sizes = BlockModel(base, torch.bfloat16, CPU), block_bytes(base)
    before: frozenset[int] = frozenset()
    for room in range(0, sum(sizes) + max(sizes), max(sizes) // 7):
        stay = room_for_blocks(model, room)
        assert stay >= before and sum(sizes[block] for block in stay) <= room
        before = stay
    assert before == {0, 1, 2}
    assert len(room_for_blocks(model, 2 * max(sizes) + max(sizes) // 2)) >= 1


# ---- A device map in a file -----------------------------------------------------------------------------------------


@pytest.fixture
def mapped(block_model: BlockModel, tmp_path: Path) -> Callable[..., frozenset[int]]:
    def call(content: Any, device: torch.device = CPU) -> frozenset[int]:
        path = tmp_path / "map.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return blocks_that_stay(block_model, settings(), device, FisherRun(str(device), device_map=str(path)))

    return call


@pytest.mark.parametrize(
    ("places", "device", "stay"),
    [
        ({"": "cpu"}, "cpu", {0, 1, 2}),
        ({"": "disk"}, "cpu", set()),
        ({"model": "disk", "model.layers": "cpu", "model.layers.1": "disk"}, "cpu", {0, 2}),
        ({"": "cpu"}, "cuda:0", set()),
        ({"": 0}, "cuda:0", {0, 1, 2}),
        ({"": "0", "model.layers.2": "disk"}, "cuda:0", {0, 1}),
        ({"": "disk", "model.layers.0": "cuda", "model.layers.1": "cuda:0"}, "cuda:0", {0, 1}),
        ({"": "disk", "model.layers.2": 1}, "cuda:1", {2}),
        ({"lm_head": "disk", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}, "cpu", {0}),
    ],
)
def test_a_map_says_which_blocks_stay(
    mapped: Callable[..., frozenset[int]], places: dict[str, Any], device: str, stay: set[int]
) -> None:
    """The longest name that holds the block decides; on a GPU, cpu is elsewhere."""
    assert mapped(places, torch.device(device)) == stay


@pytest.mark.parametrize(
    ("content", "device", "message"),
    [
        (b"{", "cpu", "not valid JSON"),
        (b"\xff\xfe", "cpu", "not valid JSON"),
        (b"[" * 100_000, "cpu", "not valid JSON"),
        (["model"], "cpu", r'must be a mapping like {"model.layers.0": 0, "model.layers": "disk"}'),
        ({"": 1.5}, "cpu", "must be a mapping like"),
        ({"": None}, "cpu", "must be a mapping like"),
        ({"": {"model": 0}}, "cpu", "must be a mapping like"),
        ({"": "cpu", "model.layer": 0}, "cpu", "'model.layer' is no module of Qwen2ForCausalLM"),
        ({"model.layers.3": "cpu"}, "cpu", "'model.layers.3' is no module of"),
        ({"model.layers.0": "cpu"}, "cpu", "it does not place 'model.layers.1'"),
        ({"lm_head": "cpu"}, "cpu", "it does not place 'model.layers.0'"),
        ({}, "cpu", "it does not place 'model.layers.0'"),
        ({"": "cuda:1"}, "cuda:0", "'model.layers.0' is on 'cuda:1': a block is on cuda:0 or cpu or disk"),
        ({"": "cpu", "model.layers.1": 0}, "cpu", "'model.layers.1' is on 0: a block is on cpu or disk"),
        ({"": 1}, "cuda:0", "'model.layers.0' is on 1: a block is on"),
        ({"": "nowhere"}, "cpu", "'model.layers.0' is on 'nowhere'"),
    ],
)
def test_a_map_that_is_none_is_refused(
    mapped: Callable[..., frozenset[int]], tmp_path: Path, content: Any, device: str, message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        mapped(content, torch.device(device))
    assert str(caught.value).startswith(f"--device-map {tmp_path}/map.json: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_map_that_is_not_there_is_refused(block_model: BlockModel, tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "missing", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(RecipeError, match=rf"--device-map {path}: {reason}.*: give auto, or a JSON file"):
            blocks_that_stay(block_model, settings(), CPU, FisherRun("cpu", device_map=str(path)))


# ---- What plan says -------------------------------------------------------------------------------------------------


def test_the_placement_of_a_pass(base: Checkpoint, tmp_path: Path) -> None:
    sizes = block_bytes(base)
    streamed = place(base, settings(samples=2, length=9), FisherRun("cpu"))
    assert (streamed.device, streamed.stay, streamed.blocks, streamed.device_bytes) == ("cpu", 0, 3, 0)
    norm, embedding = base.info("model.norm.weight"), base.info("model.embed_tokens.weight")
    rows = len(random_tokens(97, 2, 9, 42).unique()) * embedding.nbytes // 97
    expected = 2 * sum(sizes[:-1]) + sizes[-1] + norm.nbytes + rows + embedding.nbytes  # tied: the head is all of it
    assert streamed.bytes_to_read == pytest.approx(expected, abs=2 * embedding.nbytes // 97)
    assert streamed.bytes_to_stream == 0
    (tmp_path / "map.json").write_text('{"": "disk", "model.layers.1": "cpu"}')
    mapped = place(base, settings(samples=2, length=9), FisherRun("cpu", device_map=str(tmp_path / "map.json")))
    assert mapped.stay == 1
    assert mapped.bytes_to_read == expected - sizes[1], "the tokens were drawn for it"
    assert mapped.host_bytes == streamed.host_bytes + sizes[1]


def test_attention_grows_with_the_square_of_the_length(tmp_path: Path) -> None:
    """Scores of all heads: at 30,000 tokens they are far more than everything else."""
    with Checkpoint.open(saved(tmp_path / "model", "qwen2")) as base:
        heads = base.config["num_attention_heads"]
        short, long = (fisher_memory(base, settings(samples=1, length=length)).work for length in (30_000, 60_000))
    assert 7 * heads * 30_000**2 < short < 20 * heads * 30_000**2
    assert 3.5 < long / short < 4.1
