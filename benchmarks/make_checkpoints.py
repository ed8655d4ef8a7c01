"""Write a synthetic base model and fine-tunes of it in a real model's shape, never holding a whole tensor.

    python benchmarks/make_checkpoints.py qwen2-1.5b --out pair --ft-no-tie     # pair/base and pair/ft
    python benchmarks/make_checkpoints.py tiny --out trio --experts 2           # trio/base, trio/ft and trio/ft2

The folders load with transformers (Qwen2ForCausalLM, and a tokenizer of bytes, for what needs a text) and merge like
real ones; what they say is noise.

- **Base.** Matrices are Gaussian with mean 0 and a standard deviation of 0.016 to 0.024 that differs per matrix, norm
  weights 1 +- 0.1, biases 0 +- 0.02: a forward pass stays finite.
- **Fine-tune** = base as stored + task vector. Half of the task vector is exactly zero, the rest is the product of two
  Gaussians (heavy tails: kurtosis 18 in all). Its rms is 0.002 times 0.5 at the embedding and the first decoder
  block, rising linearly to 1.5 at the last block, the final norm and the head; for the second, fourth, ... expert it
  falls from 1.5 to 0.5. Where the base is tied and the fine-tune is not, its head is the base's embedding plus a task
  vector of its own, as in a real pair (Qwen2.5-Math-1.5B and DeepSeek-R1-Distill-Qwen-1.5B).
- **Drawn once, used often.** Three pools of 2**20 normals (numpy's Philox) are drawn once. A block of 32,768 elements
  of a tensor is a slice of pool A times cos(angle) plus a slice of pool B times sin(angle), scaled; its task vector is
  a slice of pool T times a slice of pool A. Tensors and blocks differ, have the right moments and full rank, but hold
  far fewer independent values than elements: fine for time, memory and tests of merging, no use as random numbers.
- **Deterministic.** Places and angle are a hash of (seed, model, tensor name, block number). A tensor's bytes depend on
  these, the shape and the dtypes (the head's also on a tied base); not on shards, threads or the number of experts.
"""

import argparse
import hashlib
import json
import math
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm

from streammerge.checkpoints.checkpoint import block_index
from streammerge.checkpoints.header import tensor_nbytes
from streammerge.checkpoints.layout import plan_shards
from streammerge.checkpoints.writer import CheckpointWriter
from streammerge.errors import OutputExistsError, RecipeError, StreammergeError
from streammerge.units import format_size, parse_size

POOL = 1 << 20
BLOCK = 1 << 15  # part of what defines the bytes; also small enough that torch stays on one thread
TASK_RMS = 0.002
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Shape:
    """The numbers of a Qwen2 `config.json` that fix names and shapes, under its own keys."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool

    def tensors(self, tied: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor, in a real checkpoint's order."""
        h, inter, kv = self.hidden_size, self.intermediate_size, self.num_key_value_heads
        kv *= h // self.num_attention_heads
        yield EMBEDDING, (self.vocab_size, h)
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", (h,)
            for name, rows in (("q", h), ("k", kv), ("v", kv)):
                yield f"{prefix}self_attn.{name}_proj.weight", (rows, h)
                yield f"{prefix}self_attn.{name}_proj.bias", (rows,)
            yield prefix + "self_attn.o_proj.weight", (h, h)
            yield prefix + "post_attention_layernorm.weight", (h,)
            yield prefix + "mlp.gate_proj.weight", (inter, h)
            yield prefix + "mlp.up_proj.weight", (inter, h)
            yield prefix + "mlp.down_proj.weight", (h, inter)
        yield "model.norm.weight", (h,)
        if not tied:
            yield HEAD, (self.vocab_size, h)

    def config(self, tied: bool, dtype: str, rope_theta: float) -> bytes:
        """The content of `config.json`."""
        kind = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": dtype}
        rest = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": rope_theta, "hidden_act": "silu"}
        return json.dumps({**kind, **asdict(self), **rest, "tie_word_embeddings": tied}, indent=2).encode() + b"\n"


SHAPES = {
    "tiny": Shape(64, 176, 4, 4, 2, 512, True),
    "qwen2-0.5b": Shape(896, 4864, 24, 14, 2, 151936, True),
    "qwen2-1.5b": Shape(1536, 8960, 28, 12, 2, 151936, True),
    "qwen2-7b": Shape(3584, 18944, 28, 28, 4, 152064, False),
}


class Blocks:
    """Draws any block of any tensor into one reused float32 buffer, overwritten by the next call."""

    def __init__(self, shape: Shape, base_dtype: str, base_tied: bool, seed: int) -> None:
        self.shape, self.base_tied, self.seed = shape, base_tied, seed
        rng = np.random.Generator(np.random.Philox(seed))
        self.a, self.b, self.t = (torch.from_numpy(rng.standard_normal(POOL + BLOCK, np.float32)) for _ in range(3))
        self.t *= torch.from_numpy(rng.integers(0, 2, POOL + BLOCK).astype(np.float32)) * math.sqrt(2)
        self.values, self.scratch = torch.empty(BLOCK), torch.empty(BLOCK)
        self.rounded = torch.empty(BLOCK, dtype=getattr(torch, base_dtype))

    def draw(self, name: str, block: int, count: int, expert: int) -> Tensor:
        """Block number `block`, of `count` elements, of the base (expert 0) or of an expert (1, 2, ...)."""
        values, scratch, rounded = self.values[:count], self.scratch[:count], self.rounded[:count]
        source = EMBEDDING if name == HEAD and self.base_tied else name
        mean, std = self._moments(source)
        first, second, angle = self._places("base", source, block)
        torch.mul(self.a[first : first + count], std * math.cos(angle), out=values)
        torch.mul(self.b[second : second + count], std * math.sin(angle), out=scratch)
        values.add_(scratch).add_(mean)
        if expert:
            values.copy_(rounded.copy_(values))
            first, second, _ = self._places(f"expert {expert}", name, block)
            torch.mul(self.t[first : first + count], self.a[second : second + count], out=scratch)
            values.add_(scratch.mul_(self._task_rms(name, expert)))
        return values

    def _places(self, model: str, name: str, block: int) -> tuple[int, int, float]:
        digest = hashlib.blake2b(json.dumps([self.seed, model, name, block]).encode(), digest_size=12).digest()
        first, second, angle = struct.unpack("<3I", digest)
        return first % POOL, second % POOL, angle * 2 * math.pi / 2**32

    def _moments(self, name: str) -> tuple[float, float]:
        if name.endswith("norm.weight"):
            return 1.0, 0.1
        if name.endswith(".bias"):
            return 0.0, 0.02
        return 0.0, 0.016 + 0.008 * self._places("std", name, 0)[0] / POOL

    def _task_rms(self, name: str, expert: int) -> float:
        block = block_index(name, "model.layers")
        last = max(1, self.shape.num_hidden_layers - 1)
        depth = block / last if block is not None else float(name != EMBEDDING)
        return TASK_RMS * (0.5 + depth if expert % 2 else 1.5 - depth)


def make_pair(
    shape: str | Shape,
    folder: str | Path,
    *,
    experts: int = 1,
    tie: bool | None = None,
    ft_tie: bool | None = None,
    dtype: str = "bfloat16",
    ft_dtype: str | None = None,
    seed: int = 0,
    rope_theta: float = 1e6,
    max_shard_size: str | int = "5GB",
    say: Callable[[str], object] = lambda line: None,
) -> list[Path]:
    """Write `folder`/base and `folder`/ft, ft2, ...; returns these folders. The script is one call of this.

    Args:
        shape: a key of SHAPES, or a Shape.
        folder: the output; must not exist or be empty.
        tie, ft_tie: tied embeddings in the base and in the fine-tunes; None: the shape's own.
        say: called with one line per finished checkpoint.

    Raises:
        OutputExistsError: the output folder is not empty.
        RecipeError: an unknown shape or dtype, or a bad number.
        TransferError: the disk is full; the checkpoint in work is removed.
    """
    folder, ft_dtype, max_shard_bytes = Path(folder), ft_dtype or dtype, parse_size(max_shard_size)
    if isinstance(shape, str) and shape not in SHAPES:
        raise RecipeError(f"unknown shape {shape!r}; there are {', '.join(SHAPES)}")
    if unknown := {dtype, ft_dtype} - {*DTYPES}:
        raise RecipeError(f"unknown dtype {min(unknown)!r}; there are {', '.join(DTYPES)}")
    if experts < 0 or seed < 0:
        raise RecipeError(f"experts and seed must not be negative, not {experts} and {seed}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputExistsError(f"output {folder} is not an empty folder: choose another --out or remove it")
    shape = SHAPES[shape] if isinstance(shape, str) else shape
    tie = shape.tie_word_embeddings if tie is None else tie
    ft_tie = shape.tie_word_embeddings if ft_tie is None else ft_tie
    blocks = Blocks(shape, dtype, tie, seed)
    folders = [folder / "base", *(folder / f"ft{k if k > 1 else ''}" for k in range(1, experts + 1))]
    for expert, path in enumerate(folders):
        tied, stored = (ft_tie, ft_dtype) if expert else (tie, dtype)
        files = {"config.json": shape.config(tied, stored, rope_theta), "tokenizer.json": tokenizer()}
        say(_write(path, blocks, expert, tied, stored, max_shard_bytes, files))
    return folders


def tokenizer() -> bytes:
    """The content of `tokenizer.json`: a token for each byte, ids 0 to 255 of any vocabulary, and an end token, 256."""
    vocabulary = {letter: id for id, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    return made.to_str(pretty=True).encode() + b"\n"


def _write(
    folder: Path, blocks: Blocks, expert: int, tied: bool, dtype: str, max_shard_bytes: int, files: dict[str, bytes]
) -> str:
    """Write one checkpoint; returns the line about it."""
    shards = plan_shards([(name, DTYPES[dtype], size) for name, size in blocks.shape.tensors(tied)], max_shard_bytes)
    infos = [info for shard in shards for info in shard.tensors]
    total = sum(info.nbytes for info in infos)
    width = tensor_nbytes(DTYPES[dtype], ())
    raw = memoryview(bytearray(BLOCK * width))
    out = torch.frombuffer(raw, dtype=getattr(torch, dtype))
    bar = tqdm(total=total, desc=folder.name, unit="B", unit_scale=True, disable=None)  # only on a terminal
    with bar, CheckpointWriter(folder, shards, {"synthetic": folder.name}, fresh=True) as writer:
        try:
            for info in infos:
                written = []
                for block, start in enumerate(range(0, info.numel, BLOCK)):
                    count = min(BLOCK, info.numel - start)
                    out[:count].copy_(blocks.draw(info.name, block, count, expert))
                    written.append(writer.write(info.name, start * width, raw[: count * width]))
                    bar.update(count * width)
                writer.complete(info.name, {}, written)
            writer.publish(dict(files))
        except BaseException:
            writer.discard()
            raise
    amount = f"{len(infos)} tensors, {format_size(total)} of {dtype} in {len(shards)} file(s)"
    return f"{folder}: {amount}, embeddings {'tied' if tied else 'untied'}"


def main(argv: list[str] | None = None) -> int:
    """The command line: each option is an argument of `make_pair`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("shape", choices=SHAPES, help="the model's shape")
    add("--out", dest="folder", required=True, metavar="FOLDER", help="gets base, ft, ft2, ...; must be empty")
    add("--experts", type=int, default=1, metavar="N", help="how many fine-tunes, 0: the base alone (%(default)s)")
    add("--tie", action=argparse.BooleanOptionalAction, help="embeddings of the base (the shape's own)")
    add("--ft-tie", action="store_true", default=None, help="tied embeddings in the fine-tunes (the shape's own)")
    add("--ft-no-tie", dest="ft_tie", action="store_false", default=None, help="lm_head.weight in the fine-tunes")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the base (%(default)s)")
    add("--ft-dtype", choices=DTYPES, help="of the fine-tunes (as the base)")
    add("--seed", type=int, default=0, help="another seed, other weights (%(default)s)")
    add("--rope-theta", type=float, default=1e6, metavar="X", help="Qwen2.5-Math has 10000 (%(default)s)")
    add("--max-shard-size", default="5GB", metavar="SIZE", help="tensor bytes per file at most (%(default)s)")
    try:
        make_pair(**vars(parser.parse_args(argv)), say=lambda line: print(line, flush=True))
    except StreammergeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
