"""What a diagnosis measures, and on which tokens."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from streammerge.errors import RecipeError
from streammerge.fisher.store import ComputeDType
from streammerge.schema import Strict

RankOf = Literal["eigenvalues", "singular"]


class DiagnoseSettings(Strict):
    """How models are diagnosed. The tokens are the Fisher's: random, unless a text is given."""

    text: str | None = Field(None, description="text to take the tokens from, plain or JSONL; random tokens without it")
    text_field: str = Field("text", description="field of a JSONL record that holds the text")
    samples: int = Field(8, ge=1, description="token sequences; of a text, windows evenly spread over it")
    length: int = Field(64, ge=2, description="tokens per sequence")
    seed: int = Field(42, ge=0, lt=2**63, description="seed of random tokens")
    compute_dtype: ComputeDType | None = Field(
        None, description="dtype of the forward passes; MODEL's own, with --nonlinearity float32"
    )
    rank: RankOf = Field(
        "eigenvalues",
        description="effective rank from the eigenvalues of the centred activations' covariance, or from their "
        "singular values as Roy and Vetterli: eigenvalues or singular",
    )
    nonlinearity: bool = Field(
        False,
        description="take MODEL as fine-tuned from the one model it is held against, and measure how far from linear "
        "its blocks are between the two",
    )
    alpha: float = Field(0.5, ge=0, le=1, description="where between the two --nonlinearity looks")

    def check(self, against: int) -> None:
        """Refuse settings that do not fit one another, or the number of models MODEL is held against.

        Raises:
            RecipeError: what is wrong, in one line.
        """
        if against < 1:
            raise RecipeError("give the models that it was merged from: --against")
        if self.nonlinearity and against > 1:
            raise RecipeError(f"--nonlinearity takes one --against, the base of MODEL; {against} given")
        unused = "rank" if self.nonlinearity else "alpha"
        if unused in self.model_fields_set:
            raise RecipeError(f"--{unused} says nothing {'with' if self.nonlinearity else 'without'} --nonlinearity")
        if self.text is None and "text_field" in self.model_fields_set:
            raise RecipeError("--text-field says nothing without --text")

    @property
    def tokens(self) -> str:
        """What the tokens are, in words."""
        where = "random tokens" if self.text is None else f"the text {self.text}"
        return f"{self.samples} sequences of {self.length} tokens, {where}"
