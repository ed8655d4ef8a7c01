"""The inputs on which the Fisher is measured."""

import torch
from torch import Tensor


def random_tokens(vocab_size: int, samples: int, length: int, seed: int) -> Tensor:
    """Token ids drawn uniformly from `range(vocab_size)`, without BOS or any other special token.

    One draw of shape [samples, length], int64, from a CPU generator, so that every device sees the same ids.
    Reference: FIM-Merging, arXiv 2603.21705, algorithm 1, step 1.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(0, vocab_size, (samples, length), generator=generator, dtype=torch.int64)
