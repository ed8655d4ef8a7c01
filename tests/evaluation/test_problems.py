"""Rows as the papers' data sets have them, what is refused, and where they come from."""

import dataclasses
import hashlib
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import datasets
import pytest
from evaluation.conftest import WriteRows
from huggingface_hub import close_session, constants
from tiny_models import Run

from streammerge.errors import CheckpointError, RecipeError, TransferError
from streammerge.evaluation.problems import load_problems, problem, process_docs
from streammerge.evaluation.task_files import HubFile, read_task
from streammerge.mini_l2s.problems import SCORED, scored_problems

GSM8K = read_task("gsm8k")


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"question": "3+4?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"}, "3+4?", "7"),
        ({"problem": "?", "solution": r"It is \boxed{\frac{1}{2}}.", "answer": "0.5", "level": 3}, "?", "0.5"),
        ({"problem": "?", "solution": r"Not \boxed{1} but $\boxed{4.5e33}$.", "idx": 0}, "?", "4.5e33"),
        ({"question": "?", "final_answer": ["$-1,7$", "other"], "answer": "no"}, "?", "$-1,7$"),
        ({"question": "?", "answer": "$x^2$", "data_source": "book"}, "?", "$x^2$"),
        ({"problem": "?", "solution": "", "answer": 204, "url": "here"}, "?", "204"),
        ({"question": " ? ", "answer": 0.25}, "?", "0.25"),
        ({"question": "Is it?", "answer": "True"}, "Is it? (True or False)", "True"),
        ({"question": "Is it?", "answer": "no"}, "Is it? (Yes or No)", "no"),
    ],
)
def test_a_row(row: dict[str, Any], question: str, answer: str) -> None:
    assert problem(row) == {"question": question, "answer": answer}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "1", "query": "?"}, "line 2: no text in field 'question' or 'problem' (it has answer, query)"),
        ({"question": "?", "target": "1"}, "line 2: no text in field 'final_answer' or 'answer' or 'solution'"),
        ({"question": " ", "answer": "1"}, "line 2: no text in field 'question'"),
        ({"question": "?", "answer": ""}, "line 2: no text in field 'final_answer'"),
        ({"question": "?", "answer": "thought ####"}, "line 2: no text in field 'final_answer'"),
        ({"question": "?", "answer": True}, "line 2: no text in field 'final_answer'"),
        ({"question": "?", "final_answer": []}, "line 2: no text in field 'final_answer'"),
        ({"problem": "?", "solution": "no box"}, "line 2: no text in field 'final_answer'"),
        ([1], "line 2: not a mapping of fields"),
        ({"question": "a\ud800", "answer": "1"}, "line 2: holds one half of a character"),
    ],
)
def test_a_row_that_is_none(write_rows: WriteRows, row: Any, message: str) -> None:
    path = write_rows("gsm8k.jsonl", [{"question": "?", "answer": "1"}, row])
    with pytest.raises(RecipeError) as error:
        load_problems(GSM8K, path.parent, 1)  # also where the limit would not reach it
    assert str(error.value).startswith(f"{path}, {message}")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="task gsm8k: there is no gsm8k.jsonl and no gsm8k/test.jsonl"):
        load_problems(GSM8K, tmp_path, None)
    (tmp_path / "gsm8k.jsonl").write_text("\n\n")
    with pytest.raises(RecipeError, match="there is no problem in it"):
        load_problems(GSM8K, tmp_path, None)
    (tmp_path / "gsm8k.jsonl").write_text('\n{"question": \n')
    with pytest.raises(RecipeError, match="line 2: not valid JSON"):
        load_problems(GSM8K, tmp_path, None)


def test_a_file(write_rows: WriteRows) -> None:
    path = write_rows("gsm8k.jsonl", [{"question": f"{n}?", "answer": n} for n in (1, 2, 3)])
    loaded = load_problems(GSM8K, path.parent, 2)
    assert loaded.rows == [{"question": "1?", "answer": "1"}, {"question": "2?", "answer": "2"}]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.source == {"file": str(path), "sha256": digest, "rows": 3, "papers_file": False}


def test_the_packages_own() -> None:
    """Those that the pair is scored on, all of them held out, with answers that a parser of the question finds too."""
    loaded = load_problems(read_task("mini_l2s"), None, None)
    assert len(loaded.rows) == loaded.source["rows"] == SCORED
    for row, asked in zip(loaded.rows, scored_problems(), strict=True):
        assert asked.split == "heldout"
        assert row == {"question": asked.question, "answer": str(answer_by_words(asked.question))}
    for limit in (3, SCORED, SCORED + 1, 10**12):  # the last ends at all
        first = load_problems(read_task("mini_l2s"), None, limit)
        assert (first.rows, first.source) == (loaded.rows[:limit], loaded.source)


def answer_by_words(question: str) -> int:
    """`Tom has 20 coins , first keeps one in 2 , second gets 3 . how many coins ?`, clause by clause."""
    had, *clauses = question.split(" . ")[0].split(" , ")
    value = Fraction(had.split()[2])
    for clause in clauses:
        number = int(clause.split()[-1])
        value = {"gets": value + number, "gives": value - number, "makes": value * number, "keeps": value / number}[
            clause.split()[1]
        ]
    return int(value) if value.denominator == 1 else -1


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of gsm8k in a cache of the Hub's client, where there is no Hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert GSM8K.hub is not None
    folder = tmp_path / "cache" / "datasets--HuggingFaceTB--math_tasks" / "snapshots" / GSM8K.hub.revision
    path = folder / "data" / "gsm8k" / "test.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"question": "?", "answer": "#### 7"}\n')
    return path


def test_from_the_hub(cached: Path) -> None:
    """The client finds the file at the commit; it must be the papers'."""
    digest = hashlib.sha256(cached.read_bytes()).hexdigest()
    with pytest.raises(TransferError, match=f"not the file that the papers used .* SHA-256 {digest[:16]}"):
        load_problems(GSM8K, None, None)
    assert GSM8K.hub is not None
    hub = dataclasses.replace(GSM8K.hub, size=cached.stat().st_size, sha256=digest[:16])
    loaded = load_problems(dataclasses.replace(GSM8K, hub=hub), None, None)
    assert loaded.rows == [{"question": "?", "answer": "7"}]
    place = {"repository": hub.repository, "revision": hub.revision, "file": hub.name}
    assert loaded.source == {**place, "sha256": digest, "rows": 1, "papers_file": True}
    cached.unlink()
    with pytest.raises(TransferError, match="data set HuggingFaceTB/math_tasks, file .*not in the local cache"):
        load_problems(GSM8K, None, None)


ROW = b'{"question": "?", "answer": "#### 7"}\n'


class DataSetHandler(BaseHTTPRequestHandler):
    """What the Hub answers to the client's requests for a file of a data set; the file of gsm8k is all it has."""

    def do_HEAD(self) -> None:
        assert GSM8K.hub is not None
        hub = GSM8K.hub
        found = self.path == f"/datasets/{hub.repository}/resolve/{hub.revision}/{hub.name}"
        self.send_response(200 if found else 404)
        headers = {"ETag": '"0123"', "X-Repo-Commit": hub.revision, "Content-Length": str(len(ROW))}
        for name, value in (headers if found else {"X-Error-Code": "EntryNotFound", "Content-Length": "0"}).items():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(ROW)

    def log_message(self, format: str, *args: Any) -> None: ...


def test_downloaded_by_the_hubs_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a server on the loopback interface, once; a file that is not there is an error of ours."""
    close_session()
    with ThreadingHTTPServer(("127.0.0.1", 0), DataSetHandler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for name, value in {
            "ENDPOINT": url,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        }.items():
            monkeypatch.setattr(constants, name, value)
        assert GSM8K.hub is not None
        hub = dataclasses.replace(GSM8K.hub, size=len(ROW), sha256=hashlib.sha256(ROW).hexdigest())
        for _ in range(2):
            assert load_problems(dataclasses.replace(GSM8K, hub=hub), None, None).rows == [
                {"question": "?", "answer": "7"}
            ]
            server.shutdown()
    with ThreadingHTTPServer(("127.0.0.1", server.server_port), DataSetHandler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        other = dataclasses.replace(GSM8K, hub=dataclasses.replace(hub, name="data/gsm8k/other.jsonl"))
        with pytest.raises(CheckpointError, match="file data/gsm8k/other.jsonl: the repository has no such file"):
            load_problems(other, None, None)
        server.shutdown()
    close_session()


def test_a_hub_that_is_not_there(sevens: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, which says how to do without it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), DataSetHandler) as server:
        url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("streammerge.hub.tries.FIRST_WAIT", 0.0)
    result = run("eval", sevens, "--tasks", "gsm8k")
    expected = (
        "data set HuggingFaceTB/math_tasks, file data/gsm8k/test.jsonl: the Hub cannot be reached "
        "(the connection failed (ConnectError)): try again later, or give --data FOLDER"
    )
    assert (result.code, result.out, result.err) == (1, "", f"streammerge: error: {expected}\n")


class FailingHandler(DataSetHandler):
    """Answers the first request, which is not the client's, and then has trouble."""

    def do_GET(self) -> None:
        super().do_HEAD()

    def do_HEAD(self) -> None:
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()


def test_the_clients_own_lines_are_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It logs every try."""
    close_session()
    with ThreadingHTTPServer(("127.0.0.1", 0), FailingHandler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for name, value in {
            "ENDPOINT": url,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
            "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("streammerge.hub.tries.FIRST_WAIT", 0.0)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        with pytest.raises(TransferError, match=r"the Hub cannot be reached \(.*\): try again later, or give --data"):
            load_problems(GSM8K, None, None)
        server.shutdown()
    close_session()
    assert not caplog.records


def test_which_file_it_is() -> None:
    file = HubFile("a/b", "0" * 40, "f", 3, "12ab")
    assert file.is_it(3, "12abcd")
    assert not file.is_it(3, "12cd") and not file.is_it(4, "12abcd")


def test_the_harness_own_command_maps_rows_likewise() -> None:
    rows = datasets.Dataset.from_list([{"problem": "?", "solution": r"\boxed{7}", "level": 1}])
    assert process_docs(rows).to_list() == [{"question": "?", "answer": "7"}]
