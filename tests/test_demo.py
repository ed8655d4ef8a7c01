"""The demo: a pair made on the spot, merged, loaded, asked; again in the same folder; never in a foreign one."""

from pathlib import Path

import pytest
import torch
import transformers

from streammerge import verify
from streammerge.cli import main
from streammerge.demo import MARKER, run
from streammerge.errors import OutputExistsError

STEPS = 6


def test_runs_loads_and_runs_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    threads, verbosity = torch.get_num_threads(), transformers.utils.logging.get_verbosity()
    result = run(out, progress=False, steps=STEPS)
    assert torch.get_num_threads() == threads and transformers.utils.logging.get_verbosity() == verbosity
    printed = capfd.readouterr()
    assert printed.err == ""
    assert "Fisher mean" in printed.out and "Q: 7+5? A:" in printed.out and str(out / "merged") in printed.out
    assert [block["block"] for block in result["blocks"]] == [0, 1, 2, 3]
    assert verify(out / "merged")["ok"]

    model = transformers.AutoModelForCausalLM.from_pretrained(out / "merged", local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "merged", local_files_only=True)
    text = "Q: 7+5, aloud? A: 7+5 is 12. So 12.\n"
    prompt = tokenizer(text, return_tensors="pt")
    assert prompt.input_ids.shape == (1, len(text)) and tokenizer.decode(prompt.input_ids[0]) == text
    assert model.generate(**prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, len(text) + 3)
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (out / "merged" / file).read_bytes() == (out / "base" / file).read_bytes()

    (out / "notes.txt").write_text("mine")
    assert run(out, progress=False, steps=STEPS) == result
    assert sorted(path.name for path in out.iterdir()) == [MARKER, "base", "ft", "merged", "notes.txt"]


def test_foreign_files_stay(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_text("mine")
    with pytest.raises(OutputExistsError, match="holds no earlier demo"):
        run(tmp_path, steps=STEPS)
    assert main(["demo", "--out", str(tmp_path), "--quiet"]) == 1
    assert capfd.readouterr().err.count("\n") == 1
    assert list(tmp_path.rglob("*")) == [tmp_path / "base", tmp_path / "base" / "model.safetensors"]

    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(OutputExistsError, match="is a file"):
        run(file, steps=STEPS)

    ours = tmp_path / "ours"
    (ours / "merged").mkdir(parents=True)
    (ours / MARKER).touch()
    (ours / "merged" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="thesis"):  # at once, not after the training
        run(ours, steps=STEPS)
    assert not (ours / "base").exists()
