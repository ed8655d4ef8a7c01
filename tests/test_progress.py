"""Libraries kept quiet for a while, by several threads at once."""

import logging
from threading import Barrier, Thread

import pytest

from streammerge.progress import quiet_logger

NAME = "streammerge.tests.loud"


def test_a_logger_is_quiet_until_the_last_thread_leaves(caplog: pytest.LogCaptureFixture) -> None:
    loud = logging.getLogger(NAME)
    loud.setLevel(logging.WARNING)
    inside, leave = Barrier(2), Barrier(2)

    def other() -> None:
        with quiet_logger(NAME):
            inside.wait()
            leave.wait()

    thread = Thread(target=other)
    with quiet_logger(NAME):
        thread.start()
        inside.wait()
        loud.warning("both inside")
    loud.warning("one inside")
    loud.error("an error")
    leave.wait()
    thread.join()
    loud.warning("nobody inside")
    assert [record.getMessage() for record in caplog.records] == ["an error", "nobody inside"]


def test_a_logger_is_loud_again_after_an_error(caplog: pytest.LogCaptureFixture) -> None:
    loud = logging.getLogger(NAME)
    loud.setLevel(logging.WARNING)
    with pytest.raises(ValueError, match="x"), quiet_logger(NAME), quiet_logger(NAME):
        raise ValueError("x")
    loud.warning("told")
    assert [record.getMessage() for record in caplog.records] == ["told"]


def test_who_asks_for_more_gets_it(caplog: pytest.LogCaptureFixture) -> None:
    loud = logging.getLogger(NAME)
    loud.setLevel(logging.DEBUG)
    with quiet_logger(NAME):
        loud.debug("a detail")
    assert (loud.level, [record.getMessage() for record in caplog.records]) == (logging.DEBUG, ["a detail"])
