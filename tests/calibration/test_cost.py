"""What `plan` says of a calibration, by hand for a tiny model."""

from collections.abc import Callable

import pytest
from calibration.conftest import LENGTH, SAMPLES, Family

from streammerge import calibration
from streammerge.calibration import calibration_cost
from streammerge.calibration.store import Measurement
from streammerge.fisher.placement import IMPORT_BYTES

Make = Callable[..., Family]
MIB = 2**20


def cost(made: Family, *measurements: Measurement) -> tuple[int, int]:
    """Bytes besides the import, and bytes to read in models, of whose embedding 60 of 97 rows are read."""
    models = made.open()
    found = calibration_cost(models, made.settings, measurements)
    size = sum(info.nbytes for info in models[0].tensors.values()) - (97 - SAMPLES * LENGTH) * 32 * 4
    assert (found.tokens, found.measurements, found.bytes_to_stream) == (SAMPLES * LENGTH, measurements, 0)
    assert found.bytes_to_read % size == 0
    return found.host_bytes - IMPORT_BYTES, found.bytes_to_read // size


def test_by_hand(family: Make) -> None:
    """float32, hidden 32, intermediate 48, 4 heads of 8, 2 of keys: a block's matrices have 7,680 elements."""
    made = family("llama", True, rows=10)
    block = 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    through = 12 * 256 * 48 + 40 * MIB
    states = SAMPLES * LENGTH * 32 * 4
    assert cost(made, "channels") == (3 * states + block + through, 1)
    assert cost(made, "mutual_information") == (7 * states + block + through, 3)
    inputs = 2 * 3 * 10 * (6 * 32 + 48) * 4
    assert cost(made, "inputs") == (7 * states + block + through + inputs, 3)


@pytest.mark.parametrize("tied", [True, False])
def test_the_logits_of_a_head_of_its_own(family: Make, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of long windows over a vocabulary, but for the attention: two bytes per logit and model, and their pairs."""
    monkeypatch.setattr(calibration, "attention_bytes", lambda config, samples, length: 0)
    made = family("llama", tied)
    long = Family(made.models, made.folders, made.settings.model_copy(update={"samples": 1, "length": 600_000}))
    models = long.open()
    found = calibration_cost(models, long.settings, ["mutual_information"]).host_bytes - IMPORT_BYTES
    states = 7 * 600_000 * 32 * 4
    logits = 600_000 * 97 * (2 * 3 + 8)
    assert (found == states + logits) is not tied
