"""Pages against a plain list, whatever the cursor."""

from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.ids import IdPrefix, new_id
from core.lifecycle import JobKind, JobStatus
from models.repositories.job_pages import JobFilter
from models.repositories.jobs import JobRepository
from models.repositories.paging import PageQuery
from models.session import Database
from tests.unit.models.seeds import Seeds

COUNT = 9
# The database does not change between examples.
same_database = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
Order = Literal["asc", "desc"]


@pytest.fixture
def ids(seeds: Seeds) -> list[str]:
    """Ids of jobs in ascending order."""
    return sorted(seeds.job() for _ in range(COUNT))


def expected(ids: list[str], query: PageQuery) -> tuple[list[str], bool]:
    """What a page is, said with lists: `ids` in order, cut at the cursor, `limit` long."""
    ordered = ids if query.order == "asc" else ids[::-1]
    sign = 1 if query.order == "asc" else -1

    def later(left: str, right: str) -> bool:
        return left != right and (left > right) == (sign == 1)

    rows = [i for i in ordered if query.after is None or later(i, query.after)]
    rows = [i for i in rows if query.before is None or later(query.before, i)]
    if query.before is not None and query.after is None:
        return rows[-query.limit :], len(rows) > query.limit
    return rows[: query.limit], len(rows) > query.limit


def page_ids(database: Database, seeds: Seeds, query: PageQuery) -> tuple[list[str], bool]:
    with database.reading() as session:
        one_kind = JobFilter(kind=JobKind.TRAINING)
        page = JobRepository(session).page(seeds.owner_id, query, one_kind)
        return [job.id for job in page.rows], page.has_more


@same_database
@given(data=st.data())
def test_page_is_that_of_a_list(
    database: Database, seeds: Seeds, ids: list[str], data: st.DataObject
) -> None:
    # Cursors of rows that are there, and of rows that are gone.
    cursors = st.none() | st.sampled_from([*ids, ids[0][:-1] + "0", ids[-1] + "z", "", "zzz"])
    query = PageQuery(
        limit=data.draw(st.integers(1, COUNT + 2)),
        after=data.draw(cursors),
        before=data.draw(cursors),
        order=data.draw(st.sampled_from(["asc", "desc"])),
    )
    assert page_ids(database, seeds, query) == expected(ids, query)


@same_database
@given(limit=st.integers(1, COUNT), order=st.sampled_from(["asc", "desc"]))
def test_walking_gives_each_row_once_in_both_directions(
    database: Database, seeds: Seeds, ids: list[str], limit: int, order: Order
) -> None:
    ordered = ids if order == "asc" else ids[::-1]
    forward: list[str] = []
    while True:
        after = forward[-1] if forward else None
        rows, more = page_ids(database, seeds, PageQuery(limit=limit, after=after, order=order))
        forward += rows
        if not more:
            break
    assert forward == ordered
    backward: list[str] = []
    while True:
        before = backward[0] if backward else "zzz" if order == "asc" else "0"
        rows, more = page_ids(database, seeds, PageQuery(limit=limit, before=before, order=order))
        backward = rows + backward
        if not more:
            break
    assert backward == ordered


def test_new_rows_do_not_shift_a_walk(database: Database, seeds: Seeds, ids: list[str]) -> None:
    first, _ = page_ids(database, seeds, PageQuery(limit=4))
    seeds.job()
    second, _ = page_ids(database, seeds, PageQuery(limit=4, after=first[-1]))
    assert first + second == ids[::-1][:8]


def test_jobs_of_all_kinds_are_listed_by_age(database: Database, seeds: Seeds) -> None:
    kinds = (JobKind.TRAINING, JobKind.EXPORT, JobKind.RECOMMENDATION, JobKind.EVALUATION)
    made = [seeds.job(kind=kind) for kind in kinds + kinds[::-1]]
    assert made != sorted(made), "prefixes alone would give this order"

    def listed(query: PageQuery) -> list[str]:
        with database.reading() as session:
            return [job.id for job in JobRepository(session).page(seeds.owner_id, query).rows]

    assert listed(PageQuery()) == made[::-1]
    assert listed(PageQuery(order="asc")) == made
    for limit in (1, 3):
        for number, cursor in enumerate(made):
            later, earlier = made[number + 1 :], made[:number]
            upwards = PageQuery(limit=limit, after=cursor, order="asc")
            assert listed(upwards) == later[:limit]
            assert listed(PageQuery(limit=limit, after=cursor)) == earlier[::-1][:limit]
            assert listed(PageQuery(limit=limit, before=cursor)) == later[:limit][::-1]
            before = PageQuery(limit=limit, before=cursor, order="asc")
            assert listed(before) == earlier[-limit:]
    gone = new_id(IdPrefix.JOB)
    assert listed(PageQuery(after=gone)) == made[::-1]
    assert listed(PageQuery(after=gone, order="asc")) == []
    assert listed(PageQuery(after="no-id")) == []


def test_filters_hold(database: Database, seeds: Seeds, ids: list[str]) -> None:
    _, dataset_job = seeds.dataset_job()
    running = seeds.claimed().fence.job_id
    with database.reading() as session:
        jobs = JobRepository(session)
        by_kind = jobs.page(seeds.owner_id, PageQuery(), JobFilter(kind=JobKind.DATASET))
        by_status = jobs.page(seeds.owner_id, PageQuery(), JobFilter(status=JobStatus.RUNNING))
        foreign = jobs.page("own_somebody", PageQuery())
    assert [job.id for job in by_kind.rows] == [dataset_job]
    assert [job.id for job in by_status.rows] == [running]
    assert list(foreign.rows) == []
