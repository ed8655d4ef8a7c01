"""A causal language model of which only the asked-for decoder block is in memory: built empty, recorded, replayed.

Every use of transformers' modelling and of accelerate's hooks into it is here; the names of tensors are in
`names.py`. Tested with transformers 5.17 to 5.23 and accelerate 1.15 (tests/fisher/test_blocks.py fails where
they move).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn

from streammerge.checkpoints.buffers import as_bytes
from streammerge.checkpoints.checkpoint import Checkpoint, block_index, decoder_prefix, require_finite, torch_dtype
from streammerge.checkpoints.checksum import part_sum
from streammerge.checkpoints.header import TensorInfo
from streammerge.errors import CheckpointError
from streammerge.fisher.feed import BlockLayout
from streammerge.fisher.names import Part, is_linear_weight, parameter_parts

_REPAIR = "repair it: it cannot be walked"


@dataclass
class Recording:
    """What the model hands its blocks for one group of sequences.

    Attributes:
        embedded: input of the first block, [sequences, length, hidden].
        calls: per block, the arguments besides the hidden states (masks, rotary embeddings, positions).
    """

    embedded: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]


class BlockModel:
    """transformers' own forward does everything but the blocks (embedding and its scale, masks, rotary embeddings,
    final norm, soft caps), with the blocks' `forward` replaced by a recorder and the head's by whatever is asked.

    Args:
        base: the checkpoint.
        dtype: the dtype of forward and backward. The weights of linear layers stay as they are stored.
        device: where weights go.
        trust_remote_code: run the model's own Python code, where it brings some.

    Attributes:
        layouts: of every block, how its bytes lie in memory.
        parts: parameter name -> the tensors it is made of.
        embedding: the parameter whose rows are the token embeddings.
        names_of_head: the parameters that make the logits, with their names in the head.
        head: the one that is its matrix; None where the head is no plain linear layer.

    Raises:
        CheckpointError: transformers does not know the architecture, or its blocks cannot be replayed.
        IncompatibleCheckpointsError: parameters without a tensor, or of another shape.
    """

    def __init__(
        self, base: Checkpoint, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
    ) -> None:
        self.base, self.dtype, self.device = base, dtype, device
        self.model = _build_empty(base, dtype, trust_remote_code)
        self.vocab_size = int(self.model.config.get_text_config().vocab_size)
        self.parts = parameter_parts(self.model, base)
        self.prefix, self.blocks = _find_blocks(self.model, self.parts, base)
        head = self.model.get_output_embeddings()
        self.embedding = self._name_of(self.model.get_input_embeddings().weight)
        self.names_of_head = {} if head is None else {self._name_of(p): leaf for leaf, p in head.named_parameters()}
        self.head = self._name_of(head.weight) if type(head) is nn.Linear else None
        self._shapes = {name: self.model.get_parameter(name).shape for name in self.parts}
        self._of_block = [
            [name for name in self.parts if name.startswith(f"{self.prefix}.{index}.")]
            for index in range(len(self.blocks))
        ]
        inside = {name for names in self._of_block for name in names}
        self.outside = [name for name in self.parts if name not in inside]
        self.layouts = [
            BlockLayout.of((name, self._shapes[name], self.parts[name]) for name in names) for names in self._of_block
        ]
        for name, buffer in self.model.named_buffers():
            set_module_tensor_to_device(self.model, name, device, value=buffer, dtype=buffer.dtype, clear_cache=False)

    @property
    def feed_blocks(self) -> list[tuple[Checkpoint, BlockLayout]]:
        """The blocks as a feed reads them."""
        return [(self.base, layout) for layout in self.layouts]

    @property
    def tensor_names(self) -> set[str]:
        """The checkpoint tensors the model is made of."""
        return {part.tensor.name for parts in self.parts.values() for part in parts}

    def all_linear(self, wanted: set[str]) -> bool:
        """Whether every wanted tensor of the blocks is the weight of a plain linear layer."""
        return all(
            is_linear_weight(self.model, name)
            for names in self._of_block
            for name in names
            if any(part.tensor.name in wanted for part in self.parts[name])
        )

    def tensors_behind(self, parameter: str, start: int = 0, count: int | None = None) -> list[TensorInfo]:
        """The checkpoint tensors that hold `count` elements of a parameter from the flat index `start` on."""
        stop = self._shapes[parameter].numel() if count is None else start + count
        return [
            part.tensor
            for part in self.parts[parameter]
            if part.start < stop and part.start + part.tensor.numel > start
        ]

    @property
    def head_tensor(self) -> TensorInfo | None:
        """The tensor of a head of its own; None where it is tied to the embedding, or no plain linear layer."""
        return None if self.head in (None, self.embedding) else self.parts[self.head][0].tensor

    def load_outside(self, skip: set[str]) -> None:
        """Load what lies outside the blocks, but for the parameters in `skip`."""
        for name in self.outside:
            if name not in skip:
                self._set(name, self._whole(name), self.dtype)

    def load_embedding_rows(self, ids: Tensor) -> None:
        """Load the rows of the sorted token ids alone; `record` is then given indices into them."""
        info = self.parts[self.embedding][0].tensor
        table = self.model.get_input_embeddings()
        columns = info.shape[1]
        width = info.nbytes // max(info.numel, 1) * columns
        rows = torch.empty(len(ids), width, dtype=torch.uint8)
        wanted = zip(rows, ids.tolist(), strict=True)
        self.base.read_many((info, token * width, as_bytes(row)) for row, token in wanted)
        values = rows.view(torch_dtype(info.dtype)).view(len(ids), columns)
        require_finite(values, info, self.base.id, _REPAIR)
        table.weight = nn.Parameter(values.to(self.device, self.dtype), requires_grad=False)
        padding = getattr(table, "padding_idx", None)
        if padding is not None:  # its row gets no gradient, so it must be found among the loaded ones
            place = (ids == padding).nonzero()
            table.padding_idx = int(place[0]) if len(place) else None

    def parameters_of_head(self) -> dict[str, nn.Parameter]:
        head = self.model.get_output_embeddings()
        return {name: head.get_parameter(leaf) for name, leaf in self.names_of_head.items()}

    def load_head(self) -> None:
        """Load the whole head, for a model whose head cannot be walked; a tied one gets weights of its own."""
        head = self.model.get_output_embeddings()
        for name, leaf in self.names_of_head.items():
            value = self._whole(name).to(self.device, self.dtype)
            setattr(head, leaf, nn.Parameter(value, requires_grad=False))

    def install(self, index: int, raw: Tensor, layout: BlockLayout | None = None) -> nn.Module:
        """Make the block's parameters views of its bytes (or, where the dtype differs, of converted copies).

        `layout`: how the bytes lie, where they are the same block of another model.
        """
        for slot in (layout or self.layouts[index]).slots:
            value = slot.view(raw)
            dtype = slot.dtype if is_linear_weight(self.model, slot.parameter) else self.dtype
            self._set(slot.parameter, value, dtype)
        return self.blocks[index]

    def remove(self, index: int) -> None:
        for name in self._of_block[index]:
            set_module_tensor_to_device(self.model, name, "meta", clear_cache=False)

    def parameters(self, index: int | None) -> dict[str, nn.Parameter]:
        """The parameters of a block, or of what lies outside the blocks (None)."""
        return {
            name: self.model.get_parameter(name) for name in (self.outside if index is None else self._of_block[index])
        }

    def record(self, ids: Tensor) -> Recording:
        """Run everything before the blocks on ids [sequences, length] and record what each block is given.

        Raises:
            CheckpointError: the blocks are not a plain chain of hidden states.
        """
        chain: list[Tensor] = []
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def recorder(index: int) -> Callable[..., Tensor]:
            def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                if index != len(calls) or (chain and hidden is not chain[-1]):
                    raise self._not_replayable(f"block {index} is not called once, on the output of the one before it")
                for key, value in (*enumerate(args, 1), *kwargs.items()):
                    if not _is_constant(value):
                        raise self._not_replayable(f"block {index} shares state with others through {key}")
                calls.append((args, kwargs))
                # The blocks hand on a tensor of our own that records gradients: what is made of it tells on itself.
                chain.extend([hidden, hidden.detach().requires_grad_()] if index == 0 else [hidden])
                return chain[-1]

            return forward

        with torch.enable_grad(), self._forwards([recorder(index) for index in range(len(self.blocks))]):
            self.model.get_decoder()(input_ids=ids, use_cache=False)
        if len(calls) != len(self.blocks):
            raise self._not_replayable(f"only {len(calls)} of {len(self.blocks)} blocks are called")
        return Recording(chain[0], calls)

    def logits(self, hidden: Tensor) -> Tensor:
        """Run everything after the blocks on `hidden`, the output of the last one: [..., vocabulary]."""
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        with self._forwards([lambda *args, **kwargs: hidden] * len(self.blocks)):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    def before_head(self, hidden: Tensor) -> Tensor:
        """What the head is given for `hidden`: through the final norm and whatever else the model does there."""
        seen: list[Tensor] = []

        def head(inputs: Tensor) -> Tensor:
            seen.append(inputs)
            return inputs

        try:
            with self._head(head):
                self.logits(hidden)
        except (IndexError, RuntimeError):
            if not seen:
                raise  # else what follows the head expects the whole vocabulary: `HeadWalk.is_elementwise` will tell
        if len(seen) != 1:
            raise self._not_replayable(f"its head is called {len(seen)} times")
        return seen[0]

    def after_head(self, raw: Tensor) -> Tensor:
        """What the model makes of the head's output (scales, soft caps), on any part of the vocabulary."""
        nothing = torch.zeros(
            1, 1, self.model.config.get_text_config().hidden_size, dtype=self.dtype, device=raw.device
        )
        with self._head(lambda inputs: raw):
            return self.logits(nothing)

    def _whole(self, name: str) -> Tensor:
        parts = self.parts[name]
        raw = torch.empty(sum(part.tensor.nbytes for part in parts), dtype=torch.uint8)
        values = raw.view(torch_dtype(parts[0].tensor.dtype))
        for part in parts:
            piece = values[part.start : part.start + part.tensor.numel]
            self.base.read_into(part.tensor, 0, as_bytes(piece))
            self.base.confirm(part.tensor, part_sum(as_bytes(piece)))
            require_finite(piece, part.tensor, self.base.id, _REPAIR)
        return values.view(self._shapes[name])

    def _set(self, name: str, value: Tensor, dtype: torch.dtype) -> None:
        set_module_tensor_to_device(self.model, name, self.device, value=value, dtype=dtype, clear_cache=False)
        self.model.get_parameter(name).requires_grad_(False)

    def _name_of(self, parameter: Tensor) -> str:
        return next(name for name in self.parts if self.model.get_parameter(name) is parameter)

    @contextmanager
    def _forwards(self, forwards: Sequence[Callable[..., Tensor]]) -> Iterator[None]:
        for block, forward in zip(self.blocks, forwards, strict=True):
            block.forward = forward
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward

    @contextmanager
    def _head(self, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
        head = self.model.get_output_embeddings()
        head.forward = forward
        try:
            yield
        finally:
            del head.forward

    def _not_replayable(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"model {self.base.id}: {type(self.model).__name__} cannot be walked block by block: {why}"
        )


def _build_empty(base: Checkpoint, dtype: torch.dtype, trust_remote_code: bool) -> transformers.PreTrainedModel:
    if base.config.get("is_encoder_decoder"):
        raise CheckpointError(f"model {base.id}: an encoder-decoder: only decoders have this Fisher")
    if trust_remote_code and "--" in str(base.config.get("auto_map")):
        raise CheckpointError(f"model {base.id}: its config takes code from another repository, which is not pinned")
    folder = base.files.folder_with("config.json", "*.py")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with init_empty_weights(include_buffers=False):
            model = transformers.AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation="eager",
                experts_implementation="eager",  # a loop of linear functions over the experts: deterministic, thin
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:  # a config may break transformers anywhere; all of it is one thing to the user
        reason = " ".join(str(error).split())[:200]
        code = "; it brings its own code, which only runs with --trust-remote-code" if "auto_map" in base.config else ""
        raise CheckpointError(
            f"model {base.id}: transformers {transformers.__version__} cannot build it as a causal language model: "
            f"{reason}{code if not trust_remote_code else ''}"
        ) from error
    model.tie_weights()
    return model.eval()


def _find_blocks(
    model: transformers.PreTrainedModel, parts: Mapping[str, tuple[Part, ...]], base: Checkpoint
) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks and its name in the model; its numbers must be those of the files."""
    decoder = model.get_decoder()
    count = model.config.get_text_config().num_hidden_layers
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == count]
    stored = decoder_prefix(base.tensors)
    if len(lists) == 1:
        name = next(name for name, module in model.named_modules() if module is lists[0])
        inside = [(path, part) for path in parts if path.startswith(f"{name}.") for part in parts[path]]
        numbers = {(int(path[len(name) + 1 :].split(".")[0]), block_index(p.tensor.name, stored)) for path, p in inside}
        if all(number == of_file for number, of_file in numbers):
            return name, lists[0]
    raise CheckpointError(
        f"model {base.id}: its decoder blocks are {stored or 'not to be found'} in the files, which is no list of "
        f"{count} blocks of {type(model).__name__} in transformers {transformers.__version__}"
    )


def _is_constant(value: Any) -> bool:
    """Whether a block's argument is the same whatever the blocks before it compute."""
    if isinstance(value, Tensor):
        return not value.requires_grad
    if isinstance(value, tuple):
        return all(_is_constant(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The hidden states among what a block returns."""
    return output[0] if isinstance(output, tuple) else output
