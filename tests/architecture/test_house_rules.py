"""The house rules hold in our code, and each rule catches the faults it is there for."""

from pathlib import Path

import pytest

from tests.architecture import house_rules as rules
from tests.architecture.house_rules import Rule, Source

ROOT = Path(__file__).parents[2]


def violations(rule: Rule, path: str, text: str) -> list[int]:
    return [found.line for found in rule(Source.parse(path, text))]


@pytest.mark.parametrize("rule", rules.PRODUCT_RULES, ids=lambda rule: rule.__name__)
def test_product_keeps_the_rule(rule: Rule) -> None:
    sources = rules.read_sources(ROOT, rules.PACKAGES)
    assert len(sources) > 20, "the walk found almost nothing"
    found = [str(violation) for source in sources for violation in rule(source)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("rule", rules.EVERYWHERE, ids=lambda rule: rule.__name__)
def test_everything_keeps_the_rule(rule: Rule) -> None:
    sources = rules.read_sources(ROOT, ("tests", "examples", "bench"))
    assert sources, "the walk found nothing"
    found = [str(violation) for source in sources for violation in rule(source)]
    assert not found, "\n" + "\n".join(found)


FAULTS: list[tuple[Rule, str, str]] = [
    (rules.sql_only_in_models, "app/x.py", "from sqlalchemy import select\nselect(Job)"),
    (rules.sql_only_in_models, "app/x.py", "import models\nsession.execute(statement)"),
    (rules.sql_only_in_models, "worker/x.py", "from sqlalchemy import update\nupdate(Job)"),
    (rules.sql_only_in_models, "worker/x.py", "import models\ndef f(s): s.query(Job).all()"),
    (rules.commit_only_in_session, "models/repositories/x.py", "import a\nsession.commit()"),
    (rules.commit_only_in_session, "app/x.py", "import a\nwith s() as t: t.commit()"),
    (rules.celery_only_at_the_edges, "worker/jobs/x.py", "import a\nfrom celery import Task"),
    (rules.celery_only_at_the_edges, "app/main.py", "import a\nimport kombu.exceptions"),
    (rules.celery_only_at_the_edges, "app/x.py", "def f():\n  from celery import Celery"),
    (rules.web_only_in_app, "worker/x.py", "import a\nfrom fastapi import Depends"),
    (rules.web_only_in_app, "core/x.py", "import a\nfrom starlette.requests import Request"),
    (rules.web_only_in_app, "models/x.py", "import a\nraise HTTPException"),
    (rules.web_only_in_app, "models/x.py", "import a\nx = status.HTTP_404_NOT_FOUND"),
    (rules.web_only_in_app, "worker/x.py", "import a\nfail(status_code=409)"),
    (rules.no_io_at_import, "core/x.py", "import os\nDEBUG = os.environ['DEBUG']"),
    (rules.no_io_at_import, "core/x.py", "import os\nDEBUG = os.getenv('DEBUG')"),
    (rules.no_io_at_import, "core/x.py", "import json\nX = json.load(open('x.json'))"),
    (rules.no_io_at_import, "models/x.py", "import a\nengine = create_engine(URL)"),
    (rules.no_io_at_import, "models/x.py", "import a\ndef f(e=create_engine(URL)): return e"),
    (rules.no_io_at_import, "models/x.py", "import a\n@cached(Settings())\ndef f(): ..."),
    (rules.no_io_at_import, "worker/x.py", "import torch\nX = torch.zeros(3).cuda()"),
    (rules.no_io_at_import, "worker/x.py", "class A:\n  x = Path('x').read_text()"),
    (rules.no_io_at_import, "worker/x.py", "try:\n  x = open('x')\nfinally:\n  pass"),
    (rules.no_io_at_import, "worker/x.py", "import a\nwith open('x') as file: pass"),
    (rules.empty_init, "objectives/__init__.py", "import a\nX = compute()"),
    (rules.no_swallowed_errors, "app/x.py", "try: f()\nexcept: raise"),
    (rules.no_swallowed_errors, "app/x.py", "try: f()\nexcept Exception: pass"),
    (rules.no_swallowed_errors, "app/x.py", "try: f()\nexcept (OSError, BaseException): ..."),
    (rules.no_swallowed_errors, "app/x.py", "import contextlib\nwith suppress(Exception): f()"),
]


@pytest.mark.parametrize(("rule", "path", "text"), FAULTS)
def test_planted_fault_is_caught(rule: Rule, path: str, text: str) -> None:
    assert violations(rule, path, text) == [2]


@pytest.mark.parametrize("path", ["app/__init__.py", "worker/jobs/__init__.py"])
def test_code_in_an_empty_init_is_caught(path: str) -> None:
    assert violations(rules.empty_init, path, "from core import errors\n") == [1]
    assert violations(rules.empty_init, path, "") == []


def test_long_file_is_caught() -> None:
    text = "x = 1\n" * 401
    assert violations(rules.short_enough, "app/x.py", text) == [400]
    assert violations(rules.short_enough, "migrations/versions/x.py", text) == []
    assert violations(rules.short_enough, "tests/x.py", text) == []
    assert violations(rules.short_enough, "tests/x.py", "x = 1\n" * 701) == [700]


@pytest.mark.parametrize("begin", ["def f():", "async def f():", "class A:\n  def f(self):"])
def test_long_function_is_caught(begin: str) -> None:
    line = begin.count("\n") + 1
    assert violations(rules.short_functions, "app/x.py", begin + "\n    x = 1" * 70) == [line]
    assert violations(rules.short_functions, "app/x.py", begin + "\n    x = 1" * 69) == []
    assert violations(rules.short_functions, "tests/x.py", begin + "\n    x = 1" * 70) == [line]


@pytest.mark.parametrize(("text", "lines"), [("x = 1\n", [1]), ('"""A."""\nx = 1', []), ("", [])])
def test_file_without_a_caption_is_caught(text: str, lines: list[int]) -> None:
    assert violations(rules.captioned, "app/x.py", text) == lines


FINE: list[tuple[Rule, str, str]] = [
    (rules.sql_only_in_models, "models/repositories/x.py", "session.execute(select(Job))"),
    (rules.sql_only_in_models, "worker/x.py", "digest.update(b'x'); d.update(a=1)"),
    (rules.sql_only_in_models, "app/x.py", "client.delete('/v1/jobs'); text('x')"),
    (rules.commit_only_in_session, "models/session.py", "session.commit()"),
    (rules.celery_only_at_the_edges, "app/queue.py", "from kombu.exceptions import X"),
    (rules.web_only_in_app, "app/x.py", "raise HTTPException(status_code=404)"),
    (rules.no_io_at_import, "app/x.py", "def f():\n  return open('x')"),
    (rules.no_io_at_import, "app/x.py", "make = lambda: create_engine(URL)"),
    (rules.no_io_at_import, "app/x.py", "if __name__ == '__main__':\n  print(1)"),
    (rules.no_io_at_import, "app/x.py", "X = re.compile('x')"),
    (rules.empty_init, "objectives/__init__.py", "from objectives.a import A\n__all__ = ['A']"),
    (rules.no_swallowed_errors, "app/x.py", "try: f()\nexcept OSError: pass"),
    (rules.no_swallowed_errors, "app/x.py", "try: f()\nexcept Exception: log(); raise"),
]


@pytest.mark.parametrize(("rule", "path", "text"), FINE)
def test_good_code_is_left_alone(rule: Rule, path: str, text: str) -> None:
    assert violations(rule, path, text) == []


def test_every_rule_has_a_planted_fault() -> None:
    own_tests = {rules.short_enough, rules.short_functions, rules.captioned}
    planted = {rule for rule, _, _ in FAULTS} | own_tests
    assert planted == set(rules.PRODUCT_RULES)
