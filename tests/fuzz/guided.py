"""A fuzz target under atheris, which finds its inputs by the coverage they reach: `make fuzz`.

Run as `python tests/fuzz/guided.py TARGET [options of libFuzzer] [folders of inputs]`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
# Not yaml: with its scanner instrumented, a recipe takes a hundred times as long.
with atheris.instrument_imports(include=["streammerge.checkpoints", "streammerge.recipe", "streammerge.yaml_text"]):
    from fuzz.targets import TARGETS, run


def main() -> None:
    target = TARGETS[sys.argv.pop(1)]

    def one(data: bytes) -> None:
        run(target, data)

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
