"""The benchmark from the Hub to the Hub, on the smallest shape."""

from pathlib import Path

import from_hub_to_hub
import pytest
from from_hub_to_hub import main


def test_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(from_hub_to_hub, "WAYS", {"in a folder": "256MiB", "pushed": "64MiB"})
    main(["--shape", "tiny", "--out", str(tmp_path), "--methods", "task_arithmetic", "--max-shard-size", "50KB"])
    *_, header, _, folder, lfs = capsys.readouterr().out.splitlines()
    names = [name.strip("| ") for name in header.split(" | ")]
    for line, way, sent in ((folder, "in a folder", "0.0 MB"), (lfs, "pushed", "0.4 MB")):
        cells = [cell.strip("| ") for cell in line.split(" | ")]
        assert (cells[0], cells[1], cells[names.index("uploaded")]) == ("`task_arithmetic`", way, sent)
        assert 100 < float(cells[3].removesuffix(" MiB")) < 1000
        assert cells[5] == cells[6] != "0.0 MB"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-pair"]
