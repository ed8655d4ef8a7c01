"""Killed anywhere, a Fisher pass goes on where it was and ends with the bytes of one that was left alone."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
import torch
import transformers
from interrupted import Ended, Processes
from tiny_models import content, spoil
from transformers import AutoModelForCausalLM

from streammerge.errors import CheckpointError, OutputExistsError, TransferError
from streammerge.fisher import fisher
from streammerge.fisher.blocks import BlockModel
from streammerge.fisher.feed import BlockFeed
from streammerge.fisher.state import WalkState
from streammerge.fisher.store import FISHER_FILE, FisherSettings
from streammerge.fisher.walk import Walk

WORK = ".streammerge"
BLOCKS = 3
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "tie_word_embeddings": True,
}
MIXTURE: dict[str, Any] = {
    "num_experts": 24,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
    "mlp_only_layers": [1, 2],
    "head_dim": 8,
}
MODES = {"matrices": (), "all parameters": ("--all-parameters", "--dtype", "float32")}
SMALL = ("--length", "16", "--max-shard-size", "5KB", "--device", "cpu", "-q")


def save_model(folder: Path, kind: str = "qwen2", **changes: Any) -> Path:
    torch.manual_seed(5)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **changes})
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("qwen2") / "base")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its first block is a mixture of more experts than its tokens reach; the others are plain."""
    return save_model(tmp_path_factory.mktemp("mixture") / "base", "qwen3_moe", **MIXTURE)


@pytest.fixture(scope="module")
def processes(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with Processes(base, tmp_path_factory.mktemp("processes")) as processes:
        yield processes


@pytest.fixture(scope="module")
def undisturbed(
    base: Path, processes: Processes, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, bytes | None], list[str]]]:
    """Mode -> what an uninterrupted run leaves, and its steps."""
    runs = {}
    for mode, options in MODES.items():
        out = tmp_path_factory.mktemp("undisturbed") / "out"
        ended = processes.run("fisher", "--base", base, "--out", out, *SMALL, *options)
        assert ended.status == 0, ended.err
        runs[mode] = (content(out), ended.steps)
    return runs


def after(ended: Ended, what: str) -> set[int]:
    """The numbers at the end of the steps that a process finished: `after save input-2` is 2."""
    start = f"after {what}"
    return {int(step.removeprefix(start)) for step in ended.steps if step.startswith(start) and "#" not in step}


def is_not_repeated(killed: Ended, resumed: Ended) -> None:
    """Nothing that was durable when the process was killed is computed, or read, again."""
    forward = {index - 1 for index in after(killed, "save input-")}
    backward = after(killed, "save gradient-")
    assert not forward & after(resumed, "forward ")
    assert not backward & after(resumed, "backward ")
    assert BLOCKS not in backward or "before head" not in resumed.steps
    if backward:  # the way forward is behind: nothing but the blocks that are left is read, once each
        assert after(resumed, "read ") <= set(range(min(backward)))
        assert not any(step.startswith("before read") and "#" in step for step in resumed.steps)
    synced = max((i for i, step in enumerate(killed.steps) if step.startswith("after sync")), default=0)
    durable = {step.split()[2] for step in killed.steps[:synced] if step.startswith("after done ")}
    assert not durable & {step.split()[2] for step in resumed.steps if step.startswith("before write ")}


# --- SIGKILL ------------------------------------------------------------------------------------------------------

UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
PLACES = {
    "before anything": "before save input-0",
    "half-way through a block, forward": "after read 1",
    "an input is written but has no name yet": "before replace input-0002.safetensors",
    "right after an input was saved": "after save input-1",
    "before the head": "before head",
    "after the head, before its gradient": "before save gradient-3",
    "after the head": "after save gradient-3",
    "half-way through a tensor": f"after write {UP} 0",
    "half-way through a block's squares": f"after done {UP}",
    "between the squares and the gradient file": "before save gradient-1",
    "between the gradient file and what it replaces": "before forget gradient-2",
    "after the last block": "after save gradient-0",
    "before the files move": "before publish",
    "half-way through the move": "before replace model-00001-of-00002.safetensors",
    "after the move": "before remove",
}
OUTSIDE = {
    "while the final norm is written": "after write model.norm.weight 0",
    "before what lies outside the blocks": "before outside",
    "half-way through the tied embedding": "after write model.embed_tokens.weight 0",
    "after the tied embedding": "after done model.embed_tokens.weight",
    "after all is synced": "after outside",
}


ALL = [(mode, place) for mode in MODES for place in PLACES] + [("all parameters", place) for place in OUTSIDE]


@pytest.mark.parametrize(
    ("mode", "place", "sync_seconds"),
    [(*pair, 2.0) for pair in ALL] + [(*pair, 0.0) for pair in ALL if "half-way" in pair[1]],
)
def test_killed_at(
    base: Path,
    processes: Processes,
    undisturbed: dict[str, Any],
    tmp_path: Path,
    mode: str,
    place: str,
    sync_seconds: float,
) -> None:
    command = ("fisher", "--base", base, "--out", tmp_path / "out", *SMALL, *MODES[mode])
    step = (PLACES | OUTSIDE)[place].replace("00002.s", f"{_shards(undisturbed[mode][0]):05}.s")
    killed = processes.run(*command, at=step, sync_seconds=sync_seconds)
    assert (killed.status, killed.steps[-1]) == (-signal.SIGKILL, step), killed.err
    assert (tmp_path / "out" / WORK).is_dir()
    assert not list((tmp_path / "out").glob("*.safetensors")) or "move" in place
    resumed = processes.run(*command, threads=2)
    assert resumed.status == 0, resumed.err
    assert content(tmp_path / "out") == undisturbed[mode][0]
    is_not_repeated(killed, resumed)


def _shards(files: dict[str, bytes | None]) -> int:
    return sum(name.startswith("model-") for name in files)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_ten_times(
    base: Path, processes: Processes, undisturbed: dict[str, Any], tmp_path: Path, mode: str, seed: int
) -> None:
    """Ten random moments, one in each tenth of a run; each process goes on where the one before was killed."""
    expected, steps = undisturbed[mode]
    command = ("fisher", "--base", base, "--out", tmp_path / "out", *SMALL, *MODES[mode])
    draw = random.Random(seed)
    repeated = ("before read", "before fsync", "before forget")  # of which a later process may need none
    steps = [step for step in steps if step.startswith("before ") and not step.startswith(repeated) and "#" not in step]
    for number in range(10):
        step = draw.choice(steps[number * len(steps) // 10 : (number + 1) * len(steps) // 10])
        ended = processes.run(*command, at=step, threads=1 + number % 2)
        assert (ended.status, ended.steps[-1]) == (-signal.SIGKILL, step), ended.err
    ended = processes.run(*command)
    assert ended.status == 0, ended.err
    assert content(tmp_path / "out") == expected


@pytest.mark.parametrize("moment", [0.1, 0.6])
def test_killed_by_the_clock(base: Path, processes: Processes, tmp_path: Path, moment: float) -> None:
    """`python -m streammerge`, from outside, whatever it is at."""
    arguments = ["fisher", "--base", str(base), "--samples", "40", "--device", "cpu", "-q", "--all-parameters"]
    began = time.monotonic()
    assert processes.run(*arguments, "--out", tmp_path / "whole").status == 0
    lasts = time.monotonic() - began
    command = [sys.executable, "-m", "streammerge", *arguments, "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (tmp_path / "out" / WORK / "walk" / "input-0000.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    with suppress(subprocess.TimeoutExpired):  # a machine that was busy before may have become quick
        process.wait(moment * lasts)
    process.kill()
    process.wait()
    if (tmp_path / "out" / FISHER_FILE).exists():  # too late: it was done, or about to be
        rmtree(tmp_path / "out")
        test_killed_by_the_clock(base, processes, tmp_path / "sooner", moment / 2)
        return
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "out").iterdir()] == [WORK]
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("step", ["after write model.layers.0.mlp.gate_proj.weight 0", "after read 1", "before head"])
def test_ctrl_c(base: Path, processes: Processes, undisturbed: dict[str, Any], tmp_path: Path, step: str) -> None:
    command = ("fisher", "--base", base, "--out", tmp_path / "out", *SMALL)
    stopped = processes.run(*command, at=step, signal=signal.SIGINT)
    assert (stopped.status, stopped.err) == (130, "streammerge: stopped; the same command goes on where it was\n")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [WORK]
    resumed = processes.run(*command)
    assert resumed.status == 0, resumed.err
    assert content(tmp_path / "out") == undisturbed["matrices"][0]
    is_not_repeated(stopped, resumed)


# --- mixtures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expert", [5, 23])
def test_what_no_token_reached_is_the_same_after_an_interruption(
    mixture: Path, processes: Processes, tmp_path: Path, expert: int
) -> None:
    """It gets the mean of the block's other experts, of which an interrupted run has finished some."""
    command = ("fisher", "--base", mixture, "--samples", "1", *SMALL, "--out")
    whole = processes.run(*command, tmp_path / "whole")
    assert whole.status == 0, whole.err
    assert len(json.loads((tmp_path / "whole" / FISHER_FILE).read_text())["unreached"]) > 3
    done = [step for step in whole.steps if step.startswith("after done model.layers.0.mlp.experts.")]
    killed = processes.run(*command, tmp_path / "out", at=done[2 * expert], signal=signal.SIGINT)
    assert killed.status == 130
    resumed = processes.run(*command, tmp_path / "out")
    assert resumed.status == 0, resumed.err
    kept = {step for step in done if step in killed.steps} - set(resumed.steps)
    assert kept, "nothing of the block had been recorded: the test shows nothing"
    assert content(tmp_path / "out") == content(tmp_path / "whole")


MOVING = ["before replace fisher.json", "before replace model.safetensors.index.json", "before remove"]


# --- merge --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["after save input-2", f"after done {UP}", "after save gradient-1", *MOVING])
@pytest.mark.parametrize("keep", [False, True])
def test_a_merge_goes_on_in_its_fisher_pass(
    base: Path, processes: Processes, tmp_path: Path, step: str, keep: bool
) -> None:
    def command(out: str) -> list[object]:
        kept = ("--save-fisher", tmp_path / f"{out} fisher") if keep else ()
        return ["--base", base, "--ft", base, "--fisher-length", "16", *SMALL[2:], *kept, "--out", tmp_path / out]

    whole = processes.run(*command("whole"))
    assert whole.status == 0, whole.err
    killed = processes.run(*command("out"), at=step)
    assert killed.status == -signal.SIGKILL
    resumed = processes.run(*command("out"))
    assert resumed.status == 0, resumed.err
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    if keep:
        assert content(tmp_path / "out fisher") == content(tmp_path / "whole fisher")
    is_not_repeated(killed, resumed)
    assert step in MOVING or after(resumed, "backward ")


def test_a_slip_of_the_pen_costs_a_merge_nothing(base: Path, processes: Processes, tmp_path: Path) -> None:
    """What the next command is refused for is found before it touches what the one before has done."""
    command = ["--base", base, "--ft", base, "--fisher-length", "16", *SMALL[2:], "--out", tmp_path / "out"]
    assert processes.run(*command, at="after save gradient-1").status == -signal.SIGKILL
    left = content(tmp_path / "out")
    for wrong in (("--device", "cud"), ("--max-vram", "1GB"), ("--device-map", tmp_path / "none.json")):
        refused = processes.run(*command, *wrong)
        assert refused.status == 1 and wrong[0] in refused.err
        assert content(tmp_path / "out") == left
    resumed = processes.run(*command)
    assert resumed.status == 0 and after(resumed, "backward ") == {0}, resumed.err


# --- within one process -------------------------------------------------------------------------------------------


def settings(**values: Any) -> FisherSettings:
    return FisherSettings.model_validate({"length": 16, **values})


def stop_at(monkeypatch: pytest.MonkeyPatch, kind: str, index: int, error: BaseException) -> None:
    """Fail where the state is to be saved."""
    plain = WalkState.save

    def save(self: WalkState, of_kind: str, number: int, tensors: Any) -> None:
        if (of_kind, number) == (kind, index):
            raise error
        plain(self, of_kind, number, tensors)

    monkeypatch.setattr(WalkState, "save", save)


@pytest.fixture
def unfinished(base: Path, tmp_path: Path) -> Path:
    """A folder in which a pass, on random tokens with the default settings, was interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, "gradient", 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            fisher(str(base), tmp_path / "out", settings(), device="cpu")
    return tmp_path / "out"


@pytest.mark.parametrize(
    "changes",
    [{"seed": 43}, {"samples": 4}, {"length": 17}, {"dtype": "float32"}, {"compute_dtype": "float64"}],
    ids=lambda changes: next(iter(changes)),
)
def test_other_settings_do_not_finish_it(base: Path, unfinished: Path, changes: dict[str, Any]) -> None:
    left = content(unfinished)
    with pytest.raises(
        OutputExistsError, match=rf"unfinished run that differs in .*\b{next(iter(changes))}\b.*--overwrite"
    ):
        fisher(str(base), unfinished, settings(**changes), device="cpu")
    assert content(unfinished) == left


def test_another_base_does_not_finish_it(base: Path, unfinished: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", hidden_act="gelu")
    spoil(other, "model.norm.weight", 2.0)
    with pytest.raises(OutputExistsError, match=r"differs in base \(.* -> .*other\)"):
        fisher(str(other), unfinished, settings(), device="cpu")


def test_overwrite_starts_anew(base: Path, unfinished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    plain = BlockFeed._read
    monkeypatch.setattr(BlockFeed, "_read", lambda self, index, raw: (read.append(index), plain(self, index, raw)))
    fisher(str(base), unfinished, settings(), device="cpu", overwrite=True)
    assert read == [0, 1, 2, 1, 0]
    fisher(str(base), tmp_path / "whole", settings(), device="cpu")
    assert content(unfinished) == content(tmp_path / "whole")
    with pytest.raises(OutputExistsError, match="is not empty"):
        fisher(str(base), unfinished, settings(seed=1), device="cpu")
    fisher(str(base), unfinished, settings(seed=1), device="cpu", overwrite=True)
    assert json.loads((unfinished / FISHER_FILE).read_text())["settings"]["seed"] == 1


@pytest.mark.parametrize("full_at", [1, 20, 30])
def test_a_full_disk(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: int) -> None:
    writes = 0
    plain = os.pwrite

    def pwrite(fd: int, data: Any, offset: int) -> int:
        nonlocal writes
        writes += 1
        if writes >= full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(TransferError, match="No space left on device"):
            fisher(str(base), tmp_path / "out", settings(), device="cpu")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [WORK]
    fisher(str(base), tmp_path / "out", settings(), device="cpu")
    fisher(str(base), tmp_path / "whole", settings(), device="cpu")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_full_disk_under_the_state(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(target).name == "gradient-0001.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(TransferError, match=r"gradient-0001.*No space left on device"):
            fisher(str(base), tmp_path / "out", settings(), device="cpu")
    fisher(str(base), tmp_path / "out", settings(), device="cpu")
    fisher(str(base), tmp_path / "whole", settings(), device="cpu")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("resumed", [False, True])
def test_a_gradient_that_is_not_finite_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed: bool
) -> None:
    """Nor what an earlier run has left: to go on would not help."""
    if resumed:
        with monkeypatch.context() as patch:
            stop_at(patch, "gradient", 2, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                fisher(str(base), tmp_path / "out", settings(), device="cpu")
    plain = WalkState.load

    def load(self: WalkState, kind: str, index: int) -> dict[str, torch.Tensor]:
        found = plain(self, kind, index)
        if (kind, index) == ("gradient", 2):
            found["gradient"][3, 5] = torch.nan
        return found

    monkeypatch.setattr(WalkState, "load", load)
    with pytest.raises(CheckpointError, match="the gradient at decoder block 1 is not finite in sequence 3"):
        fisher(str(base), tmp_path / "out", settings(), device="cpu")
    assert [path.name for path in tmp_path.iterdir() if not resumed or any(path.iterdir())] == []


def test_a_note_survives_an_interruption(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that cannot be walked is noted by the process that meets it, and the record is written by another."""
    plain = BlockModel.__init__

    def init(self: BlockModel, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        self.head = None

    monkeypatch.setattr(BlockModel, "__init__", init)
    with monkeypatch.context() as patch:
        stop_at(patch, "gradient", 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            fisher(str(base), tmp_path / "out", settings(), device="cpu")
    fisher(str(base), tmp_path / "out", settings(), device="cpu")
    record = fisher(str(base), tmp_path / "whole", settings(), device="cpu")
    assert len(record.notes) == 1 and "all of it is in memory" in record.notes[0]
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("stop", "forward_steps"),
    [(("input", 2), [0, 1, 1, 2]), (("input", 3), [0, 1, 2, 2]), (("gradient", 2), [0, 1, 2])],
)
def test_sequences_that_went_one_by_one_still_do(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: tuple[str, int], forward_steps: list[int]
) -> None:
    """Only the first block mixes sequences up; to a process that begins behind it nothing else would tell."""
    monkeypatch.setattr(BlockModel, "all_linear", lambda self, wanted: True)
    sizes: list[tuple[int, int]] = []
    plain = Walk._forward

    def forward(self: Walk, feed: BlockFeed, index: int, recordings: list[Any], size: int) -> None:
        sizes.append((index, size))
        plain(self, feed, index, recordings, size)

    monkeypatch.setattr(Walk, "_forward", forward)
    with monkeypatch.context() as patch:
        stop_at(patch, *stop, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            fisher(str(mixture), tmp_path / "out", settings(), device="cpu")
    fisher(str(mixture), tmp_path / "out", settings(), device="cpu")
    assert sizes == [(0, 16), *((index, 1) for index in forward_steps)]
    fisher(str(mixture), tmp_path / "whole", settings(), device="cpu")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_another_text_does_not_finish_it(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(SIZES["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model = save_model(tmp_path / "model", "llama")  # of a Qwen2, transformers takes no tokenizer but Qwen2's
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(model)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(words) * 2)
    of_text = settings(probe_text=str(text), samples=2)
    with monkeypatch.context() as patch:
        stop_at(patch, "gradient", 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            fisher(str(model), tmp_path / "out", of_text, device="cpu")
    left = content(tmp_path / "out")
    text.write_text(" ".join(reversed(words)) * 2)
    with pytest.raises(OutputExistsError, match=r"unfinished run that differs in tokens \("):
        fisher(str(model), tmp_path / "out", of_text, device="cpu")
    with pytest.raises(OutputExistsError, match=r"differs in probe_text \(.*text.txt -> none\), tokens \("):
        fisher(str(model), tmp_path / "out", settings(samples=2), device="cpu")
    assert content(tmp_path / "out") == left
    text.write_text(" ".join(words) * 2)
    fisher(str(model), tmp_path / "out", of_text, device="cpu")
