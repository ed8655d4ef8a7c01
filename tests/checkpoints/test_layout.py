"""How tensors are laid out in shards."""

import pytest
from checkpoints.writing import FILES, SHARDS_OF, STATE, planned

from streammerge.checkpoints.header import DTYPES
from streammerge.checkpoints.layout import plan_shards
from streammerge.checkpoints.weight_files import SINGLE_FILE
from streammerge.errors import HeaderError


def test_one_shard_is_model_safetensors() -> None:
    (shard,) = planned(STATE, 10**9)
    assert shard.file == SINGLE_FILE
    assert {info.name for info in shard.tensors} == STATE.keys()


def test_several_shards_have_five_digits_and_keep_the_order() -> None:
    shards = planned(STATE)
    assert [shard.file for shard in shards] == FILES
    assert [sorted(info.name for info in shard.tensors) for shard in shards] == SHARDS_OF
    assert {info.file for shard in shards for info in shard.tensors} == set(FILES)


@pytest.mark.parametrize(
    ("sizes", "limit", "groups"),
    [
        ([4, 4, 4], 8, [[4, 4], [4]]),
        ([8], 8, [[8]]),
        ([4, 100, 4], 8, [[4], [100], [4]]),
        ([100, 100], 8, [[100], [100]]),
        ([100, 1], 8, [[100], [1]]),
        ([1, 7, 1], 8, [[1, 7], [1]]),
        ([0, 8, 0], 8, [[0, 8, 0]]),
        ([3, 3, 3], 1, [[3], [3], [3]]),
    ],
)
def test_shards_hold_at_most_the_limit_or_one_tensor(sizes: list[int], limit: int, groups: list[list[int]]) -> None:
    shards = plan_shards(((str(i), "U8", (size,)) for i, size in enumerate(sizes)), limit)
    assert [[info.nbytes for info in sorted(shard.tensors, key=lambda t: int(t.name))] for shard in shards] == groups


def test_a_hundred_thousand_shards_are_numbered_throughout() -> None:
    shards = plan_shards(((str(i), "U8", (1,)) for i in range(1200)), 1)
    assert (shards[0].file, shards[-1].file) == ("model-00001-of-01200.safetensors", "model-01200-of-01200.safetensors")


def test_wider_dtypes_come_first_and_everything_is_aligned() -> None:
    order = ["U8", "F4", "F64", "BF16", "F32", "BOOL", "I64", "F16"]
    (shard,) = plan_shards([(name, name, (2, 3)) for name in order], 10**9)
    assert [info.name for info in shard.tensors] == ["F64", "I64", "F32", "BF16", "F16", "U8", "BOOL", "F4"]
    position = len(shard.header)
    for info in shard.tensors:
        assert info.start == position
        assert info.start % max(1, DTYPES[info.dtype].bits // 8) == 0
        position = info.stop
    assert shard.size == position


def test_a_packed_tensor_of_half_a_byte_cannot_be_planned() -> None:
    with pytest.raises(HeaderError, match="does not fill whole bytes"):
        plan_shards([("x", "F4", (3,))], 100)
