"""What is refused of a search is refused of its body, before anything is asked."""

import pytest
from pydantic import ValidationError

from app.study_bodies import CreateStudy

BODY = {"model": "tiny-lm", "dataset_id": "ds_1"}


def test_a_search_is_the_job_that_it_makes() -> None:
    body = CreateStudy.model_validate(
        {**BODY, "search": {"gpu_seconds": 60}, "hyperparameters": {"n_epochs": 2}}
    )
    assert body.method.auto.search.gpu_seconds == 60
    assert body.method.auto.hyperparameters.n_epochs == 2


def test_what_no_search_can_have_is_refused_with_the_body() -> None:
    with pytest.raises(ValidationError, match="`full` does not go with method `auto`"):
        CreateStudy.model_validate({**BODY, "hyperparameters": {"adaptation": "full"}})
