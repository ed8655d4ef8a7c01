"""The decoder blocks of a transformers model: built empty, loaded and unloaded one at a time.

Every use of transformers' and accelerate's internals is here. Tested with transformers 5.17 to 5.23 and
accelerate 1.15 (tests/fisher/test_blocks.py fails where they move).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn

from streammerge.checkpoints.buffers import as_bytes
from streammerge.checkpoints.checkpoint import Checkpoint, decoder_prefix, require_finite, torch_dtype
from streammerge.checkpoints.header import TensorInfo
from streammerge.errors import CheckpointError, IncompatibleCheckpointsError


@dataclass
class Recording:
    """What the model hands its blocks for one sequence.

    Attributes:
        embedded: input of the first block, [1, length, hidden].
        calls: per block, the arguments besides the hidden states (masks, rotary embeddings, positions).
    """

    embedded: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]


class BlockModel:
    """A causal language model of which only the asked-for decoder blocks are in memory.

    transformers' own forward does everything but the blocks (embedding and its scale, masks, rotary
    embeddings, final norm, head, soft caps), with the blocks' `forward` replaced by a recorder.

    Args:
        base: the checkpoint; its tensor names must be the model's parameter names.
        dtype: every weight is cast to it on loading.
        device: where weights go.

    Raises:
        CheckpointError: transformers does not know the architecture, or its blocks cannot be replayed.
        IncompatibleCheckpointsError: parameters without a tensor, or of another shape.
    """

    def __init__(self, base: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self.base, self.dtype, self.device = base, dtype, device
        self.model = _build_empty(base, dtype)
        self.vocab_size = int(self.model.config.get_text_config().vocab_size)
        prefix = decoder_prefix(base.tensors)
        self.blocks = _find_blocks(self.model, prefix, base.id)
        self._names = _tensor_names(self.model, base)
        start = f"{prefix}."
        self._resident = [name for name in self._names if not name.startswith(start)]
        self._of_block = [
            [name for name in self._names if name.startswith(f"{start}{i}.")] for i in range(len(self.blocks))
        ]
        largest = max(sum(_aligned(self._info(name).nbytes) for name in names) for names in self._of_block)
        self._arena = torch.empty(largest, dtype=torch.uint8)
        for name, buffer in self.model.named_buffers():
            set_module_tensor_to_device(self.model, name, device, value=buffer, dtype=buffer.dtype, clear_cache=False)

    @property
    def tensor_names(self) -> set[str]:
        """The checkpoint tensors the model is made of."""
        return set(self._names.values())

    def load_resident(self) -> None:
        """Load everything outside the blocks."""
        for name in self._resident:
            info = self._info(name)
            self._set(name, info, self.base.tensor(info.name))
        self.model.tie_weights()

    def load_block(self, index: int) -> nn.Module:
        """Load one block; the one loaded before must be unloaded first, they share their memory."""
        start = 0
        for name in self._of_block[index]:
            info = self._info(name)
            raw = self._arena[start : start + info.nbytes]
            self.base.read_into(info, 0, as_bytes(raw))
            self._set(name, info, raw.view(torch_dtype(info.dtype)).view(info.shape))
            start += _aligned(info.nbytes)
        return self.blocks[index]

    def unload_block(self, index: int) -> None:
        for name in self._of_block[index]:
            set_module_tensor_to_device(self.model, name, "meta", clear_cache=False)

    def parameters(self, index: int | None) -> Iterator[tuple[str, nn.Parameter]]:
        """Tensor name and parameter of a loaded block, or of what lies outside the blocks (None)."""
        for name in self._resident if index is None else self._of_block[index]:
            yield self._names[name], self.model.get_parameter(name)

    def input_embedding(self) -> nn.Parameter:
        return self.model.get_input_embeddings().weight  # type: ignore[no-any-return]

    def record(self, ids: Tensor) -> Recording:
        """Run everything before the blocks on ids [1, length] and record what each block is given.

        Raises:
            CheckpointError: the blocks are not a plain chain of hidden states.
        """
        hiddens: list[Tensor] = []
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def recorder(index: int) -> Callable[..., Tensor]:
            def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                if index != len(calls) or (hiddens and hidden is not hiddens[-1]):
                    raise self._not_replayable(f"block {index} is not called once, on the output of the one before it")
                for key, value in kwargs.items():
                    if isinstance(value, transformers.Cache):
                        raise self._not_replayable(f"block {index} shares state with others through {key}")
                hiddens.append(hidden)
                calls.append((args, kwargs))
                return hidden

            return forward

        with self._forwards([recorder(i) for i in range(len(self.blocks))]):
            self.model.get_decoder()(input_ids=ids, use_cache=False)
        if len(calls) != len(self.blocks):
            raise self._not_replayable(f"only {len(calls)} of {len(self.blocks)} blocks are called")
        return Recording(hiddens[0], calls)

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Run everything after the blocks on `hidden`, the output of the last one: [1, length, vocabulary]."""
        with self._forwards([lambda *args, **kwargs: hidden] * len(self.blocks)):
            return self.model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]

    def _info(self, name: str) -> TensorInfo:
        return self.base.info(self._names[name])

    def _set(self, name: str, info: TensorInfo, value: Tensor) -> None:
        require_finite(value, info, self.base.id, mend="repair it: its Fisher cannot be measured")
        set_module_tensor_to_device(self.model, name, self.device, value=value, dtype=self.dtype, clear_cache=False)
        self.model.get_parameter(name).requires_grad_(False)

    @contextmanager
    def _forwards(self, forwards: Sequence[Callable[..., Tensor]]) -> Iterator[None]:
        for block, forward in zip(self.blocks, forwards, strict=True):
            block.forward = forward
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward

    def _not_replayable(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"model {self.base.id}: {type(self.model).__name__} cannot be walked block by block: {why}"
        )


def _build_empty(base: Checkpoint, dtype: torch.dtype) -> transformers.PreTrainedModel:
    try:
        config = transformers.AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="eager", trust_remote_code=False
            )
    except Exception as error:  # a config may break transformers anywhere; all of it is one thing to the user
        reason = str(error).strip().splitlines()[0][:200]
        raise CheckpointError(
            f"model {base.id}: transformers {transformers.__version__} cannot build it as a causal language model: "
            f"{reason}"
        ) from error
    model.tie_weights()
    return model.eval()


def _find_blocks(model: nn.Module, prefix: str | None, id: str) -> nn.ModuleList:
    try:
        blocks = model.get_submodule(prefix) if prefix else None
    except AttributeError:
        blocks = None
    if not isinstance(blocks, nn.ModuleList):
        raise CheckpointError(
            f"model {id}: its decoder blocks are {prefix or 'not to be found'} in the files, which is no block list of "
            f"{type(model).__name__} in transformers {transformers.__version__}"
        )
    return blocks


def _tensor_names(model: nn.Module, base: Checkpoint) -> dict[str, str]:
    """Parameter name -> tensor name, one per parameter; tied parameters appear once."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    names: dict[str, str] = {}
    mismatches: list[str] = []
    for aliases in groups.values():
        stored = next((alias for alias in aliases if alias in base.tensors), None)
        shape = tuple(model.get_parameter(aliases[0]).shape)
        if stored is None:
            mismatches.append(f"there is no tensor {aliases[0]!r} {list(shape)}")
        elif base.tensors[stored].shape != shape:
            mismatches.append(f"tensor {stored!r} is {list(base.tensors[stored].shape)}, the model needs {list(shape)}")
        else:
            names[aliases[0]] = stored
    if mismatches:
        raise IncompatibleCheckpointsError(
            f"model {base.id}: its files do not fit {type(model).__name__} of transformers {transformers.__version__}:",
            mismatches,
        )
    return names


def _aligned(count: int) -> int:
    """Rounded up, so that a tensor of any dtype may follow one of any other in the arena."""
    return -(-count // 64) * 64
