"""What the forward pass computed, kept for the backward pass: the same bits as computed again."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from fisher.models import saved, settings
from tiny_models import content
from torch.nn import functional

from streammerge.errors import TransferError
from streammerge.fisher import fisher, linear
from streammerge.fisher.linear import LinearFunctions
from streammerge.fisher.recall import Recall
from streammerge.workers import Workers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_results_come_back_in_order_block_by_block(tmp_path: Path, dtype: torch.dtype) -> None:
    results = {block: [torch.randn(2, 3 + block).to(dtype), torch.randn(0, 4).to(dtype)] for block in range(3)}
    with Recall(tmp_path) as recall:
        for block, made in results.items():
            recall.begin(block)
            for result in made:
                recall.put(result.T)  # not contiguous
        for block in (2, 0, 1, 1):
            recall.begin(block)
            for result in results[block]:
                found = recall.get()
                assert found is not None and found.dtype == dtype and torch.equal(found, result.T)
        recall.begin(3)
        assert recall.get() is None, "computed by another process, or not at all"
    assert not any(tmp_path.iterdir()), "the file has no name"


def test_a_result_larger_than_one_write_takes_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pwrite` and `preadv` may do less than they are asked for."""
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:7], at))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: read(fd, [buffers[0][:5]], at))
    with Recall(tmp_path) as recall:
        result = torch.arange(50)
        recall.begin(0)
        recall.put(result)
        recall.put(result + 1)
        recall.begin(0)
        assert torch.equal(recall.get(), result) and torch.equal(recall.get(), result + 1)


def test_a_full_disk_is_a_transfer_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Recall(tmp_path) as recall:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(TransferError, match=r"scratch file cannot be written.*No space left"):
            recall.put(torch.ones(3))
    with pytest.raises(TransferError, match="scratch file cannot be made"):
        Recall(tmp_path / "missing")


def test_a_recalled_result_stands_in_for_the_product(tmp_path: Path, one: Workers) -> None:
    """And has the same gradients; one that was kept wrongly would be believed."""
    weight, x = torch.randn(4, 6).bfloat16(), torch.randn(1, 5, 6)
    outputs, gradients = [], []
    with Recall(tmp_path) as recall:
        recall.begin(0)
        with torch.no_grad(), LinearFunctions({"w": weight}, one, recall).group(1, 5):
            outputs.append(functional.linear(x, weight))
        for known in (recall, None):
            recall.begin(0)
            inputs = x.clone().requires_grad_()
            functions = LinearFunctions({"w": weight}, one, known)
            with functions.group(1, 5):
                outputs.append(functional.linear(inputs, weight))
                (outputs[-1] ** 2).sum().backward()
            gradients.append(inputs.grad)
            assert len(functions.factors["w"]) == 1
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("kind", ["qwen2", "mixtral"])
def test_without_recall_the_fisher_has_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = saved(tmp_path / "model", kind)
    products, kept = [], []
    plain, put = linear.product, Recall.put
    monkeypatch.setattr(linear, "product", lambda *args: products.append(1) or plain(*args))
    monkeypatch.setattr(Recall, "put", lambda self, result: kept.append(1) or put(self, result))
    fisher(str(folder), tmp_path / "with", settings(all_parameters=True), device="cpu")
    few, products = len(products), []
    monkeypatch.setattr(Recall, "get", lambda self: None)
    fisher(str(folder), tmp_path / "without", settings(all_parameters=True), device="cpu")
    assert len(products) == few + len(kept) // 2, "every product of the forward pass was made again"
    assert content(tmp_path / "with") == content(tmp_path / "without")
