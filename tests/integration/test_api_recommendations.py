"""Recommendations through the API: the heat map, accepting a pair, cancelling."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.lifecycle import JobKind, JobStatus
from core.methods import KernelDpo
from core.profile import Recommendation
from core.run_spec import SearchSpec
from core.spec import ObjectiveSpec
from models.job import Job
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import Fence
from selection.recommender import recommend
from tests.integration.api_world import MODEL, World, objective, running_api
from tests.integration.study_world import Made, store_search
from tests.integration.test_api import check_problem
from tests.unit.selection.samples import profile


@pytest.fixture
def world(sqlite_url: str, tmp_path: Path) -> Iterator[World]:
    with running_api(sqlite_url, tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def found() -> Recommendation:
    return recommend(profile(), beta=0.2)


def asked(world: World, dataset: str | None = None, **body: Any) -> str:
    answer = world.post(
        "/v1/recommendations",
        json={"model": MODEL, "dataset_id": dataset or world.dataset(), "seed": 7, **body},
    )
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def store(world: World, fence: Fence, result: Recommendation) -> None:
    with world.database.transaction() as session:
        job = session.get_one(Job, fence.job_id)
        ExperimentRepository(session).save_recommendation(
            fence, owner_id=job.owner_id, dataset_id=str(job.dataset_id), model=str(job.model),
            result=result.model_dump(mode="json"),
        )  # fmt: skip


def answered(world: World, result: Recommendation, dataset: str | None = None) -> str:
    made = asked(world, dataset)
    fence = world.claim(JobKind.RECOMMENDATION)
    store(world, fence, result)
    world.finish(fence, result={"recommendation_id": made})
    return made


def search(world: World, dataset: str, *trials: tuple[ObjectiveSpec, float | None]) -> None:
    """A search on the data: each trial with its log-loss, or None where it failed."""
    world.training_job(dataset)
    fence = world.claim(JobKind.TRAINING)
    with world.database.transaction() as session:
        owner = session.get_one(Job, fence.job_id).owner_id
        made = [Made(spec, log_loss) for spec, log_loss in trials]
        store_search(session, fence, owner, made, spec=SearchSpec())
    world.finish(fence, JobStatus.CANCELLED)


# --------------------------------------------------------------------- matrix


def test_matrix_has_a_cell_for_every_pair_and_is_cheap_to_poll(
    world: World, found: Recommendation
) -> None:
    made = answered(world, found)
    answer = world.get(f"/v1/recommendations/{made}/matrix")
    assert answer.status_code == 200
    view = answer.json()
    assert view["object"] == "recommendation.matrix"
    assert view["recommendation_id"] == made
    assert (len(view["kernels"]), len(view["divergences"])) == (5, 7)
    assert [(c["kernel"], c["divergence"]) for c in view["cells"]] == [
        (k, d) for k in view["kernels"] for d in view["divergences"]
    ]
    ranking = {(p.kernel, p.divergence): p for p in found.ranking}
    for cell in view["cells"]:
        pair = ranking[cell["kernel"], cell["divergence"]]
        assert cell["rank"] == pair.rank
        assert cell["score"] == pair.score.model_dump(mode="json")
        assert cell["recommended"] == (pair.rank == 1)
        assert cell["tied"] == (pair.behind is not None and not pair.behind.separated)
        assert (cell["trials"], cell["failed_trials"]) == (0, 0)
    same = world.get(
        f"/v1/recommendations/{made}/matrix", headers={"If-None-Match": answer.headers["etag"]}
    )
    assert same.status_code == 304


def test_matrix_counts_the_trials_of_the_owners_searches_on_the_same_data(
    world: World, found: Recommendation
) -> None:
    dataset, other = world.dataset(), world.dataset()
    made = answered(world, found, dataset)
    rbf_kl = objective("rbf", "kl")
    alone = ObjectiveSpec(divergence_term=rbf_kl.divergence_term)
    search(world, dataset, (ObjectiveSpec(), 0.6), (rbf_kl, 0.5), (rbf_kl, None), (alone, 0.5))
    search(world, dataset, (rbf_kl, 0.55), (objective("hmk", "renyi"), 0.6))
    search(world, other, (rbf_kl, 0.5))
    view = world.get(f"/v1/recommendations/{made}/matrix").json()
    counts = {
        (c["kernel"], c["divergence"]): (c["trials"], c["failed_trials"])
        for c in view["cells"]
        if c["trials"] or c["failed_trials"]
    }
    assert counts == {("rbf", "kl"): (2, 1), ("hmk", "renyi"): (1, 0)}
    assert (view["plain_trials"], view["other_trials"]) == (1, 1)


def test_matrix_of_a_queued_recommendation_is_empty_and_of_another_owner_not_found(
    world: World,
) -> None:
    made = asked(world)
    view = world.get(f"/v1/recommendations/{made}/matrix").json()
    assert (view["status"], view["cells"]) == ("queued", [])
    theirs = world.client.get(f"/v1/recommendations/{made}/matrix", headers=world.headers("bob"))
    check_problem(theirs, 404, "not_found")


def test_matrix_of_what_a_fine_tuning_job_recommended(world: World) -> None:
    made = world.train(world.training_job(world.dataset())["id"])
    view = world.get(f"/v1/recommendations/{made['recommendation']}/matrix").json()
    cells = {(c["kernel"], c["divergence"]): c["trials"] for c in view["cells"]}
    assert cells == {("rbf", "kl"): 1, ("polynomial", "kl"): 0}


# --------------------------------------------------------------------- accept


def test_accepting_queues_a_job_with_the_recommended_pair(
    world: World, found: Recommendation
) -> None:
    dataset = world.dataset()
    made = answered(world, found, dataset)
    answer = world.post(f"/v1/recommendations/{made}/accept")
    assert answer.status_code == 201, answer.text
    job = answer.json()
    assert answer.headers["location"] == f"/v1/fine_tuning/jobs/{job['id']}"
    assert world.get(answer.headers["location"]).json() == job
    assert (job["status"], job["dataset_id"], job["model"]) == ("queued", dataset, MODEL)
    assert job["recommendation_id"] == made
    assert job["seed"] == 7
    first = found.ranking[0]
    assert job["method"]["type"] == "kernel_dpo"
    with world.database.reading() as session:
        rows = [session.get_one(Job, id_).spec for id_ in (made, job["id"])]
    assert rows[0]["model"] == rows[1]["model"], "the job has the very model that was measured"
    assert _objective(job) == first.objective.model_dump(mode="json")
    assert world.claim(JobKind.TRAINING).job_id == job["id"]


def test_accepting_another_rank_with_hyperparameters_of_ones_own(
    world: World, found: Recommendation
) -> None:
    made = answered(world, found)
    body = {
        "rank": 12, "seed": 3, "suffix": "v2", "metadata": {"team": "a"},
        "hyperparameters": {"gamma": 0.3, "n_epochs": 2, "learning_rate": 2e-4},
    }  # fmt: skip
    answer = world.post(f"/v1/recommendations/{made}/accept", json=body)
    assert answer.status_code == 201, answer.text
    job = answer.json()
    pair = found.ranking[11]
    objective_ = _objective(job)
    assert objective_["kernel_term"]["kernel"]["type"] == pair.kernel
    assert objective_["divergence_term"]["divergence"]["type"] == pair.divergence
    assert objective_["kernel_term"]["gamma"] == 0.3
    assert pair.objective.divergence_term is not None
    assert objective_["divergence_term"]["alpha"] == pair.objective.divergence_term.alpha  # type: ignore[union-attr]
    params = job["method"]["kernel_dpo"]["hyperparameters"]
    assert (params["n_epochs"], params["learning_rate"]) == (2, 2e-4)
    assert (job["seed"], job["suffix"], job["metadata"]) == (3, "v2", {"team": "a"})


def _objective(job: dict[str, Any]) -> dict[str, Any]:
    return KernelDpo.model_validate(job["method"]["kernel_dpo"]).objective().model_dump(mode="json")


def test_accepting_is_refused_without_a_final_answer(world: World, found: Recommendation) -> None:
    made = asked(world)
    problem = check_problem(
        world.post(f"/v1/recommendations/{made}/accept"), 409, "recommendation_not_ready"
    )
    assert problem["retryable"] is True
    assert "is queued and has no answer" in problem["detail"]
    fence = world.claim(JobKind.RECOMMENDATION)
    store(world, fence, found)
    problem = check_problem(
        world.post(f"/v1/recommendations/{made}/accept"), 409, "recommendation_not_ready"
    )
    assert "a provisional answer" in problem["detail"]
    jobs = world.get("/v1/fine_tuning/jobs").json()["data"]
    assert jobs == []


def test_a_provisional_answer_stays_one_when_its_job_fails(
    world: World, found: Recommendation
) -> None:
    made = asked(world)
    fence = world.claim(JobKind.RECOMMENDATION)
    store(world, fence, found.model_copy(update={"provisional": True}))
    error = {"code": "out_of_memory", "message": "no room", "retryable": False, "attempt": 1}
    world.finish(fence, JobStatus.FAILED, error=error)
    for tail in ("", "/matrix"):
        view = world.get(f"/v1/recommendations/{made}{tail}").json()
        assert (view["status"], view["provisional"]) == ("failed", True)
    problem = check_problem(
        world.post(f"/v1/recommendations/{made}/accept"), 409, "recommendation_not_ready"
    )
    assert problem["retryable"] is False
    assert problem["hint"] == "ask for a new one: POST /v1/recommendations"


@pytest.mark.parametrize(
    "body",
    [
        {"rank": 36},
        {"rank": 0},
        {"hyperparameters": {"beat": 0.1}},
        {"hyperparameters": {"adaptation": "full", "lora_r": 4}},
        {"kernel": "rbf"},
    ],
)
def test_accepting_what_cannot_be_is_refused(
    world: World, found: Recommendation, body: dict[str, Any]
) -> None:
    made = answered(world, found)
    check_problem(world.post(f"/v1/recommendations/{made}/accept", json=body), 422, "invalid_input")
    assert world.get("/v1/fine_tuning/jobs").json()["data"] == []


def test_accepting_what_a_fine_tuning_job_recommended(world: World) -> None:
    made = world.train(world.training_job(world.dataset(), seed=5)["id"])
    answer = world.post(f"/v1/recommendations/{made['recommendation']}/accept", json={"rank": 2})
    assert answer.status_code == 201, answer.text
    assert answer.json()["recommendation_id"] == made["recommendation"]
    assert _objective(answer.json()) == objective("polynomial").model_dump(mode="json")


# --------------------------------------------------------------------- cancel


def test_cancel(world: World, found: Recommendation) -> None:
    made = asked(world)
    answer = world.post(f"/v1/recommendations/{made}/cancel")
    assert answer.status_code == 202
    assert answer.json()["status"] == "cancelled"
    done = answered(world, found)
    check_problem(world.post(f"/v1/recommendations/{done}/cancel"), 409, "job_not_cancellable")
    check_problem(world.post("/v1/recommendations/rec_none/cancel"), 404, "not_found")


def test_what_a_fine_tuning_job_recommended_is_not_cancelled_apart_from_it(world: World) -> None:
    made = world.train(world.training_job(world.dataset())["id"])
    answer = world.post(f"/v1/recommendations/{made['recommendation']}/cancel")
    problem = check_problem(answer, 409, "job_not_cancellable")
    assert "/v1/fine_tuning/jobs/ftjob-" in problem["hint"]
