"""The process for Optuna and Arrow: what is said when it fails, is late, or has to wait."""

import pytest

from app import study_process
from app.study_tasks import ColumnCopy, Kind, ParquetTask
from core.errors import RunAborted, Unavailable

TASK = ParquetTask(columns=(ColumnCopy(name="a", kind=Kind.INT, cells=(1,)),))


def test_a_process_that_fails_is_an_error_of_the_server_and_in_its_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    text = ParquetTask(columns=(ColumnCopy(name="a", kind=Kind.INT, cells=("x",)),))
    with pytest.raises(RunAborted, match="the parquet of this study could not be computed"):
        study_process.run_task(text)
    assert "ArrowInvalid" in caplog.text


def test_a_process_that_is_late_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_process, "TIME_LIMIT_S", 0.01)
    with pytest.raises(Unavailable, match="took more than"):
        study_process.run_task(TASK)


def test_a_third_one_waits_for_its_turn_and_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_process, "_WAIT_S", 0.01)
    slots = study_process._SLOTS
    with slots, slots, pytest.raises(Unavailable) as refused:
        study_process.run_task(TASK)
    assert refused.value.retryable
