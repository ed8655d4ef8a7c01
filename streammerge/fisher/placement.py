"""Where a Fisher pass runs and how much memory it takes, from headers alone; imports torch only beside a GPU."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from streammerge.checkpoints.checkpoint import Checkpoint, block_index, decoder_prefix
from streammerge.checkpoints.header import DTYPES
from streammerge.compatibility import HEAD, embedding_and_head
from streammerge.fisher.store import FisherSettings

GROUP_TOKENS = 256  # tokens that go through a block together
HEAD_TOKENS = 512  # tokens that go past the head together
HEAD_BYTES = 8 << 20  # of the head, at a time
HEAD_LOGITS = 2 << 20  # of all tokens, at a time
SQUARES = 3 << 20  # elements of all sequences' gradients at a time

SCIPY_BYTES = 41 * 2**20  # which transformers imports where it is installed, as by the extra `eval`
# A process that has imported torch, transformers and accelerate, and built the empty model.
IMPORT_BYTES = 408 * 2**20 + (SCIPY_BYTES if find_spec("scipy") else 0)
CUDA_BYTES = 600 * 2**20  # what its first use of a GPU adds


@dataclass(frozen=True)
class FisherRun:
    """How a Fisher pass is run. Nothing here changes its result but the device, by rounding.

    Attributes:
        device: "cpu", "cuda", "cuda:1"; None: a GPU where there is one.
        max_vram: bytes on the GPU; None: 90% of what is free.
        device_map: "auto", or a JSON file of module names and devices, as accelerate's.
        trust_remote_code: run Python code that the model brings.
    """

    device: str | None = None
    max_vram: int | None = None
    device_map: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class FisherMemory:
    """Bytes a Fisher pass takes, from headers alone.

    Attributes:
        block: the largest decoder block, as it is stored.
        work: activations, thin factors, temporaries; whatever the number of blocks.
    """

    block: int
    work: int

    @property
    def on_cpu(self) -> int:
        """The block in work, and the work."""
        return self.block + self.work

    @property
    def on_gpu(self) -> int:
        """Two blocks, the one in work and the one that is fetched, and the work."""
        return 2 * self.block + self.work


def default_device() -> str:
    """The first GPU where there is one, else the CPU. Where there is no driver, torch is not even imported."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def fisher_memory(base: Checkpoint, settings: FisherSettings) -> FisherMemory:
    """What a pass over this model takes, whatever the device."""
    prefix = decoder_prefix(base.tensors)
    compute = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}.get(settings.compute_dtype or "", 0)
    share = _routed_share(base.config)
    blocks: dict[int, int] = {}
    thin: dict[int, int] = {}
    vocabulary = hidden = width = matrix = one_by_one = 0
    for name, info in base.tensors.items():
        number = block_index(name, prefix)
        if number is None:
            if len(info.shape) == 2 and info.shape[0] > vocabulary:
                vocabulary, hidden = info.shape
            continue
        blocks[number] = blocks.get(number, 0) + info.nbytes
        width = max(width, DTYPES[info.dtype].bits // 8)
        if len(info.shape) > 1:
            expert = "experts." in name
            one_by_one |= expert
            tokens = sum(info.shape[-2:]) * (share * (info.shape[0] if len(info.shape) > 2 else 1) if expert else 1)
            thin[number] = thin.get(number, 0) + int(tokens)
            matrix = max(matrix, sum(info.shape[-2:]))
    compute = compute or width
    tokens = settings.samples * settings.length
    group = (
        settings.length if one_by_one or settings.all_parameters else min(tokens, max(settings.length, GROUP_TOKENS))
    )
    widest = max(thin.values(), default=0)
    # Fitted on the 0.5B, 1.5B and 7B shapes, in bfloat16 and float32: within 6% with 8 samples, 14% with 32.
    through_block = tokens * widest * compute + group * widest * 10 + (tokens * matrix * 4 if compute < 4 else 0)
    through_block += attention_bytes(base.config, settings.samples, settings.length)
    past = min(tokens, HEAD_TOKENS)
    rows = head_rows(hidden * width, past)
    through_head = past * (32 * hidden + 44 * rows) + 12 * (tokens - past) * hidden + 2 * HEAD_BYTES
    return FisherMemory(max(blocks.values(), default=0), max(through_block, through_head) + 12 * SQUARES)


@dataclass(frozen=True)
class FisherDisk:
    """Bytes a Fisher pass writes, from headers alone.

    Attributes:
        result: the Fisher, which stays.
        scratch: what goes from block to block and from forward to backward, until the pass is done.
    """

    result: int
    scratch: int


def fisher_disk(base: Checkpoint, settings: FisherSettings) -> FisherDisk:
    """What a pass over this model writes."""
    prefix = decoder_prefix(base.tensors)
    share = _routed_share(base.config)
    compute = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}.get(settings.compute_dtype or "", 0)
    result = rows = hidden = width = 0
    blocks = set()
    for name, info in base.tensors.items():
        number, matrix = block_index(name, prefix), len(info.shape) > 1
        if info.floating and (settings.all_parameters or (number is not None and matrix)):
            result += info.numel * (4 if settings.dtype == "float32" else 2)
        if number is None:
            hidden = max(hidden, info.shape[-1] if matrix else 0)
            continue
        blocks.add(number)
        width = max(width, DTYPES[info.dtype].bits // 8)
        rows += int(math.prod(info.shape[:-1]) * (share if "experts." in name else 1)) if matrix else 0
    tokens = settings.samples * settings.length
    return FisherDisk(result, tokens * (compute or width) * (rows + hidden * (len(blocks) + 2)))


def walk_reads(base: Checkpoint, tokens: int, *, times: int, stay: Collection[int], heads: int) -> dict[str, int]:
    """How many bytes of each tensor a walk through the blocks reads, from headers alone.

    Args:
        base: the model.
        tokens: how many rows of its embedding.
        times: how often the blocks: 1 forward, 2 forward and back, but then the last one once.
        stay: blocks that are read once.
        heads: how often the head.
    """
    prefix = decoder_prefix(base.tensors)
    embedding, head = embedding_and_head(base)
    numbers = {name: block_index(name, prefix) for name in base.tensors}
    last = max((number for number in numbers.values() if number is not None), default=None)
    reads = {}
    for name, info in base.tensors.items():
        if numbers[name] is not None:
            reads[name] = info.nbytes * (1 if numbers[name] in stay or numbers[name] == last else times)
        elif info is embedding:
            reads[name] = info.nbytes // max(info.shape[0], 1) * min(tokens, info.shape[0])
        elif name != HEAD:
            reads[name] = info.nbytes
        if info is head:
            reads[name] = reads.get(name, 0) + heads * info.nbytes
    return reads


def expected_tokens(base: Checkpoint, draws: int) -> int:
    """How many different tokens so many random draws are expected to give."""
    embedding, _ = embedding_and_head(base)
    vocabulary = embedding.shape[0] if embedding and embedding.shape else 0
    return round(vocabulary * (1 - (1 - 1 / vocabulary) ** draws)) if vocabulary else 0


def streamed_bytes(base: Checkpoint, reads: Mapping[str, int]) -> int:
    """Of these reads, what comes over the network."""
    return sum(count for name, count in reads.items() if base.is_streamed(base.tensors[name]))


def head_rows(row_bytes: int, tokens: int) -> int:
    """How many rows of the head are walked at a time."""
    return max(1, min(HEAD_BYTES // max(row_bytes, 1), HEAD_LOGITS // max(tokens, 1)))


def attention_bytes(config: Mapping[str, Any], samples: int, length: int) -> int:
    """Scores of every token for every other, of the sequences that go through a block together, and all masks.

    Measured with 4 and 14 heads on 1024 to 4096 tokens, in bfloat16 and float32: 7 to 13 bytes for a score.
    """
    text = config.get("text_config")
    stated = {**config, **(text if isinstance(text, dict) else {})}
    heads = next(
        (n for key in ("num_attention_heads", "n_head", "n_heads") if isinstance(n := stated.get(key), int)), 1
    )
    together = max(1, min(samples, GROUP_TOKENS // length))
    return (12 * heads * together + 4 * samples) * length**2


def _routed_share(config: Mapping[str, Any]) -> float:
    """The part of a mixture's experts that a token goes through."""
    counts = [config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(key)]
    return min(1.0, float(config.get("num_experts_per_tok", 1)) / counts[0]) if counts else 1.0
