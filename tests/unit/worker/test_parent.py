"""What a spare makes of the job that it is told."""

import os
import threading
from pathlib import Path

import pytest

from worker.parent import Assignment, Parent


def test_a_spare_that_was_told_to_end_takes_no_job(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log, words = tmp_path / "log.txt", tmp_path / "words"
    log.touch()
    words.write_bytes(Assignment(job_id="job_a", attempt=1, log=log).line())
    stop = threading.Event()
    stop.set()
    with words.open("rb", buffering=0) as told:
        assert Parent(1, stop)._take(told) is None
    os.write(1, b"elsewhere")
    assert capfd.readouterr().out == "elsewhere"
    assert log.read_bytes() == b""


def test_an_assignment_is_one_line() -> None:
    given = Assignment(job_id="job_a", attempt=3, log=Path("/data/with\nbreak/log.txt"))
    line = given.line()
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert Assignment.model_validate_json(line) == given
