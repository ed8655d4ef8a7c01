"""The streamed merge against the in-memory one, and its independence of budget, threads, shards and interruption."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.driver import Models, make_calibrated, merge, resolve
from naive import naive_fim, naive_linear, naive_task_arithmetic, naive_ties
from safetensors.torch import load_file, save_file
from torch import Tensor

import streammerge
from streammerge import engine, unit_work
from streammerge.budget import run_bytes
from streammerge.calibration.store import Calibrated
from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.checkpoints.source import LocalFile
from streammerge.checkpoints.writer import CheckpointWriter
from streammerge.errors import CheckpointError, IncompatibleCheckpointsError, MemoryBudgetError, TransferError
from streammerge.fisher.store import FISHER_FILE
from streammerge.methods import METHODS, Method, api

CONFIG = {"model_type": "llama", "hidden_size": 24, "vocab_size": 40, "num_hidden_layers": 2}
State = dict[str, Tensor]


def model(seed: int, dtype: torch.dtype = torch.float32, blocks: int = 2) -> State:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    state = {"model.embed_tokens.weight": draw(40, 24), "model.norm.weight": draw(24)}
    for block in range(blocks):
        start = f"model.layers.{block}."
        state |= {
            start + "self_attn.q_proj.weight": draw(24, 24),
            start + "self_attn.q_proj.bias": draw(24),
            start + "mlp.gate_proj.weight": draw(31, 24),
            start + "mlp.down_proj.weight": draw(24, 31),
            start + "mlp.experts.weight": draw(3, 7, 5),
            start + "input_layernorm.weight": draw(24),
        }
    return state


def save(state: Mapping[str, Tensor], folder: Path, config: Mapping[str, Any] = CONFIG) -> str:
    folder.mkdir()
    save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def save_fisher(base: str, folder: Path, seed: int = 9) -> str:
    """A made-up Fisher of the base: the engine is what is under test here."""
    with Checkpoint.open(base) as checkpoint:
        matrices = [n for n, i in checkpoint.tensors.items() if ".layers." in n and len(i.shape) > 1]
        generator = torch.Generator().manual_seed(seed)
        fisher = {n: torch.rand(checkpoint.tensors[n].shape, generator=generator).square() for n in matrices}
        folder.mkdir()
        save_file(fisher, folder / "model.safetensors", metadata={"format": "pt"})
        tensors = {
            n: {
                "block": int(n.split(".")[2]),
                "numel": f.numel(),
                "mean": f.double().mean().item(),
                "max": f.max().item(),
            }
            for n, f in fisher.items()
        }
        record = {
            "version": "0",
            "base": {"id": base, "revision": None, "fingerprint": checkpoint.fingerprint()},
            "settings": {"dtype": "float32"},
            "files": [],
            "loss": 1.0,
            "device": "cpu",
            "blocks": [],
            "tensors": tensors,
        }
    (folder / FISHER_FILE).write_text(json.dumps(record))
    return str(folder)


def made_up_calibration(models: Sequence[Checkpoint], *args: object, **options: object) -> Calibrated:
    """Numbers of the models' shapes, in place of a walk: the models of these tests are none that transformers knows."""
    generator = torch.Generator().manual_seed(5)
    base = {name: models[0].tensor(name) for name in sorted(models[0].tensors)}
    return make_calibrated(base, len(models) - 1, 2, lambda shape: torch.randn(tuple(shape), generator=generator))


def load(folder: Path) -> State:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a few rows, so that small tensors have many and do not fit a small budget."""
    monkeypatch.setattr(api, "TILE_ELEMENTS", 64)


@pytest.fixture
def trio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    merging = import_module("streammerge.merge")  # the package's attribute of that name is the function
    monkeypatch.setattr(merging, "check_calibration", lambda *args: None)
    monkeypatch.setattr(merging, "calibrate", made_up_calibration)
    (tmp_path / "text").write_text("any")
    folders = {name: save(model(seed), tmp_path / name) for seed, name in enumerate(("base", "one", "two"))}
    return {
        **folders,
        "fisher": save_fisher(folders["base"], tmp_path / "fisher"),
        "fisher of one": save_fisher(folders["one"], tmp_path / "fisher-one", seed=10),
        "fisher of two": save_fisher(folders["two"], tmp_path / "fisher-two", seed=11),
        "text": str(tmp_path / "text"),
    }


def fishers_of(method: Method, experts: Sequence[str]) -> list[str]:
    """The Fishers a method needs, among a trio."""
    if not method.needs_fisher:
        return []
    return ["fisher", *(f"fisher of {name}" for name in experts)] if method.fisher_of_experts else ["fisher"]


def recipe(trio: Mapping[str, str], method: str, *experts: str, **parameters: Any) -> dict[str, Any]:
    experts = experts or ("one", "two")[: METHODS[method].most_experts]
    needs = resolve(method, len(experts), **parameters).method
    return {
        "base": trio["base"],
        "models": [trio[expert] for expert in experts],
        "method": method,
        "parameters": parameters,
        "fisher_from": [trio[name] for name in fishers_of(needs, experts)],
        "calibration": {"text": trio["text"]} if needs.calibration else {},
    }


def least_budget(job: Mapping[str, Any]) -> int:
    """The smallest budget the error message names."""
    with pytest.raises(MemoryBudgetError, match="at least [0-9]+MiB"):
        streammerge.plan(job, max_ram=1)
    with streammerge.plan(job, threads=1) as plan:
        return max(
            plan.budget.scratch_bytes + run_bytes(tensor, plan.inputs(tensor), tensor.tile_rows)
            for tensor in plan.contexts
        )


NAIVE: dict[str, Callable[[State, list[State]], State]] = {
    "linear": lambda base, experts: naive_linear([base, *experts], [1.0] * (1 + len(experts))),
    "task_arithmetic": lambda base, experts: naive_task_arithmetic(base, experts, [0.7] * len(experts)),
    "ties": lambda base, experts: naive_ties(base, experts, [1.0] * len(experts), 0.2),
}


@pytest.mark.parametrize("method", NAIVE)
@pytest.mark.parametrize("experts", [("one",), ("one", "two")])
def test_streamed_equals_in_memory(
    trio: dict[str, str], tmp_path: Path, method: str, experts: tuple[str, ...], small_tiles: None
) -> None:
    streammerge.merge(recipe(trio, method, *experts), tmp_path / "out")
    expected = NAIVE[method](load(Path(trio["base"])), [load(Path(trio[e])) for e in experts])
    found = load(tmp_path / "out")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("experts", [("one",), ("one", "two")])
def test_streamed_fim_equals_in_memory(
    trio: dict[str, str], tmp_path: Path, experts: tuple[str, ...], small_tiles: None
) -> None:
    # naive.py knows only two-dimensional matrices; the fused tensor of the fixture is left out of this one
    states = {key: {n: t for n, t in load(Path(trio[key])).items() if t.dim() < 3} for key in ("base", *experts)}
    flat = {key: save(state, tmp_path / f"flat_{key}") for key, state in states.items()}
    flat["fisher"] = save_fisher(flat["base"], tmp_path / "flat_fisher")
    result = streammerge.merge(recipe(flat, "fim_ties", *experts), tmp_path / "out")
    expected = naive_fim(states["base"], [states[e] for e in experts], load(Path(flat["fisher"])))
    found = load(tmp_path / "out")
    for name, tensor in expected.merged.items():
        torch.testing.assert_close(found[name], tensor, rtol=3e-7, atol=1e-6)
    assert {n: t["rescaled"] for n, t in result["tensors"].items() if "rescaled" in t} == expected.rescaled
    assert any(expected.rescaled.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("aim", [None, 0.4])
def test_streamed_equals_the_method_in_memory(
    trio: dict[str, str], tmp_path: Path, method: str, aim: float | None, small_tiles: None
) -> None:
    """Every method, from files in pieces: the bits that it gives on whole tensors in memory."""
    job = {**recipe(trio, method), "aim": aim}
    job["calibration"] = {"text": trio["text"]} if aim else job["calibration"]
    streammerge.merge(job, tmp_path / "out", max_ram=least_budget(job), threads=1)
    states = [load(Path(folder)) for folder in (trio["base"], *job["models"])]
    with ExitStack() as stack:
        opened = [stack.enter_context(Checkpoint.open(folder)) for folder in (trio["base"], *job["models"])]
        calibrated = made_up_calibration(opened)
    fishers = [load(Path(folder)) for folder in job["fisher_from"]] or [{}]
    expected = merge(method, Models(states[0], states[1:], fishers[0], fishers[1:], calibrated), aim=aim)
    found = load(tmp_path / "out")
    assert found.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("method", METHODS)
def test_bytes_do_not_depend_on_budget_threads_or_shards(
    trio: dict[str, str], tmp_path: Path, method: str, small_tiles: None
) -> None:
    job = recipe(trio, method)
    small = least_budget(job)
    reference = streammerge.merge(job, tmp_path / "reference", threads=1)
    for number, options in enumerate([{"max_ram": small}, {"max_ram": 2 * small, "threads": 2}, {"threads": 3}]):
        out = tmp_path / f"out{number}"
        result = streammerge.merge(job, out, **options)
        assert digests(out) == digests(tmp_path / "reference")
        assert result["tensors"] == reference["tensors"]
    streammerge.merge({**job, "max_shard_bytes": 4000}, tmp_path / "shards")
    whole, sharded = load(tmp_path / "reference"), load(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    assert set(whole) == set(sharded)


def test_a_unit_that_fits_is_read_once_and_a_larger_one_once_per_pass(
    trio: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_tiles: None
) -> None:
    job = recipe(trio, "ties", density=0.3)
    bytes_read = 0
    plain = LocalFile.read_into

    def counted(self: LocalFile, buffer: memoryview, offset: int) -> None:
        nonlocal bytes_read
        bytes_read += len(buffer)
        plain(self, buffer, offset)

    for budget, once in ((None, True), (least_budget(job), False)):
        options = {"max_ram": budget} if budget else {}
        with streammerge.plan(job, threads=1, **options) as plan:
            announced, size = plan.bytes_to_read(), sum(i.nbytes for t in plan.contexts for i in plan.inputs(t))
            headers = sum(next(iter(m.tensors.values())).start for m in (plan.base, *plan.experts))
            prints = 3 * 3 * 64 * len(plan.contexts)  # the fingerprints' samples, at most
        assert (announced == size) is once
        bytes_read = 0
        monkeypatch.setattr(LocalFile, "read_into", counted)
        streammerge.merge(job, tmp_path / f"out{once}", threads=1, **options)
        monkeypatch.setattr(LocalFile, "read_into", plain)
        assert bytes_read <= announced + headers + prints
        assert bytes_read >= announced * (
            1 if once else 0.5
        )  # the second pass and that over ties are mostly not needed


def test_the_buffers_stay_within_the_budget(
    trio: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_tiles: None
) -> None:
    allocated: list[int] = []

    class Counting(engine.RowReader):
        def __init__(self, buffer_bytes: int, *rest: Any, **options: Any) -> None:
            allocated.append(buffer_bytes)
            super().__init__(buffer_bytes, *rest, **options)

    monkeypatch.setattr(engine, "RowReader", Counting)
    job = recipe(trio, "ties")
    budget = 3 * least_budget(job)
    streammerge.merge(job, tmp_path / "out", max_ram=budget)
    with streammerge.plan(job, max_ram=budget) as plan:
        assert plan.budget.total <= budget
        assert sum(allocated) == plan.budget.workers * plan.budget.buffer_bytes


class StopError(Exception):
    """Stands for a crash."""


@pytest.mark.parametrize("method", ["ties", "fim_ties"])
def test_an_interrupted_merge_goes_on_where_it_was(
    trio: dict[str, str], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {**recipe(trio, method), "max_shard_bytes": 3000}
    reference = streammerge.merge(job, tmp_path / "reference")
    plain = unit_work.Merge.do
    shards = len(reference["shards"])
    for limit in range(0, len(reference["tensors"]), 3):
        merged: list[str] = []

        def stop_after(*given: Any, limit: int = limit, merged: list[str] = merged) -> None:
            if len(merged) == limit:
                raise StopError
            plain(*given)
            merged.append(given[2].key)

        out = tmp_path / f"out{limit}"
        monkeypatch.setattr(unit_work.Merge, "do", stop_after)
        with pytest.raises(StopError):
            streammerge.merge(job, out, threads=1)
        assert not (out / "model.safetensors.index.json").exists()
        with pytest.raises(CheckpointError):
            Checkpoint.open(out)
        monkeypatch.setattr(unit_work.Merge, "do", plain)
        resumed = streammerge.merge(job, out, threads=1)
        assert resumed == reference
        assert digests(out) == digests(tmp_path / "reference")
        assert len(digests(out)) == shards


def test_a_merge_interrupted_within_a_shard_writes_no_tensor_twice(
    trio: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_tiles: None
) -> None:
    job = recipe(trio, "ties")
    reference = streammerge.merge(job, tmp_path / "reference")
    assert len(reference["shards"]) == 1
    names = list(reference["tensors"])
    plain = CheckpointWriter.write
    written: list[str] = []
    limit = 0

    def write(self: CheckpointWriter, name: str, start: int, data: memoryview) -> int:
        if start == 0:
            if len(written) == limit:
                raise StopError
            written.append(name)
        return plain(self, name, start, data)

    monkeypatch.setattr(CheckpointWriter, "write", write)
    for done in range(1, len(names), 4):
        out = tmp_path / f"out{done}"
        written.clear()
        limit = done
        with pytest.raises(StopError):
            streammerge.merge(job, out, threads=1)
        assert len(written) == done
        limit = len(names)
        assert streammerge.merge(job, out, threads=1) == reference
        assert sorted(written) == sorted(names)
        assert digests(out) == digests(tmp_path / "reference")


def test_a_failed_read_leaves_a_run_that_can_go_on(
    trio: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = recipe(trio, "ties")
    reference = streammerge.merge(job, tmp_path / "reference")

    def fail(self: LocalFile, buffer: memoryview, offset: int) -> None:
        raise TransferError(f"{self.where}: Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "RowReader", _failing(engine.RowReader, fail, patch))
        with pytest.raises(TransferError, match="Input/output"):
            streammerge.merge(job, tmp_path / "out")
    assert streammerge.merge(job, tmp_path / "out") == reference


def _failing(reader: Any, fail: Any, patch: pytest.MonkeyPatch) -> Any:
    """Reads fail from the moment the engine makes its first reader; headers were read before."""

    def make(*args: Any, **options: Any) -> Any:
        patch.setattr(LocalFile, "read_into", fail)
        return reader(*args, **options)

    return make


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_equal_models_return_themselves_in_every_float_dtype(tmp_path: Path, name: str) -> None:
    state = model(0, getattr(torch, name))
    base, ft = save(state, tmp_path / "base"), save(state, tmp_path / "ft")
    job = {"base": base, "models": [ft], "method": "task_arithmetic"}
    streammerge.merge(job, tmp_path / "out")
    found = load(tmp_path / "out")
    for key, tensor in state.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key].double(), tensor.double())


def test_mixed_dtypes_give_the_base_s_dtype(tmp_path: Path) -> None:
    base, ft = model(0, torch.bfloat16), model(1)
    job = {"base": save(base, tmp_path / "b"), "models": [save(ft, tmp_path / "f")], "method": "task_arithmetic"}
    streammerge.merge({**job, "parameters": {"coefficient": 0.5}}, tmp_path / "out")
    for name, tensor in load(tmp_path / "out").items():
        wide = base[name].float()
        assert torch.equal(tensor, (wide + 0.5 * (ft[name] - wide)).bfloat16()), name


def test_float64_is_merged_in_float64(tmp_path: Path) -> None:
    base, ft = model(0, torch.float64), model(1, torch.float64)
    job = {"base": save(base, tmp_path / "b"), "models": [save(ft, tmp_path / "f")], "method": "task_arithmetic"}
    streammerge.merge(job, tmp_path / "out")
    for name, tensor in load(tmp_path / "out").items():
        torch.testing.assert_close(tensor, base[name] + 0.7 * (ft[name] - base[name]), rtol=1e-15, atol=1e-15)


def test_odd_shapes_are_merged(tmp_path: Path) -> None:
    base = {
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 3),
        "vector": torch.arange(5.0),
        "cube": torch.ones(2, 3, 4),
    }
    ft = {name: tensor + 1 for name, tensor in base.items()}
    job = {"base": save(base, tmp_path / "b"), "models": [save(ft, tmp_path / "f")], "method": "task_arithmetic"}
    streammerge.merge({**job, "parameters": {"coefficient": 0.5}}, tmp_path / "out")
    found = load(tmp_path / "out")
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in base.items()
    }
    assert all(torch.equal(found[name], tensor + 0.5) for name, tensor in base.items())


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.int32])
def test_integers_are_copied_where_all_agree_and_refused_where_not(tmp_path: Path, dtype: torch.dtype) -> None:
    base = {**model(0), "position_ids": torch.tensor([0, 1, 1]).to(dtype)}
    other = {**model(1), "position_ids": torch.tensor([0, 1, 0]).to(dtype)}
    same = {**other, "position_ids": base["position_ids"]}
    names = {
        "base": save(base, tmp_path / "b"),
        "other": save(other, tmp_path / "o"),
        "same": save(same, tmp_path / "s"),
    }
    job = {"base": names["base"], "method": "ties"}
    streammerge.merge({**job, "models": [names["same"]]}, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")["position_ids"], base["position_ids"])
    with pytest.raises(IncompatibleCheckpointsError, match=r"o: tensor 'position_ids' .* other values"):
        streammerge.merge({**job, "models": [names["other"]]}, tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_side_files_are_taken_over_verbatim(trio: dict[str, str], tmp_path: Path) -> None:
    base = Path(trio["base"])
    files = {"tokenizer.json": b'{"a": 1}', "nested/notes.txt": b"\x00\xff", "chat_template.jinja": b"{{ x }}"}
    for name, content in files.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(content)
    (base / "README.md").write_text("the base's own card")
    result = streammerge.merge(recipe(trio, "linear"), tmp_path / "out")
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in files.items())
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()
    assert "the base's own card" not in (tmp_path / "out/README.md").read_text()
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == set(result["files"])


def test_overwrite_replaces_a_finished_merge_and_nothing_else(trio: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    streammerge.merge({**recipe(trio, "linear"), "max_shard_bytes": 3000}, out)
    result = streammerge.merge(recipe(trio, "ties"), out, overwrite=True)
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == set(result["files"])
    assert result["recipe"]["method"] == "ties"
    (out / "mine.txt").write_text("keep me")
    with pytest.raises(streammerge.errors.OutputExistsError, match=r"mine\.txt"):
        streammerge.merge(recipe(trio, "linear"), out, overwrite=True)
    assert load(out).keys() == load(Path(trio["base"])).keys()


@pytest.mark.parametrize(("dtype", "stored"), [(torch.float16, "F16"), (torch.float8_e5m2, "F8_E5M2")])
def test_what_the_output_cannot_hold_is_an_error_or_counted(tmp_path: Path, dtype: torch.dtype, stored: str) -> None:
    """Finite inputs whose merge overflows: base 0, fine-tune near the largest value, coefficient 3 for two elements."""
    largest = torch.finfo(dtype).max
    name = "model.layers.0.mlp.up_proj.weight"
    tuned = torch.full((8, 16), largest / 8)
    tuned[2, 3], tuned[7, 15] = largest, -largest
    for folder, value in (("base", torch.zeros(8, 16)), ("ft", tuned)):
        (tmp_path / folder).mkdir()
        save_file({name: value.to(dtype)}, tmp_path / folder / "model.safetensors", {"format": "pt"})
        (tmp_path / folder / "config.json").write_text("{}")
    recipe: dict[str, Any] = {
        "base": str(tmp_path / "base"),
        "models": [str(tmp_path / "ft")],
        "method": "task_arithmetic",
        "parameters": {"coefficient": 3.0},
    }
    with pytest.raises(CheckpointError, match=rf"'{name}': 2 of its merged values are too large for {stored}"):
        streammerge.merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = streammerge.merge({**recipe, "allow_nonfinite": True}, tmp_path / "out")
    assert result["tensors"][name]["nonfinite"] == 2
    (merged,) = load(tmp_path / "out").values()
    assert int(merged.float().isfinite().logical_not().sum()) == 2
    assert (
        "nonfinite"
        not in streammerge.merge({**recipe, "parameters": {"coefficient": 1.0}}, tmp_path / "fits")["tensors"][name]
    )
