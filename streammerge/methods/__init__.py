"""The merge methods: one paper per file, one row per method. Pure tensor code; knows nothing of files."""

from collections.abc import Mapping

from streammerge.methods.api import Method
from streammerge.methods.fim import FimTa, FimTies
from streammerge.methods.linear import Linear
from streammerge.methods.task_arithmetic import TaskArithmetic
from streammerge.methods.ties import Ties

METHODS: Mapping[str, type[Method]] = {
    "fim_ties": FimTies,
    "fim_ta": FimTa,
    "linear": Linear,
    "task_arithmetic": TaskArithmetic,
    "ties": Ties,
}
