"""What `fisher.json` records, and what a reuse is held against."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.errors import CheckpointError, IncompatibleCheckpointsError
from streammerge.fisher.store import (
    BaseIdentity,
    FisherRecord,
    FisherSettings,
    TensorFisher,
    check_same_base,
    open_fisher,
    pool_blocks,
)

NAME = "model.layers.0.w"


def settings(**values: object) -> FisherSettings:
    return FisherSettings.model_validate(values)


def record(base: Checkpoint, **values: object) -> FisherRecord:
    return FisherRecord(
        version="0",
        base=BaseIdentity(id=base.id, revision="abc", fingerprint=base.fingerprint()),
        settings=settings(dtype="bfloat16", **values),
        files=[],
        loss=1.0,
        device="cpu",
        blocks=[],
        tensors={NAME: TensorFisher(block=0, numel=6, mean=1.0, max=1.0)},
    )


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Checkpoint]:
    (tmp_path / "base").mkdir()
    save_file({NAME: torch.zeros(2, 3)}, tmp_path / "base/model.safetensors")
    with Checkpoint.open(tmp_path / "base", need_config=False) as checkpoint:
        yield checkpoint


def save(folder: Path, made: FisherRecord, shape: tuple[int, ...] = (2, 3)) -> Path:
    folder.mkdir()
    save_file({NAME: torch.ones(shape, dtype=torch.bfloat16)}, folder / "model.safetensors")
    (folder / "fisher.json").write_text(json.dumps(made.model_dump()))
    return folder


def test_blocks_are_pooled_by_element_count() -> None:
    tensors = {
        "a": TensorFisher(block=0, numel=10, mean=1.0, max=3.0),
        "b": TensorFisher(block=0, numel=30, mean=2.0, max=9.0),
        "c": TensorFisher(block=1, numel=5, mean=6.0, max=7.0),
        "norm": TensorFisher(block=1, numel=100, mean=1e9, max=1e9),
    }
    first, second = pool_blocks(tensors, ["a", "b", "c"])
    assert (first.block, first.mean, first.max, first.share) == (0, 1.75, 9.0, 0.7)
    assert (second.block, second.mean, second.max, second.share) == (1, 6.0, 7.0, pytest.approx(0.3))


def test_the_ratio_is_that_of_the_means(base: Checkpoint) -> None:
    tensors = {
        name: TensorFisher(block=i, numel=1, mean=m, max=m) for i, (name, m) in enumerate([("a", 8.0), ("b", 2.0)])
    }
    made = record(base).model_copy(update={"blocks": pool_blocks(tensors, tensors)})
    assert made.ratio == 4
    assert record(base).ratio is None


def test_a_fitting_fisher_opens(base: Checkpoint, tmp_path: Path) -> None:
    checkpoint, made = open_fisher(save(tmp_path / "f", record(base)), base, settings(), [NAME])
    with checkpoint:
        assert checkpoint.tensors[NAME].shape == (2, 3)
    check_same_base(made, base, base.fingerprint())
    with pytest.raises(IncompatibleCheckpointsError, match=r"made from .*base@abc"):
        check_same_base(made, base, "another")


@pytest.mark.parametrize(
    ("key", "made", "asked"),
    [("samples", 4, 8), ("length", 32, 64), ("seed", 1, 42), ("compute_dtype", "float32", None)],
)
def test_other_settings_are_refused(base: Checkpoint, tmp_path: Path, key: str, made: object, asked: object) -> None:
    folder = save(tmp_path / "f", record(base, **{key: made}))
    with pytest.raises(IncompatibleCheckpointsError, match=rf"{key} is {made}, asked for {asked}"):
        open_fisher(folder, base, settings(), [NAME])
    open_fisher(folder, base, settings(**{key: made}), [NAME])[0].close()


def test_the_stored_dtype_matters_only_when_asked_for(base: Checkpoint, tmp_path: Path) -> None:
    folder = save(tmp_path / "f", record(base))
    open_fisher(folder, base, settings(dtype="bfloat16"), [NAME])[0].close()
    with pytest.raises(IncompatibleCheckpointsError, match="dtype is bfloat16, asked for float32"):
        open_fisher(folder, base, settings(dtype="float32"), [NAME])


def test_other_tensors_are_refused(base: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(IncompatibleCheckpointsError, match=NAME):
        open_fisher(save(tmp_path / "shape", record(base), (3, 2)), base, settings(), [NAME])
    with pytest.raises(CheckpointError, match=r"no fisher\.json"):
        open_fisher(tmp_path / "base", base, settings(), [NAME])
