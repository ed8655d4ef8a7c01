"""The synthetic pairs of the benchmarks: same call, same bytes; real names; loadable; never over something else."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import make_checkpoints
import pytest
import torch
from make_checkpoints import BLOCK, EMBEDDING, HEAD, SHAPES, main, make_pair
from torch import Tensor

from streammerge.checkpoints.checkpoint import Checkpoint
from streammerge.errors import OutputExistsError, RecipeError
from streammerge.fisher.probes import probe_tokens
from streammerge.fisher.store import FisherSettings

FILES = ("config.json", "model.safetensors", "tokenizer.json")


def tensors(folder: Path) -> dict[str, Tensor]:
    with Checkpoint.open(folder) as checkpoint:
        return {name: checkpoint.tensor(name) for name in checkpoint.tensors}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_pair("tiny", tmp_path_factory.mktemp("trio"), experts=2)


def test_same_seed_same_bytes(trio: list[Path], tmp_path: Path) -> None:
    make_pair("tiny", tmp_path / "again", experts=2)
    make_pair("tiny", tmp_path / "other", experts=2, seed=1)
    expected = content(trio[0].parent)
    files = {f"{model}/{file}" for model in ("base", "ft", "ft2") for file in FILES}
    assert expected.keys() == files
    assert content(tmp_path / "again") == expected
    other = content(tmp_path / "other")
    assert all(other[file] != expected[file] for file in files if file.endswith(".safetensors"))


def test_bytes_do_not_depend_on_shards_or_on_the_other_models(trio: list[Path], tmp_path: Path) -> None:
    base, ft = make_pair("tiny", tmp_path, max_shard_size="100KB", ft_tie=False)
    assert len([*base.glob("model-*.safetensors")]) > 2
    assert same(tensors(base), tensors(trio[0]))
    untied = tensors(ft)
    untied.pop(HEAD)
    assert same(untied, tensors(trio[1]))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("ft_tie", [True, False])
def test_tied_and_untied_models_load_with_transformers(tmp_path: Path, tie: bool, ft_tie: bool) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    folders = make_pair("tiny", tmp_path, tie=tie, ft_tie=ft_tie)
    for folder, tied in zip(folders, (tie, ft_tie), strict=True):
        stored = tensors(folder)
        assert (HEAD in stored) is not tied
        config = AutoConfig.from_pretrained(folder)
        assert (config.tie_word_embeddings, config.rope_parameters["rope_theta"]) == (tied, 1e6)
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        model, info = loaded
        assert not any(info.values()), info
        assert model.dtype == torch.bfloat16
        assert same(stored, {name: p.detach() for name, p in model.named_parameters()})
        with torch.no_grad():
            logits = model(torch.arange(64).reshape(2, 32)).logits
        assert logits.isfinite().all() and logits.std() > 0.01


def test_the_tokenizer_reads_any_text(trio: list[Path]) -> None:
    """With ids inside the smallest vocabulary, and a Fisher's probe text can be read."""
    from transformers import AutoTokenizer

    text = "".join(map(chr, range(32, 127))) + "\n\tthe cat  sat \u00e9\u4e2d\U0001f600" * 3
    for folder in trio:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
        assert max(ids) < 256 < len(tokenizer) <= SHAPES["tiny"].vocab_size
        assert tokenizer.eos_token_id == 256
    (trio[0].parent.parent / "text").write_text(text * 2)
    settings = FisherSettings(samples=3, length=64, probe_text=str(trio[0].parent.parent / "text"))
    with Checkpoint.open(trio[0]) as base:
        assert probe_tokens(base, SHAPES["tiny"].vocab_size, settings).shape == (3, 64)


def test_an_untied_fine_tune_of_a_tied_base_has_a_head_near_the_embedding(tmp_path: Path) -> None:
    base, ft = map(tensors, make_pair("tiny", tmp_path, ft_tie=False))
    distance = (ft[HEAD].float() - base[EMBEDDING].float()).square().mean().sqrt()
    assert 0.002 < distance < 0.004
    assert not torch.equal(ft[HEAD], ft[EMBEDDING])


@pytest.mark.parametrize(("dtype", "ft_dtype"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", None)])
def test_each_side_has_its_dtype(tmp_path: Path, dtype: str, ft_dtype: str | None) -> None:
    for folder, expected in zip(
        make_pair("tiny", tmp_path, dtype=dtype, ft_dtype=ft_dtype), (dtype, ft_dtype or dtype), strict=True
    ):
        assert {tensor.dtype for tensor in tensors(folder).values()} == {getattr(torch, expected)}
        assert json.loads((folder / "config.json").read_text())["torch_dtype"] == expected


def test_task_vectors_are_sparse_and_change_with_depth(tmp_path: Path) -> None:
    base, *experts = map(tensors, make_pair("tiny", tmp_path, experts=2, ft_dtype="float32"))
    rising, falling = (
        [
            (expert[name] - base[name].float()).square().mean().sqrt().item()
            for name in (f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(4))
        ]
        for expert in experts
    )
    expected = [0.001, 0.005 / 3, 0.007 / 3, 0.003]
    assert rising == pytest.approx(expected, rel=0.1) and falling == pytest.approx(expected[::-1], rel=0.1)
    untouched = torch.cat([(experts[0][name] == base[name].float()).flatten() for name in base])
    assert untouched.float().mean() == pytest.approx(0.5, abs=0.01)


def test_blocks_of_a_tensor_are_unlike(tmp_path: Path) -> None:
    shape = replace(SHAPES["tiny"], vocab_size=4 * BLOCK // 64 + 1)
    base, _ = make_pair(shape, tmp_path)
    embedding = tensors(base)[EMBEDDING].float()
    assert embedding.std() == pytest.approx(0.02, rel=0.25)
    assert torch.corrcoef(embedding.flatten()[: 4 * BLOCK].view(4, BLOCK)).fill_diagonal_(0).abs().max() < 0.03
    assert embedding[-1].std() == pytest.approx(0.02, rel=0.5)  # the last block is a short one


def test_shapes_have_the_real_parameter_counts() -> None:
    counts = {
        name: sum(math.prod(size) for _, size in shape.tensors(shape.tie_word_embeddings))
        for name, shape in SHAPES.items()
        if name != "tiny"
    }
    assert counts == {"qwen2-0.5b": 494_032_768, "qwen2-1.5b": 1_543_714_304, "qwen2-7b": 7_615_616_512}


def test_refuses_an_output_that_holds_something(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="not an empty folder"):
        make_pair("tiny", tmp_path)
    with pytest.raises(OutputExistsError, match=r"notes\.txt is not an empty folder"):
        make_pair("tiny", tmp_path / "notes.txt")
    assert main(["tiny", "--out", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: output ") and err.count("\n") == 1
    assert content(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "huge"}, "unknown shape 'huge'"),
        ({"ft_dtype": "int8"}, "unknown dtype 'int8'"),
        ({"experts": -1}, "must not be negative"),
        ({"max_shard_size": "big"}, "not a size"),
    ],
)
def test_refuses_nonsense_before_it_writes(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_pair(**{"shape": "tiny", "folder": tmp_path / "out", **options})
    assert not [*tmp_path.iterdir()]


def test_a_base_alone(tmp_path: Path) -> None:
    assert make_pair("tiny", tmp_path / "out", experts=0, say=lambda line: None) == [tmp_path / "out/base"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["base"]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["tiny", "--out", str(out), "--no-tie", "--ft-tie", "--ft-dtype", "float32", "--experts", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(out / name) for name in ("base", "ft", "ft2")]
    assert "51 tensors" in lines[0] and lines[0].endswith("untied") and "float32" in lines[1]
    assert main(["tiny", "--out", str(tmp_path / "two"), "--ft-no-tie"]) == 0
    assert HEAD not in tensors(tmp_path / "two/base") and HEAD in tensors(tmp_path / "two/ft")
    with pytest.raises(SystemExit, match="2"):
        main(["huge", "--out", str(tmp_path / "three")])


def test_a_failure_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(self: object, name: str, block: int, count: int, expert: int) -> Tensor:
        if name == "model.norm.weight":
            raise KeyboardInterrupt
        return torch.zeros(count)

    monkeypatch.setattr(make_checkpoints.Blocks, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        make_pair("tiny", tmp_path / "out")
    assert not (tmp_path / "out").exists()
