"""Quotes of a search as those see them who follow its job."""

from models.repositories.searches import SearchRepository
from models.session import Database
from tests.unit.models.seeds import Seeds


def test_a_quote_is_a_new_version_of_its_job(database: Database, seeds: Seeds) -> None:
    job_id = seeds.job()
    fence = seeds.claimed().fence
    with database.transaction() as session:
        searches = SearchRepository(session)
        study = searches.create(fence, owner_id=seeds.owner_id, spec={}, plan={}, shape="least")
    before = seeds.get(job_id).version
    with database.transaction() as session:
        searches = SearchRepository(session)
        searches.quote(searches.of(study.id), {"p50": 3.0}, "It will take 3 s.")
    assert seeds.get(job_id).version == before + 1
    assert seeds.events(job_id)[-1].message == "It will take 3 s."
