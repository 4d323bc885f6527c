"""What the process for searches answers where files of a search are gone."""

import json
from pathlib import Path

from app.search_tasks import RaceFound, Racer, RaceTask
from app.search_tool import answer


def racer(number: int, log_loss: float, file: Path) -> Racer:
    return Racer(
        number=number, label=f"arm {number}", log_loss=log_loss, log_losses={0: log_loss},
        drift=0.1, feasible=True, standard_error=0.01, files=(str(file),),
    )  # fmt: skip


def race(folder: Path) -> RaceFound:
    task = RaceTask(
        racers=(racer(0, 0.6, folder / "0.json"), racer(1, 0.5, folder / "1.json")),
        verdict=None, baseline=0, groups=str(folder / "groups.json"),
    )  # fmt: skip
    return RaceFound.model_validate_json(answer(RaceTask.model_validate_json(
        task.model_dump_json()
    )))  # fmt: skip


def test_trials_whose_losses_are_all_gone_are_taken_as_independent(tmp_path: Path) -> None:
    (tmp_path / "groups.json").write_text(json.dumps(list(range(40))))
    found = race(tmp_path)
    assert (found.winner, found.basis) == (1, "independent")
    assert found.gain is not None
    assert (found.gain.basis, round(found.gain.log_loss, 6)) == ("independent", 0.1)


def test_losses_that_are_there_are_compared_pair_by_pair(tmp_path: Path) -> None:
    (tmp_path / "groups.json").write_text(json.dumps(list(range(40))))
    for number, mean in enumerate((0.6, 0.5)):
        values = [mean + 0.01 * (i % 2) - 0.005 for i in range(40)]
        (tmp_path / f"{number}.json").write_text(json.dumps(values))
    found = race(tmp_path)
    assert found.gain is not None
    assert (found.winner, found.basis, found.gain.basis) == (1, "paired", "paired")
