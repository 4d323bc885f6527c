"""What people do to searches over HTTP: limits, quotes, trials by hand, clones, pause, cancel."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.lifecycle import AttemptOutcome, EndedBy, JobStatus
from core.queue import QueueName
from core.run_spec import SearchSpec
from models.job import Job
from models.repositories.jobs import JobRepository
from models.repositories.searches import SearchRepository
from models.repositories.workers import WorkerRepository
from selection.rungs import decide
from selection.study import Start
from selection.wire import TaskFacts, plan_from_json, study_of
from tests.integration.api_world import MODEL, World, running_api
from tests.integration.study_world import PLAIN_DPO, RBF, Made
from tests.integration.test_api import check_problem
from tests.integration.test_api_studies import Search, end_search, stored


@pytest.fixture
def world(database_url: str, tmp_path: Path) -> Iterator[World]:
    with running_api(database_url, tmp_path) as made:
        yield made


def patch(world: World, url: str, body: dict[str, Any], **headers: str) -> Any:
    return world.client.patch(url, json=body, headers={**world.headers(), **headers})


def events(world: World, search: Search) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = world.get(
        f"/v1/jobs/{search.job}/events?order=asc&limit=100"
    ).json()["data"]
    return found


def next_task(world: World, search: Search) -> Start:
    """What the search itself would start now."""
    with world.database.reading() as session:
        searches = SearchRepository(session)
        study = searches.of(search.study)
        facts = [TaskFacts(**record.facts()) for record in searches.records(study.id)]
        action = decide(plan_from_json(study.plan), study_of(facts, elapsed_seconds=1.0))
    assert isinstance(action, Start), action
    return action


# -------------------------------------------------------------------- limits


def test_a_budget_is_extended_and_taken_away(world: World) -> None:
    search = stored(world, Made(PLAIN_DPO, 0.6, rung=0), spec=SearchSpec(gpu_seconds=1.0))
    before = world.get(search.url)
    assert before.json()["plan"]["shape"] == "least"
    etag = before.headers["etag"]
    answer = patch(world, search.url, {"gpu_seconds": 1000, "parallelism": 3}, **{"If-Match": etag})
    assert answer.status_code == 200, answer.text
    view = answer.json()
    assert view == world.get(search.url).json()
    assert view["plan"]["shape"] == "wide", "the dearest that it pays for"
    assert view["plan"]["budget"]["gpu_seconds"] == view["spec"]["gpu_seconds"] == 1000.0
    assert (view["parallelism"], view["spec"]["max_trials"]) == (3, None)
    told = events(world, search)[-1]
    assert told["type"] == "study.changed"
    assert (told["data"]["gpu_seconds"], told["data"]["parallelism"]) == (1000.0, 3)
    stale = patch(world, search.url, {"max_trials": 4}, **{"If-Match": etag})
    check_problem(stale, 412, "precondition_failed")
    fixed = patch(world, search.url, {"gpu_seconds": None, "shape": "few"}).json()
    assert fixed["plan"]["budget"]["gpu_seconds"] is None
    assert (fixed["plan"]["shape"], fixed["parallelism"]) == ("few", 3)
    said = len(events(world, search))
    assert patch(world, search.url, {"shape": "few"}).status_code == 200
    assert len(events(world, search)) == said, "nothing has changed"


def test_limits_that_cannot_be_say_why(world: World) -> None:
    search = stored(world, Made(PLAIN_DPO, 0.6))
    for body, name in (
        ({}, "nothing to change"),
        ({"gpu_seconds": 0}, "gpu_seconds"),
        ({"max_trials": 1}, "max_trials"),
        ({"shape": "huge"}, "shape"),
        ({"parallelism": 0}, "parallelism"),
        ({"drift_budget": 0.1}, "drift_budget"),
    ):
        problem = check_problem(patch(world, search.url, body), 422, "invalid_input")
        assert name in problem["detail"], problem
    check_problem(patch(world, "/v1/studies/study_none", {"max_trials": 4}), 404, "not_found")
    bob = world.client.patch(search.url, json={"max_trials": 4}, headers=world.headers("bob"))
    check_problem(bob, 404, "not_found")
    end_search(world, search, winner_trial=0, tied_trials=[], sentence="Trial 0 wins.")
    ended = check_problem(patch(world, search.url, {"max_trials": 40}), 409, "study_ended")
    assert "all is done" in ended["detail"]
    assert "/clone" in ended["hint"]


def test_two_that_change_limits_at_once_both_count(world: World) -> None:
    search = stored(world, Made(PLAIN_DPO, 0.6))
    answers: list[int] = []

    def change(body: dict[str, Any]) -> None:
        answers.append(patch(world, search.url, body).status_code)

    bodies = ({"max_trials": 40}, {"gpu_seconds": 500.0})
    threads = [threading.Thread(target=change, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200, 200]
    budget = world.get(search.url).json()["plan"]["budget"]
    assert (budget["max_trials"], budget["gpu_seconds"]) == (40, 500.0)


# --------------------------------------------------------------------- quotes


def test_the_quote_follows_budget_workers_and_what_is_spent(world: World) -> None:
    search = stored(world, Made(PLAIN_DPO, 0.69, rung=0, seconds=3.0), spec=SearchSpec())
    url = f"{search.url}/quote"
    quote = world.get(url).json()
    assert (quote["provisional"], quote["workers"], quote["spent"]) == (True, 1, 3.0)
    assert quote["low"] <= quote["p50"] <= quote["p90"] <= quote["high"]
    assert quote["tasks"] > 5
    assert quote["eta"] > 0.0
    two = world.get(f"{url}?workers=2").json()
    assert two["workers"] == 2
    assert two["eta"] < quote["eta"]
    with world.database.transaction() as session:
        for name in ("wrk_a", "wrk_b"):
            WorkerRepository(session).beat(
                name, host="h", pid=1, version="1", queues=[QueueName.GPU], draining=False
            )
    assert world.get(url).json()["workers"] == 2
    patch(world, search.url, {"gpu_seconds": 8.0, "parallelism": 1})
    capped = world.get(url).json()
    assert capped["workers"] == 1
    assert capped["high"] <= 8.0 < quote["low"]
    end_search(world, search, winner_trial=0, tied_trials=[], sentence="Trial 0 wins.")
    paid = world.get(url).json()
    assert (paid["provisional"], paid["tasks"], paid["eta"]) == (False, 0, 0.0)
    assert paid["p50"] == paid["high"] == paid["spent"] == 3.0


# -------------------------------------------------------------- trials by hand


def test_a_trial_by_hand_is_the_next_that_is_started(world: World) -> None:
    search = stored(world, Made(PLAIN_DPO, 0.6, rung=0), Made(RBF, 0.58, rung=0))
    body = {"arm": "rbf × hellinger", "factors": {"learning_rate": 2.0, "gamma": 0.5}}
    answer = world.post(f"{search.url}/trials", json=body)
    assert answer.status_code == 201, answer.text
    trial = answer.json()
    assert answer.headers["location"] == f"{search.url}/trials/3"
    assert trial == world.get(f"{search.url}/trials/3").json()
    assert (trial["status"], trial["origin"], trial["draw"]) == ("waiting", "hand", 2)
    assert trial["candidate"]["learning_rate"] == pytest.approx(2e-3)
    assert trial["candidate"]["objective"]["kernel_term"]["gamma"] == pytest.approx(0.025)
    assert [(t["status"], t["reason"]) for t in trial["tasks"]] == [
        ("waiting", "a person asked for it")
    ]
    start = next_task(world, search)
    assert (start.task.trial.key, start.task.rung) == (("rbf × hellinger", 2, 0), 0)
    assert start.candidate.model_dump(mode="json") == trial["candidate"]
    assert events(world, search)[-1]["type"] == "trial.queued"
    problem = check_problem(world.post(f"{search.url}/trials", json=body), 409, "trial_exists")
    assert "trial 3" in problem["detail"]

    values = {"arm": "dpo", "values": {"beta": 0.2}}
    plain = world.post(f"{search.url}/trials", json=values).json()
    assert plain["candidate"]["objective"]["beta"] == pytest.approx(0.2)
    assert plain["setting"]["beta"] == pytest.approx(2.0)
    screened = world.post(f"{search.url}/trials", json={"arm": "polynomial × kl"}).json()
    assert (screened["draw"], screened["tasks"][0]["rung"]) == (0, 0)


def test_a_clone_of_a_trial_keeps_what_is_not_said(world: World) -> None:
    search = stored(world, Made(PLAIN_DPO, 0.6), Made(RBF, 0.58), Made(RBF, 0.57))
    url = f"{search.url}/trials/2/clone"
    assert world.get(f"{search.url}/trials/2").json()["setting"]["learning_rate"] == 1.01
    answer = world.post(url, json={"values": {"alpha": 0.6}})
    assert answer.status_code == 202, answer.text
    made = answer.json()
    assert (made["arm"], made["number"]) == ("rbf × hellinger", 4)
    assert made["setting"]["learning_rate"] == 1.01
    assert made["setting"]["alpha"] == pytest.approx(0.5)
    check_problem(world.post(url, json={}), 409, "trial_exists")
    check_problem(world.post(f"{search.url}/trials/9/clone", json={}), 404, "not_found")


def test_trials_that_cannot_be_say_why(world: World) -> None:
    search = stored(world, Made(PLAIN_DPO, 0.6), spec=SearchSpec(max_trials=3))
    url = f"{search.url}/trials"
    rbf = "rbf × hellinger"
    for body, param, said in (
        ({"arm": "rbf × mmd"}, "arm", "polynomial × kl"),
        ({"arm": rbf, "factors": {"beta": 5.0}}, "factors.beta", "1/4 to 4"),
        ({"arm": rbf, "values": {"beta": 0.01}}, "values.beta", "0.05 to 0.8"),
        ({"arm": "dpo", "factors": {"gamma": 2.0}}, "factors.gamma", "no meaning for dpo"),
        ({"arm": rbf, "factors": {"mixture": [0.5, 0.5, 0.5]}}, "factors.mixture", "HMK"),
        ({"arm": "hmk × kl", "factors": {"mixture": [0.5, 0.5, 1.5]}}, "factors.mixture", "0.95"),
        ({"arm": rbf, "factors": {}, "values": {}}, None, "either factors or values"),
        ({"arm": rbf, "factors": {"width": 2.0}}, None, "width"),
        ({"arm": rbf, "beta": 2.0}, None, "beta"),
        ({"factors": {}}, None, "arm"),
    ):
        problem = check_problem(world.post(url, json=body), 422, "invalid_input")
        assert said in problem["detail"], problem
        assert param is None or problem["error"]["param"] == param, problem
    assert world.post(url, json={"arm": "hmk × kl"}).status_code == 201
    problem = check_problem(world.post(url, json={"arm": "rbf × kl"}), 409, "budget_reached")
    assert "PATCH" in problem["hint"]
    assert patch(world, search.url, {"max_trials": 4}).status_code == 200
    assert world.post(url, json={"arm": "rbf × kl"}).status_code == 201
    world.finish(search.fence, JobStatus.CANCELLED)
    problem = check_problem(world.post(url, json={"arm": "rbf × kl"}), 409, "study_ended")
    assert "cancelled" in problem["detail"]


def test_a_failed_trial_is_tried_again_and_what_it_cost_is_lost(world: World) -> None:
    lost = Made(RBF, None, rung=0, seconds=4.0, ended_by=EndedBy.OOM)
    cut = Made(RBF, None, rung=0, seconds=1.0, ended_by=EndedBy.PRUNER)
    search = stored(world, Made(PLAIN_DPO, 0.6, rung=0), lost, cut)
    answer = world.post(f"{search.url}/trials/1/retry")
    assert answer.status_code == 202, answer.text
    trial = answer.json()
    assert (trial["status"], trial["ended_by"], trial["feasible"]) == ("waiting", None, None)
    assert trial["metrics"] == {}
    (task,) = trial["tasks"]
    assert (task["status"], task["seconds"], task["lost_seconds"]) == ("waiting", 0.0, 4.0)
    assert next_task(world, search).task.trial.key == ("rbf × hellinger", 0, 0)
    view = world.get(search.url).json()
    assert (view["gpu_seconds"], view["lost_seconds"]) == (3.0, 4.0)
    assert world.post(f"{search.url}/trials/2/retry").status_code == 202
    for number in (0, 1, 3):  # measured, waiting, running
        problem = check_problem(
            world.post(f"{search.url}/trials/{number}/retry"), 409, "trial_not_failed"
        )
        assert f"trial {number}" in problem["detail"]
    check_problem(world.post(f"{search.url}/trials/7/retry"), 404, "not_found")


# ------------------------------------------------------------- new ones and clones


def test_a_study_is_made_by_its_job(world: World) -> None:
    dataset = world.dataset()
    body = {
        "model": MODEL, "dataset_id": dataset, "seed": 3, "metadata": {"team": "a"},
        "search": {"gpu_seconds": 60.0}, "hyperparameters": {"n_epochs": 2},
    }  # fmt: skip
    answer = world.post("/v1/studies", json=body)
    assert answer.status_code == 201, answer.text
    job = answer.json()
    assert answer.headers["location"] == f"/v1/fine_tuning/jobs/{job['id']}"
    assert (job["status"], job["study_id"], job["seed"]) == ("queued", None, 3)
    assert job["method"]["auto"]["search"]["gpu_seconds"] == 60.0
    assert job["method"]["auto"]["hyperparameters"]["n_epochs"] == 2.0
    draft = world.post("/v1/studies", json={**body, "auto_start": False}).json()
    assert draft["draft"] is True
    check_problem(world.post("/v1/studies", json={**body, "method": {}}), 422, "invalid_input")
    check_problem(world.post("/v1/studies", json={**body, "dataset_id": "ds_x"}), 404, "not_found")


def test_a_clone_has_what_is_said_and_else_what_the_study_has_now(world: World) -> None:
    search = stored(world, Made(PLAIN_DPO, 0.6), spec=SearchSpec(gpu_seconds=50.0))
    patch(world, search.url, {"gpu_seconds": 80.0, "parallelism": 2})
    world.finish(search.fence, JobStatus.CANCELLED)
    answer = world.post(f"{search.url}/clone")
    assert answer.status_code == 201, answer.text
    first = answer.json()
    old = world.get(f"/v1/fine_tuning/jobs/{search.job}").json()
    assert (first["model"], first["training_file"]) == (old["model"], old["training_file"])
    assert first["method"]["auto"]["search"]["gpu_seconds"] == 80.0
    assert first["method"]["auto"]["hyperparameters"] == old["method"]["auto"]["hyperparameters"]
    other = world.post(
        f"{search.url}/clone",
        json={
            "search": {"gpu_seconds": None, "shape": "lean"}, "seed": 9, "warm_start": False,
            "hyperparameters": {"n_epochs": 3}, "metadata": {"why": "longer"},
        },
    ).json()  # fmt: skip
    assert (
        other["method"]["auto"]["search"] | {"gpu_seconds": None}
        == (other["method"]["auto"]["search"])
    )
    assert other["method"]["auto"]["search"]["shape"] == "lean"
    assert other["method"]["auto"]["search"]["parallelism"] == 2
    assert (other["seed"], other["metadata"]) == (9, {"why": "longer"})
    assert other["method"]["auto"]["hyperparameters"]["n_epochs"] == 3.0
    with world.database.reading() as session:
        specs = [session.get_one(Job, job["id"]).spec for job in (first, other)]
        pinned = session.get_one(Job, search.job).spec["model"]
    assert [(s["cloned_from"], s["warm_start"]) for s in specs] == [
        (search.study, True),
        (search.study, False),
    ]
    assert [spec["model"] for spec in specs] == [pinned, pinned]
    problem = check_problem(
        world.post(f"{search.url}/clone", json={"hyperparameters": {"early_stopping_patience": 2}}),
        422,
        "invalid_input",
    )
    assert "eval_every" in problem["detail"]
    check_problem(world.post("/v1/studies/study_none/clone"), 404, "not_found")


# ---------------------------------------------------------------- its job's verbs


def test_a_search_is_paused_resumed_and_cancelled(world: World) -> None:
    search = stored(world, Made(PLAIN_DPO, 0.6))
    paused = world.post(f"{search.url}/pause")
    assert paused.status_code == 202, paused.text
    assert paused.json()["id"] == search.study
    assert world.get(f"/v1/jobs/{search.job}").json()["pause_requested"] is True
    with world.database.transaction() as session:
        JobRepository(session).requeue(
            search.fence, AttemptOutcome.PREEMPTED, delay_s=0.0, message="it has saved"
        )
    assert world.get(search.url).json()["status"] == "paused"
    assert world.post(f"{search.url}/trials", json={"arm": "rbf × kl"}).status_code == 201
    assert world.post(f"{search.url}/resume").json()["status"] == "queued"
    cancelled = world.post(f"{search.url}/cancel", json={"keep_checkpoints": True})
    assert cancelled.status_code == 202
    view = cancelled.json()
    assert (view["status"], view["provisional"]) == ("cancelled", False)
    assert view["best_trial"]["number"] == 0, "what was measured stays"
    check_problem(world.post(f"{search.url}/resume"), 409, "job_not_resumable")
    for verb in ("pause", "resume", "cancel"):
        answer = world.client.post(f"{search.url}/{verb}", headers=world.headers("bob"))
        check_problem(answer, 404, "not_found")
