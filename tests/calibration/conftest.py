"""A base and two fine-tunes of any architecture, with a tokenizer and a text; live, and on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest
import torch
from fisher.models import build
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from streammerge.calibration.store import CalibrationSettings
from streammerge.checkpoints.checkpoint import Checkpoint

TEXT = "thequickbrownfoxjumpsoverthelazydogandrunsawayfromaveryangrybear" * 12
SAMPLES, LENGTH = 5, 12


@dataclass(frozen=True)
class Family:
    """Live models in float32, their folders, and the settings of a calibration."""

    models: list[Any]
    folders: list[Path]
    settings: CalibrationSettings

    def open(self) -> list[Checkpoint]:
        return [Checkpoint.open(folder) for folder in self.folders]

    @property
    def ids(self) -> Tensor:
        """The windows of the text, by hand: ids 0 to 25 are the letters."""
        return windows_of(TEXT)


def windows_of(text: str) -> Tensor:
    ids = [ord(letter) - ord("a") for letter in text]
    starts = [i * (len(ids) - LENGTH) // (SAMPLES - 1) for i in range(SAMPLES)]
    return torch.tensor([ids[start : start + LENGTH] for start in starts])


def letters() -> PreTrainedTokenizerFast:
    """A token per letter, for any architecture; line breaks are nothing."""
    vocabulary = {letter: number for number, letter in enumerate(ascii_lowercase)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary | {"<unk>": 26}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\n"), "removed"), pre_tokenizers.Split(Regex("."), "isolated")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture
def family(tmp_path: Path) -> Callable[..., Family]:
    def make(kind: str = "qwen2", tied: bool = True, dtype: torch.dtype = torch.float32, **settings: Any) -> Family:
        models = [build(kind, tied).to(dtype)]
        for seed in (1, 2):
            models.append(build(kind, tied).to(dtype))
            torch.manual_seed(seed)
            with torch.no_grad():
                for parameter in models[-1].parameters():
                    parameter.add_(0.03 * torch.randn_like(parameter))
        folders = [tmp_path / name for name in ("base", "one", "two")]
        for model, folder in zip(models, folders, strict=True):
            model.save_pretrained(folder)
        letters().save_pretrained(folders[0])
        (tmp_path / "text.txt").write_text(TEXT)
        values = {"text": [str(tmp_path / "text.txt")], "samples": SAMPLES, "length": LENGTH, **settings}
        return Family([model.float() for model in models], folders, CalibrationSettings.model_validate(values))

    return make
