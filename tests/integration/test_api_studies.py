"""Searches over HTTP: lists, trials, the best so far, the front, importance, downloads."""

import csv
import io
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pyarrow.parquet as pq
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy import delete, update

from core.lifecycle import EndedBy, JobKind, JobStatus
from core.run_spec import CandidateSpec, SearchSpec
from core.search_files import groups_file, losses_file, trials_folder
from core.spec import KernelTerm, ObjectiveSpec, PenaltyTerm
from models.experiment import StudyRow, TaskRow
from models.job import Job
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import Fence
from models.repositories.searches import SearchRepository
from models.repositories.steps import StepRepository
from tests.integration.api_world import World, running_api, training_result
from tests.integration.study_world import PLAIN_DPO as PLAIN
from tests.integration.study_world import RBF, Made, end_summary, store_search
from tests.integration.test_api import check_problem

BUDGET = SearchSpec(max_trials=12, drift_budget=0.05)


@dataclass(frozen=True)
class Search:
    job: str
    study: str
    fence: Fence

    @property
    def url(self) -> str:
        return f"/v1/studies/{self.study}"


@pytest.fixture
def fresh(sqlite_url: str, tmp_path: Path) -> Iterator[World]:
    with running_api(sqlite_url, tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def world(_sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One API for all tests of this file that look at searches of their own only."""
    folder = tmp_path_factory.mktemp("studies")
    file = folder / "kdpo.db"
    file.write_bytes(_sqlite_template.read_bytes())
    with running_api(f"sqlite:///{file}", folder) as made:
        yield made


def stored(world: World, *trials: Made, spec: SearchSpec | None = None) -> Search:
    """A search that runs, with these trials ended and one more running."""
    datasets = world.get("/v1/datasets").json()["data"]
    dataset = datasets[0]["id"] if datasets else world.dataset()
    job = world.training_job(dataset)["id"]
    fence = world.claim(JobKind.TRAINING)
    with world.database.transaction() as session:
        owner = session.get_one(Job, job).owner_id
        StepRepository(session).plan(fence, ["recommend", "search", "train"])
        StepRepository(session).start(fence, "search")
        study = store_search(
            session, fence, owner, trials, spec=spec or BUDGET, running=True
        )  # fmt: skip
        return Search(job=job, study=study.id, fence=fence)


def end_search(world: World, search: Search, **summary: Any) -> None:
    with world.database.transaction() as session:
        searches = SearchRepository(session)
        searches.end(searches.lock(search.study), by="finished", reason="all is done")
        StepRepository(session).succeed(
            search.fence, "search", end_summary(search.study, **summary)
        )  # fmt: skip


def unchanged(world: World, url: str, answer: Any) -> None:
    """The client that has the answer gets 304 and no body."""
    again = world.get(url, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


# --------------------------------------------------------------------- lists


def test_studies_are_listed_filtered_and_paged(fresh: World) -> None:
    world = fresh
    searches = [stored(world, Made(PLAIN, 0.6)) for _ in range(3)]
    world.finish(searches[0].fence, JobStatus.CANCELLED)
    ids = [search.study for search in searches][::-1]
    answer = world.get("/v1/studies")
    assert [view["id"] for view in answer.json()["data"]] == ids
    assert answer.json()["data"][0] == world.get(searches[2].url).json()
    unchanged(world, "/v1/studies", answer)
    first = world.get("/v1/studies?limit=2")
    assert [view["id"] for view in first.json()["data"]] == ids[:2]
    assert first.json()["has_more"] is True
    rest = world.get(first.links["next"]["url"]).json()
    assert [view["id"] for view in rest["data"]] == ids[2:]

    def listed(query: str) -> list[str]:
        return [view["id"] for view in world.get(f"/v1/studies?{query}").json()["data"]]

    assert listed("status=cancelled") == [searches[0].study]
    assert listed("status=running") == ids[:2]
    assert listed(f"job_id={searches[1].job}") == [searches[1].study]
    dataset = world.get(searches[1].url).json()["dataset_id"]
    assert listed(f"dataset_id={dataset}&model=tiny-lm") == ids
    assert listed("dataset_id=ds_other") == []
    assert listed("model=other") == []
    made = world.get(searches[1].url).json()["created_at"]
    assert listed(f"created_after={made - 60}&created_before={made + 60}") == ids
    assert listed(f"created_after={made + 60}") == []
    bob = world.client.get("/v1/studies", headers=world.headers("bob"))
    assert bob.json()["data"] == []


def test_a_study_tells_its_state_its_budget_and_its_best(world: World) -> None:
    search = stored(
        world, Made(PLAIN, 0.6), Made(RBF, 0.5, feasible=False, drift=0.2), Made(RBF, 0.55),
        Made(RBF, None, seconds=1.0),
    )  # fmt: skip
    answer = world.get(search.url)
    view = answer.json()
    assert view["trials"] == {"waiting": 0, "running": 1, "complete": 3, "pruned": 0, "fail": 1}
    assert view["best_trial"]["number"] == 2
    assert (view["provisional"], view["status"]) == (True, "running")
    assert (view["gpu_seconds"], view["model"]) == (7.0, "tiny-lm")
    assert view["spec"] == BUDGET.model_dump(mode="json")
    plan = view["plan"]
    assert (plan["rungs"], plan["shape"]) == ([5, 20], "usual")
    assert plan["arms"][:2] == ["dpo", "rbf × hellinger"]
    assert plan["budget"] == {"gpu_seconds": None, "max_trials": 12, "deadline_seconds": None}
    unchanged(world, search.url, answer)
    empty = stored(world)
    assert world.get(empty.url).json()["best_trial"] is None


def test_a_study_of_an_old_version_has_no_plan_and_still_answers(fresh: World) -> None:
    world = fresh
    search = stored(world, Made(PLAIN, 0.6))
    with world.database.transaction() as session:
        session.execute(delete(TaskRow))  # what the migration leaves of them
        session.execute(update(StudyRow).values(plan={}, shape="none", ended_at=1.0))
    view = world.get(search.url).json()
    assert (view["plan"], view["best_trial"], view["provisional"]) == (None, None, False)
    assert world.get("/v1/studies").json()["data"] == [view]
    assert world.get(f"{search.url}/trials/0").json()["tasks"] == []
    assert world.get(f"{search.url}/best").json()["rung"] is None
    assert world.get(f"{search.url}/pareto").json()["left_out"] == 2
    assert world.get(f"{search.url}/importance").json()["data"] == []
    assert world.get(f"{search.url}/quote").json()["budget"] is None
    assert world.get(f"{search.url}/export?format=optuna").status_code == 200
    problem = check_problem(world.get(f"{search.url}/pareto?rung=0"), 422, "invalid_input")
    assert problem["error"]["param"] == "rung"


# -------------------------------------------------------------------- trials


def test_trials_by_state_and_in_any_order(world: World) -> None:
    losses = (0.6, 0.52, None, 0.7, 0.52)
    search = stored(
        world, *(Made(RBF, loss, drift=0.1 - 0.01 * n) for n, loss in enumerate(losses))
    )

    def numbers(query: str) -> list[int]:
        seen: list[int] = []
        url: str | None = f"{search.url}/trials?{query}"
        while url is not None:
            answer = world.get(url)
            assert answer.status_code == 200, answer.text
            seen += [trial["number"] for trial in answer.json()["data"]]
            url = answer.links.get("next", {}).get("url")
            assert (url is not None) is answer.json()["has_more"]
        return seen

    assert numbers("limit=4") == [5, 4, 3, 2, 1, 0]
    assert numbers("order_by=number&limit=4") == [0, 1, 2, 3, 4, 5]
    for limit in (1, 2, 3, 100):  # what has no value comes last, whatever the order
        assert numbers(f"order_by=log_loss&limit={limit}") == [1, 4, 0, 3, 2, 5]
        assert numbers(f"order_by=log_loss&order=desc&limit={limit}") == [3, 0, 1, 4, 2, 5]
    assert numbers("order_by=drift") == [4, 3, 1, 0, 2, 5]
    assert numbers("state=fail&state=running&order=asc") == [2, 5]
    assert numbers("state=complete&order_by=log_loss&limit=1") == [1, 4, 0, 3]
    page = world.get(f"{search.url}/trials?order_by=log_loss&limit=2")
    unchanged(world, f"{search.url}/trials?order_by=log_loss&limit=2", page)
    back = page.json()["last_id"]
    before = world.get(f"{search.url}/trials?order_by=log_loss&before={back}").json()
    assert [trial["number"] for trial in before["data"]] == [1]


def test_what_cannot_be_listed_says_why(world: World) -> None:
    search, other = stored(world, Made(PLAIN, 0.6)), stored(world, Made(PLAIN, 0.6))
    url = f"{search.url}/trials"
    theirs = world.get(f"{other.url}/trials").json()["first_id"]
    problem = check_problem(world.get(f"{url}?order_by=drift&after={theirs}"), 404, "not_found")
    assert theirs in problem["detail"]
    problem = check_problem(world.get(f"{url}?order_by=size"), 422, "invalid_input")
    assert problem["error"]["param"] == "order_by"
    check_problem(world.get(f"{url}?state=done"), 422, "invalid_input")
    check_problem(world.get(f"{url}/2"), 404, "not_found")
    check_problem(world.get(f"{url}/{2**31}"), 422, "invalid_input")
    check_problem(world.get(f"{search.url}/importance?target=loss"), 422, "invalid_input")
    problem = check_problem(world.get(f"{search.url}/pareto?rung=2"), 422, "invalid_input")
    assert "expected 0 to 1" in problem["detail"]
    check_problem(world.get(f"{search.url}/export?format=xlsx"), 422, "invalid_input")


def test_a_trial_with_its_words_constraints_and_curves(world: World) -> None:
    search = stored(world, Made(PLAIN, 0.6), Made(RBF, 0.5, drift=0.08, feasible=False))
    with world.database.transaction() as session:
        ExperimentRepository(session).record_metrics(
            search.fence, job_id=search.job, scope="trial:1", step=1, values={"loss": 0.7}
        )
    answer = world.get(f"{search.url}/trials/1")
    trial = answer.json()
    assert (trial["number"], trial["job_id"]) == (1, search.job)
    assert trial["label"] == "rbf × hellinger (penalty)"
    assert trial["words"] == (
        "kernel rbf (gamma 0.05) and hellinger as a penalty (alpha 1.2); "
        "beta 0.2, learning rate 0.001"
    )
    drift, measured = trial["constraints"]
    assert (drift["name"], drift["value"], drift["limit"]) == ("drift", 0.08, 0.05)
    assert drift["violation"] == pytest.approx(0.03)
    assert (drift["kept"], measured["kept"]) == (False, True)
    curve = world.get(trial["metrics_url"]).json()
    assert [(point["step"], point["values"]) for point in curve["data"]] == [(1, {"loss": 0.7})]
    unchanged(world, f"{search.url}/trials/1", answer)
    plain = world.get(f"{search.url}/trials/0").json()
    assert plain["words"] == "plain DPO; beta 0.1, learning rate 0.001"
    assert [constraint["kept"] for constraint in plain["constraints"]] == [True, True]
    running = world.get(f"{search.url}/trials/2").json()
    assert [constraint["kept"] for constraint in running["constraints"]] == [None, None]


def test_a_trial_tells_its_way_from_rung_to_rung(world: World) -> None:
    ended = Made(RBF, 0.66, rung=0, on=(0.58, 0.03, 8.0))
    search = stored(world, ended, Made(PLAIN, None, ended_by=EndedBy.OOM))
    first, second = world.get(f"{search.url}/trials/0").json()["tasks"]
    assert (first["rung"], first["start"], first["stop"], first["log_loss"]) == (0, 0, 5, 0.66)
    assert (second["rung"], second["start"], second["stop"], second["log_loss"]) == (1, 5, 20, 0.58)
    assert (first["job_id"], first["status"], first["ended_by"]) == (search.job, "ended", "budget")
    failed = world.get(f"{search.url}/trials/1").json()
    (task,) = failed["tasks"]
    assert (failed["status"], task["ended_by"]) == ("fail", "oom")
    assert task["message"] == failed["metrics"]["message"] == "loss is NaN"
    (running,) = world.get(f"{search.url}/trials/2").json()["tasks"]
    assert (running["status"], running["finished_at"]) == ("running", None)


# ------------------------------------------------------------------- answers


def test_best_so_far_with_its_ties_and_plain_dpo(world: World) -> None:
    search = stored(
        world, Made(PLAIN, 0.62), Made(RBF, 0.55, drift=0.04, error=0.003),
        Made(RBF, 0.551, drift=0.01, error=0.004), Made(RBF, 0.4, feasible=False, drift=0.3),
    )  # fmt: skip
    answer = world.get(f"{search.url}/best")
    view = answer.json()
    assert (view["provisional"], view["measured"]) == (True, 4)
    assert view["best"]["number"] == 2  # tied with trial 1, and it drifts less
    assert [trial["number"] for trial in view["tied"]] == [1]
    assert view["baseline"]["number"] == 0
    assert view["sentence"].startswith("So far: 2 trials tie")
    gain, half = view["gain"], 1.959964 * math.hypot(0.01, 0.004)
    assert gain["log_loss"] == pytest.approx(0.069)
    assert (gain["low"], gain["high"]) == pytest.approx((0.069 - half, 0.069 + half))
    assert (gain["basis"], view["basis"]) == ("independent", "independent")
    assert (view["rung"], view["steps"]) == (1, 20)
    assert view["final"] is None
    unchanged(world, f"{search.url}/best", answer)


def test_losses_that_are_kept_are_compared_pair_by_pair(world: World) -> None:
    search = stored(world, Made(PLAIN, 0.60), Made(RBF, 0.55), Made(RBF, 0.58, drift=0.01))
    folder = trials_folder(world.settings.artifact_dir, search.job)
    folder.mkdir(parents=True)
    random_ = random.Random(2)
    base = [random_.uniform(0.2, 1.0) for _ in range(60)]
    for number, mean in enumerate((0.60, 0.55, 0.58)):
        shift = [mean - sum(base) / 60 + random_.gauss(0.0, 1e-3) for _ in base]
        shift = [x + mean - (sum(shift) + sum(base)) / 60 for x in shift]
        losses = [loss + x for loss, x in zip(base, shift, strict=True)]
        losses_file(folder, number, 1).write_text(json.dumps(losses))
    groups_file(folder).write_text(json.dumps(list(range(60))))
    view = world.get(f"{search.url}/best").json()
    assert (view["basis"], view["best"]["number"]) == ("paired", 1)
    gain = view["gain"]
    assert (gain["basis"], gain["log_loss"]) == ("paired", pytest.approx(0.05))
    assert 0.049 < gain["low"] < gain["log_loss"] < gain["high"] < 0.051
    losses_file(folder, 2, 1).unlink()
    fewer = world.get(f"{search.url}/best").json()
    assert (fewer["basis"], fewer["gain"]["basis"]) == ("independent", "paired")


def test_only_what_was_measured_at_one_rung_is_compared(world: World) -> None:
    search = stored(
        world,
        Made(PLAIN, 0.69, rung=0, on=(0.60, 0.02, 8.0)),
        Made(RBF, 0.66, rung=0, on=(0.58, 0.03, 8.0)),
        Made(RBF, 0.65, rung=0),
        Made(RBF, 0.64, rung=0, on=(0.50, 0.20, 8.0)),  # drifts too far in the end
    )
    view = world.get(f"{search.url}/best").json()
    assert (view["rung"], view["steps"], view["measured"]) == (1, 20, 3)
    assert (view["best"]["number"], view["best"]["log_loss"]) == (1, 0.58)
    assert view["baseline"]["gpu_seconds"] == 10.0
    front = world.get(f"{search.url}/pareto").json()
    assert (front["rung"], front["front"], front["left_out"]) == (1, [1, 0], 2)
    first = world.get(f"{search.url}/pareto?rung=0").json()
    assert (first["steps"], first["front"]) == (5, [2])
    points = {point["number"]: point["feasible"] for point in first["data"]}
    assert points == {0: True, 1: True, 2: True, 3: False}
    assert world.get(f"{search.url}/importance").json()["rung"] == 0, "most trials came there"
    assert world.get(f"{search.url}/importance?rung=1").json()["trials"] == 3
    assert world.get(search.url).json()["best_trial"] == view["best"]


def test_seeds_of_a_configuration_are_one(world: World) -> None:
    search = stored(
        world, Made(PLAIN, 0.60), Made(PLAIN, 0.70, repeat=1), Made(RBF, 0.50),
        Made(RBF, 0.64, repeat=1, drift=0.04),
    )  # fmt: skip
    point = world.get(f"{search.url}/pareto").json()["data"][1]
    assert (point["number"], point["log_loss"], point["drift"]) == (2, pytest.approx(0.51), 0.04)
    view = world.get(f"{search.url}/best").json()
    assert view["gain"]["log_loss"] == pytest.approx(0.08)
    assert view["measured"] == 2


def test_the_verdict_of_the_search_stands_once_it_has_ended(world: World) -> None:
    search = stored(world, Made(PLAIN, 0.6), Made(RBF, 0.55, error=None), Made(RBF, 0.56))
    assert world.get(f"{search.url}/best").json()["gain"]["basis"] is None
    end_search(world, search, winner_trial=2, tied_trials=[1], sentence="Trial 2 drifts least.")
    ended = world.get(f"{search.url}/best").json()
    assert (ended["provisional"], ended["best"]["number"]) == (False, 2)
    assert [trial["number"] for trial in ended["tied"]] == [1]
    assert ended["sentence"] == "Trial 2 drifts least."
    assert world.get(search.url).json()["provisional"] is False
    result = training_result("ckpt_x").model_dump(mode="json")
    world.finish(search.fence, result=result)
    assert world.get(f"{search.url}/best").json()["final"] == result["comparison"]


def test_there_is_an_answer_when_there_is_nothing_yet(world: World) -> None:
    search = stored(world)
    best = world.get(f"{search.url}/best").json()
    assert (best["best"], best["tied"], best["baseline"], best["gain"]) == (None, [], None, None)
    assert best["sentence"] == (
        "So far: None of 0 trials ended with a log-loss within the constraints."
    )
    pareto = world.get(f"{search.url}/pareto").json()
    assert (pareto["front"], pareto["data"], pareto["left_out"]) == ([], [], 1)
    table = list(csv.reader(io.StringIO(world.get(f"{search.url}/export").text)))
    assert len(table) == 2  # its name and the trial that runs


def test_plain_dpo_that_leads_has_no_gain_over_itself(world: World) -> None:
    search = stored(world, Made(PLAIN, 0.5), Made(RBF, 0.6))
    view = world.get(f"{search.url}/best").json()
    assert view["best"] == view["baseline"]
    assert view["gain"] is None


def test_pareto_front_of_the_feasible_trials(world: World) -> None:
    search = stored(
        world,
        Made(PLAIN, 0.60, drift=0.01, seconds=1.0),
        Made(RBF, 0.55, drift=0.03, seconds=3.0),
        Made(RBF, 0.55, drift=0.03, seconds=4.0),  # trial 1 is cheaper
        Made(RBF, 0.40, drift=0.90, seconds=1.0, feasible=False),
        Made(RBF, 0.70, drift=0.01, seconds=0.5),
        Made(RBF, None),
    )
    answer = world.get(f"{search.url}/pareto")
    view = answer.json()
    assert view["objectives"] == ["log_loss", "drift", "gpu_seconds"]
    assert view["front"] == [1, 0, 4]
    points = {point["number"]: point for point in view["data"]}
    assert [n for n, point in points.items() if point["on_front"]] == [0, 1, 4]
    assert points[3]["feasible"] is False
    assert view["left_out"] == 2  # one diverged, one runs
    unchanged(world, f"{search.url}/pareto", answer)


def by_beta(count: int) -> list[Made]:
    """Trials whose log-loss depends on beta alone."""
    random_ = random.Random(1)
    made = []
    for _ in range(count):
        beta, gamma = (10 ** random_.uniform(-1.5, 0.0) for _ in range(2))
        term = KernelTerm.model_validate({"kernel": "rbf", "gamma": gamma})
        penalty = PenaltyTerm.model_validate({"divergence": "kl", "alpha": gamma})
        spec = ObjectiveSpec(beta=beta, kernel_term=term, divergence_term=penalty)
        loss = 0.5 + 0.1 * abs(math.log(beta / 0.2))
        made.append(Made(spec, loss, learning_rate=1e-3 * random_.uniform(0.5, 2.0)))
    return made


def test_importance_names_what_made_the_result(world: World) -> None:
    search = stored(world, *by_beta(25))
    url = f"{search.url}/importance"
    answer = world.get(url)
    assert answer.status_code == 200, answer.text
    view = answer.json()
    assert (view["trials"], view["target"], view["method"]) == (25, "log_loss", "ped_anova")
    assert (view["data"][0]["name"], view["data"][0]["above_noise"]) == ("beta", True)
    same = {p["name"]: p["reason"] for p in view["data"] if p["importance"] is None}
    assert same["rbf_width"] == "has the same value in all 25 trials that use it"
    unchanged(world, url, answer)


def test_too_few_trials_get_no_invented_importance(world: World) -> None:
    search = stored(world, *by_beta(4))
    view = world.get(f"{search.url}/importance?target=drift").json()
    assert (view["data"], view["trials"], view["needed"], view["top_share"]) == ([], 4, 20, None)
    assert view["sentence"].startswith("4 trials have a drift; with less than 20")


# ----------------------------------------------------------------- downloads


@pytest.fixture
def mixed(world: World) -> Search:
    outside = ObjectiveSpec(beta=5.0, label_smoothing=0.1)  # the search never tries such a one
    return stored(world, Made(PLAIN, 0.6), Made(RBF, None), Made(outside, 0.7), Made(RBF, 0.5))


def test_csv_and_parquet_hold_every_trial_with_all_its_parameters(
    world: World, mixed: Search
) -> None:
    answer = world.get(f"{mixed.url}/export?format=csv")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert f'filename="{mixed.study}.csv"' in answer.headers["content-disposition"]
    unchanged(world, f"{mixed.url}/export?format=csv", answer)
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    trials = world.get(f"{mixed.url}/trials?order=asc").json()["data"]
    assert [row["id"] for row in rows] == [trial["id"] for trial in trials]
    assert [row["status"] for row in rows] == [
        "complete",
        "fail",
        "complete",
        "complete",
        "running",
    ]
    assert [row["log_loss"] for row in rows] == ["0.6", "", "0.7", "0.5", ""]
    assert rows[0]["params.objective.kernel_term"] == ""
    assert rows[3]["params.objective.kernel_term.kernel.type"] == "rbf"
    assert rows[3]["params.objective.divergence_term.alpha"] == "1.2"
    assert rows[2]["params.objective.label_smoothing"] == "0.1"
    assert rows[1]["metrics.message"] == "loss is NaN"
    assert rows[0]["feasible"] == "true"

    parquet = world.get(f"{mixed.url}/export?format=parquet")
    assert parquet.headers["content-type"] == "application/vnd.apache.parquet"
    unchanged(world, f"{mixed.url}/export?format=parquet", parquet)
    table = pq.read_table(io.BytesIO(parquet.content))
    assert table.column_names == list(rows[0])
    assert table["log_loss"].to_pylist() == [0.6, None, 0.7, 0.5, None]
    assert table["feasible"].to_pylist() == [True, False, True, True, None]
    types = {field.name: str(field.type) for field in table.schema}
    assert (types["number"], types["params.learning_rate"], types["label"]) == (
        "int64", "double", "string",
    )  # fmt: skip


def test_the_optuna_file_opens_with_optunas_own_tools(
    world: World, mixed: Search, tmp_path: Path
) -> None:
    answer = world.get(f"{mixed.url}/export?format=optuna")
    assert answer.status_code == 200, answer.text
    unchanged(world, f"{mixed.url}/export?format=optuna", answer)
    file = tmp_path / "study.log"
    file.write_bytes(answer.content)
    study = optuna.load_study(
        study_name=mixed.study, storage=JournalStorage(JournalFileBackend(str(file)))
    )
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE", "RUNNING"]
    assert (study.best_trial.number, study.best_value) == (3, 0.5)
    best = study.best_trial
    assert best.params["kernel"] == "rbf"
    assert best.constraints == {"drift": pytest.approx(-0.03), "unusable": 0.0}
    assert best.user_attrs["label"] == "rbf × hellinger (penalty)"
    assert best.user_attrs["metrics.accuracy"] == 0.6
    candidate = CandidateSpec.model_validate_json(study.trials[2].user_attrs["candidate"])
    assert candidate.objective.label_smoothing == 0.1
    assert set(study.trials[0].params) == {"beta", "learning_rate", "kernel", "divergence"}
    row = world.get(f"{mixed.url}/trials/3").json()
    assert best.datetime_start is not None
    assert int(best.datetime_start.timestamp()) == row["created_at"]
    study.enqueue_trial(best.params)  # it is a whole study: one may go on with it
    beta = study.trials[0].distributions["beta"]
    assert study.ask({"beta": beta}).params == {"beta": best.params["beta"]}


def test_optuna_computes_importances_and_tables_from_the_file(world: World, tmp_path: Path) -> None:
    search = stored(world, *by_beta(25))
    file = tmp_path / "study.log"
    file.write_bytes(world.get(f"{search.url}/export?format=optuna").content)
    storage = JournalStorage(JournalFileBackend(str(file)))
    study = optuna.load_study(study_name=search.study, storage=storage)
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.2)
    found = optuna.importance.get_param_importances(
        study, evaluator=evaluator, params=["beta", "gamma", "alpha", "learning_rate"]
    )
    ours = world.get(f"{search.url}/importance").json()
    assert next(iter(found)) == ours["data"][0]["name"] == "beta"
    table = study.trials_dataframe()
    assert table["value_log_loss"].dropna().tolist() == [made.log_loss for made in by_beta(25)]
    assert table["user_attrs_gpu_seconds"].iloc[0] == 2.0
