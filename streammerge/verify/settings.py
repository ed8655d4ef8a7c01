"""How a merge is held against its sources."""

from typing import Annotated, Literal

from pydantic import Field

from streammerge.budget import DEFAULT_MAX_RAM
from streammerge.schema import Strict


class SourceCheck(Strict):
    """Which tensors are merged again, and from what: inputs that moved are named anew, their content is the same."""

    sample: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
        16, description="how many tensors to merge again, or all"
    )
    seed: int = Field(0, ge=0, description="which ones")
    base: str | None = Field(None, description="where the base model is now")
    models: list[str] = Field(default=[], description="where the fine-tuned models are now, in their order")
    fisher: list[str] = Field(default=[], description="folder of the Fisher the merge was made with")
    hub_mode: Literal["cache", "stream"] = Field("cache", description="how models on the Hub are read")
    max_ram: int = Field(DEFAULT_MAX_RAM, ge=1, description="bytes for buffers and temporaries")
    threads: int | None = Field(None, ge=1, description="workers")
