"""Pages of trials against a plain list, whatever the order; what several studies have tried."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import NotFound
from core.lifecycle import EndedBy, TrialStatus
from models.experiment import StudyRow, TrialRow
from models.repositories.experiments import ExperimentRepository
from models.repositories.paging import PageQuery
from models.repositories.searches import SearchRepository
from models.repositories.studies import StudyRepository, Tally, TrialOrder
from models.repositories.task_records import TaskEnd, TrialKey
from models.session import Database
from tests.unit.models.seeds import Seeds

LOSSES = (0.6, 0.5, None, 0.5, 0.7, None, 0.5, 0.4)
INFEASIBLE = 7
# The database does not change between examples.
same_database = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def study_of(seeds: Seeds, *losses: float | None) -> str:
    """A study whose trials ended with these; the seventh is infeasible."""
    seeds.job()
    fence = seeds.claimed().fence
    with seeds.database.transaction() as session:
        searches = SearchRepository(session)
        study = searches.create(fence, owner_id=seeds.owner_id, spec={}, plan={}, shape="auto")
        for number, loss in enumerate(losses):
            record = searches.add(
                study, TrialKey("dpo", number, 0), rung=0, start=0, setting={}, origin="prior",
                candidate={}, reason="a test",
            )  # fmt: skip
            searches.take(fence, study, record, limit_seconds=None, label="dpo")
            session.refresh(record.task)
            end = TaskEnd(
                ended_by=EndedBy.NAN if loss is None else EndedBy.BUDGET, seconds=0.5,
                log_loss=loss, drift=None if loss is None else 0.1,
                feasible=loss is not None and number != INFEASIBLE,
                metrics={} if loss is None else {"steps": 4.0}, is_last=True,
            )  # fmt: skip
            searches.finish(fence, study, record, end)
        return study.id


@pytest.fixture
def study(seeds: Seeds) -> str:
    return study_of(seeds, *LOSSES)


def expected(trials: list[TrialRow], query: PageQuery) -> tuple[list[int], bool]:
    """What a page is, said with lists."""
    sign = 1.0 if query.order == "asc" else -1.0
    ordered = sorted(
        trials, key=lambda t: (t.log_loss is None, sign * (t.log_loss or 0.0), t.id)
    )  # fmt: skip
    ids = [trial.id for trial in ordered]
    low = 0 if query.after is None else ids.index(query.after) + 1
    high = len(ids) if query.before is None else ids.index(query.before)
    rows = [trial.number for trial in ordered[low : max(low, high)]]
    if query.before is not None and query.after is None:
        return rows[-query.limit :], len(rows) > query.limit
    return rows[: query.limit], len(rows) > query.limit


@same_database
@given(data=st.data())
def test_ordered_page_is_that_of_a_list(
    database: Database, study: str, data: st.DataObject
) -> None:
    with database.reading() as session:
        trials = ExperimentRepository(session).trials(study)
        cursors = st.none() | st.sampled_from([trial.id for trial in trials])
        query = PageQuery(
            limit=data.draw(st.integers(1, len(LOSSES) + 1)),
            after=data.draw(cursors),
            before=data.draw(cursors),
            order=data.draw(st.sampled_from(["asc", "desc"])),
        )
        page = StudyRepository(session).trial_page(study, query, order_by=TrialOrder.LOG_LOSS)
    assert ([row.number for row in page.rows], page.has_more) == expected(trials, query)


def test_states_and_orders_of_pages(database: Database, study: str) -> None:
    with database.reading() as session:
        studies = StudyRepository(session)

        def numbers(order_by: TrialOrder, *states: TrialStatus) -> list[int]:
            query = PageQuery(order="asc")
            page = studies.trial_page(study, query, order_by=order_by, states=states)
            return [row.number for row in page.rows]

        for order in TrialOrder:
            assert numbers(order, TrialStatus.FAIL) == [2, 5]
            assert sorted(numbers(order)) == list(range(len(LOSSES)))
        assert numbers(TrialOrder.NUMBER) == list(range(len(LOSSES)))
        query = PageQuery(after="trial_unknown")
        with pytest.raises(NotFound, match="trial_unknown"):
            studies.trial_page(study, query, order_by=TrialOrder.DRIFT)
        with pytest.raises(NotFound, match="has no trial 99"):
            studies.trial(study, 99)


def test_tally_and_measurements_of_several_studies(
    database: Database, seeds: Seeds, study: str
) -> None:
    empty, failed = study_of(seeds), study_of(seeds, None)
    with database.reading() as session:
        studies = StudyRepository(session)
        ids = [study, empty, failed]
        measured = studies.measurements(ids)
        assert {id_: [one.log_loss for one in found] for id_, found in measured.items()} == {
            study: [loss for loss in LOSSES if loss is not None],
            empty: [],
            failed: [],
        }
        assert studies.tallies(ids) == {
            study: Tally({TrialStatus.COMPLETE: 6, TrialStatus.FAIL: 2}, 4.0),
            empty: Tally(),
            failed: Tally({TrialStatus.FAIL: 1}, 0.5),
        }
        assert studies.measurements([]) == studies.tallies([]) == {}
        page = studies.page(seeds.owner_id, PageQuery(order="asc"))
        assert [row.id for row in page.rows] == ids
        assert all(isinstance(row, StudyRow) for row in page.rows)
        assert studies.page("owner_other", PageQuery()).rows == []
