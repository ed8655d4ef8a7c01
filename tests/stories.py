"""stories260K: real trained weights, small enough for tests (llama2.c, Andrej Karpathy, MIT).

Layout of the file, the row permutation and the expected figures: papers.md section 5.
"""

import copy
import functools
import itertools
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "stories260K.bin"  # ../shared of the repository
VOCABULARY = DATA.with_name("tok512.bin")
needed = pytest.mark.skipif(
    not (DATA.exists() and VOCABULARY.exists()), reason=f"needs {DATA.name} and {VOCABULARY.name} in ../shared/data"
)
BOS, EOS, FIRST_BYTE = 1, 2, 3  # token ids; FIRST_BYTE + b is the raw byte b

TEXT_A = """\
Tom had three red apples and two green apples. He wanted to know how many apples he had. First he put the red apples \
in a row. One, two, three. Then he put the green apples next to them. Four, five. Three plus two is five. So Tom had \
five apples. He gave one apple to his sister. Five minus one is four. Now Tom has four apples.

Ann has a jar with ten small stones. She gives half of the stones to Ben. Half of ten is five. Ben counts his stones \
and says, "I have five." Ann counts her stones and says, "I have five too." Together they have ten again, so the sum \
is right.

There are seven days in a week. Sam reads two pages each day. To find how many pages he reads in a week, he adds two \
seven times. Two, four, six, eight, ten, twelve, fourteen. Seven times two is fourteen. The book has twenty pages. \
Twenty minus fourteen is six, so six pages are left.

A farmer has four pens. In each pen there are six hens. Four times six is twenty-four. Two hens run away in the \
night. Twenty-four minus two is twenty-two. In the morning one hen comes back. Twenty-two plus one is twenty-three. \
The farmer writes the answer on the wall: twenty-three.

The teacher asks, "Which is more, nine or six plus four?" Lily thinks. Six plus four is ten. Ten is more than nine. \
She checks it twice with her fingers. "Six plus four is more," she says. "It is more by one." The teacher is glad, \
because Lily did not guess.
"""

TEXT_B = """\
The old ship left the harbour before dawn. Grey waves struck the bow, and cold wind pulled at the ropes. The captain \
held the wheel and looked for the light on the far rocks. No one spoke. Only the gulls cried over the mast.

By noon the storm had passed. The sailors hung their wet coats in the sun, mended the torn sail and cooked fish with \
salt and onions. A boy climbed to the top and shouted that he could see an island. It was long and low, with white \
sand and dark trees.

They rowed to the shore in a small boat. Under the trees they found a spring of clear water, and they filled every \
barrel. Strange birds with yellow wings walked between the stones and were not afraid. The cook drew them in his \
notebook and gave each one a name.

At night the sea was full of pale green light. Every oar left a burning line behind it. The captain said that tiny \
animals make this light when the water moves. The boy put his hand in the sea and watched his fingers glow until he \
fell asleep.

After nineteen days they came home. The harbour bell rang and people ran down the hill with lamps. The captain sold \
the pepper and the silk, paid the crew and locked the maps in an iron box. In spring, he said, when the ice is gone, \
we shall sail north.
"""


# ---- Weights ----------------------------------------------------------------------------------------------------


def load_stories(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The trained model, from the legacy llama2.c file: seven int32, then float32 stacks over the layers."""
    raw = bytearray(DATA.read_bytes())
    dim, hidden, layers, heads, kv_heads, vocabulary, positions = struct.unpack_from("<7i", raw)
    values = torch.frombuffer(raw, dtype=torch.float32, offset=28)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    head_dim = dim // heads
    kv_dim = head_dim * kv_heads
    position = 0

    def take(*shape: int) -> Tensor:
        nonlocal position
        start, position = position, position + torch.Size(shape).numel()
        return values[start:position].reshape(shape)

    state = {"model.embed_tokens.weight": take(vocabulary, dim)}
    for name, shape in (
        ("input_layernorm", (dim,)),
        ("self_attn.q_proj", (dim, dim)),
        ("self_attn.k_proj", (kv_dim, dim)),
        ("self_attn.v_proj", (kv_dim, dim)),
        ("self_attn.o_proj", (dim, dim)),
        ("post_attention_layernorm", (dim,)),
        ("mlp.gate_proj", (hidden, dim)),
        ("mlp.down_proj", (dim, hidden)),
        ("mlp.up_proj", (hidden, dim)),
    ):
        for layer, weight in enumerate(take(layers, *shape)):
            if name.endswith(("q_proj", "k_proj")):
                weight = half_split_rows(weight, head_dim)
            state[f"model.layers.{layer}.{name}.weight"] = weight
    state["model.norm.weight"] = take(dim)
    take(2, positions, head_dim // 2)  # RoPE tables, unused
    assert position == values.numel()  # V > 0 in the header: tied head, so nothing follows

    model = LlamaForCausalLM(config)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval().to(dtype=dtype)


def half_split_rows(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from interleaved RoPE pairs (0, 1), (2, 3), ... to half-split: the even rows, then the odd."""
    heads = weight.shape[0] // head_dim
    return weight.reshape(heads, head_dim // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


# ---- Tokenizer --------------------------------------------------------------------------------------------------


@functools.cache
def _pieces() -> tuple[list[bytes], list[float]]:
    """Pieces and merge scores by token id; the file is int32 longest, then (float32 score, int32 size, bytes) each."""
    raw = VOCABULARY.read_bytes()
    pieces, scores, at = [], [], 4
    while at < len(raw):
        score, size = struct.unpack_from("<fi", raw, at)
        pieces.append(raw[at + 8 : at + 8 + size])
        scores.append(score)
        at += 8 + size
    return pieces, scores


def encode(text: str, bos: bool = True) -> list[int]:
    """Greedy BPE of llama2.c: a space in front, characters (or their bytes), then the best-scored merge."""
    pieces, scores = _pieces()
    index = {piece: token for token, piece in reversed(list(enumerate(pieces)))}
    ids = []
    for character in " " + text if text else "":
        raw = character.encode()
        ids += [index[raw]] if raw in index else [FIRST_BYTE + byte for byte in raw]
    while True:
        merges = [(i, index.get(pieces[a] + pieces[b])) for i, (a, b) in enumerate(itertools.pairwise(ids))]
        known = [(i, token) for i, token in merges if token is not None]
        if not known:
            return [BOS, *ids] if bos else ids
        i, token = max(known, key=lambda merge: scores[merge[1]])  # the first of equals
        ids[i : i + 2] = [token]


def decode(ids: list[int]) -> str:
    """Inverse of `encode`: BOS, EOS and the space in front are dropped."""
    pieces, _ = _pieces()
    raw = b"".join(
        bytes([i - FIRST_BYTE]) if FIRST_BYTE <= i < FIRST_BYTE + 256 else pieces[i] for i in ids if i not in (BOS, EOS)
    )
    return raw.decode(errors="replace").removeprefix(" ")


# ---- Training and saving ----------------------------------------------------------------------------------------


def loss_of(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Mean next-token loss, in nats per token; ids: [batch, length]."""
    logits = model(ids, use_cache=False).logits.float()
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def text_loss(model: LlamaForCausalLM, text: str) -> float:
    """Nats per token over the first 512 tokens of the text, BOS in front."""
    with torch.no_grad():
        return loss_of(model, torch.tensor([encode(text)[: model.config.max_position_embeddings]])).item()


def train_further(
    model: LlamaForCausalLM, text: str, steps: int = 300, seed: int = 0, lr: float = 1e-4
) -> LlamaForCausalLM:
    """A copy of the model, trained on with AdamW on random windows (8 x 64 tokens) of the text. Deterministic.

    At the default rate 300 steps move the weights by 3 % and leave the stories mostly intact.
    """
    model = copy.deepcopy(model).train()
    ids = torch.tensor(encode(text))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - 64 + 1, (8,), generator=generator)
        optimizer.zero_grad()
        loss_of(model, torch.stack([ids[s : s + 64] for s in starts.tolist()])).backward()
        optimizer.step()
    return model.eval()


def save(model: LlamaForCausalLM, folder: Path) -> Path:
    """The model as a safetensors checkpoint."""
    model.save_pretrained(folder)
    return folder


def make_pair(folder: Path, steps: int = 300) -> tuple[Path, Path]:
    """`folder/base`: stories260K in float32; `folder/ft`: trained further on TEXT_A."""
    base = load_stories()
    return save(base, folder / "base"), save(train_further(base, TEXT_A, steps), folder / "ft")


def make_expert(folder: Path, text: str = TEXT_B, steps: int = 300) -> Path:
    """A second expert of the same base, in `folder`."""
    return save(train_further(load_stories(), text, steps, seed=1), folder)
