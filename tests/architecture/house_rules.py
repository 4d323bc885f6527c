"""House rules about calls, as functions from a parsed source file to violations.

Rules about imports between our packages are import-linter's (`[tool.importlinter]`).
"""

import ast
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PACKAGES = ("app", "core", "kdpo", "migrations", "models", "objectives", "selection", "worker")
PRODUCT = tuple(p for p in PACKAGES if p != "migrations")

MAX_SOURCE_LINES = 400
MAX_TEST_LINES = 700
MAX_FUNCTION_LINES = 70

CELERY_FILES = frozenset(
    {"worker/celery_app.py", "worker/tasks.py", "worker/main.py", "app/queue.py"}
)
FULL_INITS = frozenset({"kdpo/__init__.py", "models/__init__.py", "objectives/__init__.py"})

_SQL_FUNCTIONS = frozenset({"select", "insert", "update", "delete", "text"})
_SQL_METHODS = frozenset({"execute", "executemany", "exec_driver_sql", "scalars", "query"})
_IO_AT_IMPORT = frozenset(
    {
        *("open", "print", "input"),
        *("os.getenv", "os.environ.get", "os.makedirs", "os.mkdir"),
        *("create_engine", "make_engine", "sqlalchemy.create_engine", "sessionmaker"),
        *("Settings", "get_settings", "make_celery", "create_app"),
        *("Celery", "FastAPI", "Redis", "redis.Redis", "redis.from_url", "httpx.Client"),
        *("socket.socket", "subprocess.run", "subprocess.Popen", "logging.basicConfig"),
        *("torch.manual_seed", "torch.set_num_threads", "torch.set_default_dtype"),
        *("torch.cuda.is_available", "torch.cuda.init", "time.sleep"),
    }
)
_IO_METHODS_AT_IMPORT = frozenset(
    {"cuda", "read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "connect", "touch"}
)


@dataclass(frozen=True)
class Source:
    """One parsed file; `path` is relative to the repository, with forward slashes."""

    path: str
    tree: ast.Module
    text: str

    @classmethod
    def parse(cls, path: str, text: str) -> "Source":
        return cls(path=path, tree=ast.parse(text, filename=path), text=text)

    @property
    def package(self) -> str:
        return PurePosixPath(self.path).parts[0]


@dataclass(frozen=True)
class Violation:
    """Where a rule is broken and what to do instead."""

    path: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


Rule = Callable[[Source], Iterator[Violation]]


def dotted(node: ast.expr) -> str:
    """`a.b.c` for a chain of names, else the last attribute with a leading dot, else ``."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head and not head.startswith(".") else f".{node.attr}"
    return ""


def imported_roots(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Root packages of every import, also of those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.partition(".")[0], node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            yield node.module.partition(".")[0], node.lineno


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    """Every call below `tree`."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def _sqlalchemy_names(tree: ast.Module) -> frozenset[str]:
    """Names that this file took from SQLAlchemy."""
    return frozenset(
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sqlalchemy")
        for alias in node.names
    )


# ------------------------------------------------------------------ the rules


def sql_only_in_models(source: Source) -> Iterator[Violation]:
    """SQL is built and sent under models/ only (migrations are SQL by nature)."""
    if source.package in ("models", "migrations"):
        return
    names = _sqlalchemy_names(source.tree)
    for call in calls(source.tree):
        name = dotted(call.func)
        is_built = name in _SQL_FUNCTIONS & names or name == "select"
        is_sent = isinstance(call.func, ast.Attribute) and call.func.attr in _SQL_METHODS
        if is_built or is_sent:
            yield Violation(
                source.path, call.lineno, f"`{name}(` is SQL; move it to models/repositories/"
            )


def commit_only_in_session(source: Source) -> Iterator[Violation]:
    """A transaction is ended in one place."""
    if source.path == "models/session.py" or source.package == "migrations":
        return
    for call in calls(source.tree):
        if isinstance(call.func, ast.Attribute) and call.func.attr == "commit":
            yield Violation(
                source.path, call.lineno, "commit outside models/session.py; use transaction()"
            )


def celery_only_at_the_edges(source: Source) -> Iterator[Violation]:
    """Celery and kombu types stay where messages are sent and received."""
    if source.path in CELERY_FILES:
        return
    for root, line in imported_roots(source.tree):
        if root in ("celery", "kombu", "billiard"):
            allowed = ", ".join(sorted(CELERY_FILES))
            yield Violation(source.path, line, f"imports {root}; only {allowed} may")


def web_only_in_app(source: Source) -> Iterator[Violation]:
    """FastAPI, Starlette, uvicorn and HTTP status numbers stay under app/."""
    if source.package == "app":
        return
    for root, line in imported_roots(source.tree):
        if root in ("fastapi", "starlette", "uvicorn"):
            yield Violation(source.path, line, f"imports {root}; only app/ may")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.keyword) and node.arg == "status_code":
            yield Violation(
                source.path, node.value.lineno, "an HTTP status; raise a core.errors class"
            )
        if isinstance(node, ast.Name | ast.Attribute):
            name = dotted(node).rpartition(".")[2]
            if name in ("HTTPException", "HTTPStatus") or name.startswith("HTTP_"):
                yield Violation(
                    source.path, node.lineno, f"`{name}` is HTTP; raise a core.errors class"
                )


def _statements_run_at_import(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """What Python runs when it imports a file: not the bodies of functions."""
    for statement in body:
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield from statement.decorator_list
                yield statement.args
            case ast.ClassDef():
                yield from statement.decorator_list
                yield from statement.bases
                yield from _statements_run_at_import(statement.body)
            case ast.If() if dotted(statement.test).endswith("TYPE_CHECKING"):
                continue
            case ast.If() if _is_main_guard(statement.test):
                yield from _statements_run_at_import(statement.orelse)
            case ast.If() | ast.For() | ast.While() | ast.With() | ast.Try():
                yield from _parts_run_at_import(statement)
            case _:
                yield statement


def _parts_run_at_import(
    statement: ast.If | ast.For | ast.While | ast.With | ast.Try,
) -> Iterator[ast.AST]:
    """The head of a compound statement, and what its blocks run."""
    for child in ast.iter_child_nodes(statement):
        if isinstance(child, ast.ExceptHandler):
            yield from _statements_run_at_import(child.body)
        elif isinstance(child, ast.stmt):
            yield from _statements_run_at_import([child])
        else:
            yield child


def _is_main_guard(test: ast.expr) -> bool:
    return isinstance(test, ast.Compare) and dotted(test.left) == "__name__"


def _walk_outside_lambdas(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Lambda):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _walk_outside_lambdas(child)


def no_io_at_import(source: Source) -> Iterator[Violation]:
    """Importing a file reads nothing, opens nothing and touches no device."""
    if source.path == "migrations/env.py":  # Alembic runs this file; nothing imports it
        return
    for part in _statements_run_at_import(source.tree.body):
        for node in _walk_outside_lambdas(part):
            if isinstance(node, ast.Attribute) and dotted(node) == "os.environ":
                yield Violation(
                    source.path, node.lineno, "os.environ at import; take core.settings"
                )
            if not isinstance(node, ast.Call):
                continue
            name = dotted(node.func)
            method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if name in _IO_AT_IMPORT or method in _IO_METHODS_AT_IMPORT:
                yield Violation(
                    source.path, node.lineno, f"`{name}(` at import; call it in a function"
                )


def empty_init(source: Source) -> Iterator[Violation]:
    """`__init__.py` has no code: a package is not imported through a hidden door."""
    if not source.path.endswith("__init__.py"):
        return
    if source.path not in FULL_INITS:
        if source.text.strip():
            yield Violation(source.path, 1, "must be empty")
        return
    for statement in source.tree.body:
        is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        is_all = isinstance(statement, ast.Assign) and all(
            dotted(target) == "__all__" for target in statement.targets
        )
        if not (is_text or is_all or isinstance(statement, ast.Import | ast.ImportFrom)):
            yield Violation(source.path, statement.lineno, "may only import and name `__all__`")


def no_swallowed_errors(source: Source) -> Iterator[Violation]:
    """No bare `except`, and no broad `except` that does nothing."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = [dotted(item) for item in caught if item is not None]
            if node.type is None:
                yield Violation(source.path, node.lineno, "bare `except`; name the error")
            elif {"Exception", "BaseException"} & set(names) and all(
                isinstance(part, ast.Pass | ast.Continue | ast.Break)
                or (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
                for part in node.body
            ):
                yield Violation(
                    source.path, node.lineno, "swallows every error; handle, log or raise"
                )
        if (
            isinstance(node, ast.Call)
            and dotted(node.func).rpartition(".")[2] == "suppress"
            and any(dotted(a) in ("Exception", "BaseException") for a in node.args)
        ):
            yield Violation(source.path, node.lineno, "suppresses every error; name the error")


def short_enough(source: Source) -> Iterator[Violation]:
    """A file that a reader can hold in mind."""
    if source.path.startswith("migrations/versions/"):  # generated, and never edited again
        return
    limit = MAX_TEST_LINES if source.package == "tests" else MAX_SOURCE_LINES
    lines = len(source.text.splitlines())
    if lines > limit:
        yield Violation(source.path, limit, f"{lines} lines, at most {limit}; split it by subject")


def short_functions(source: Source) -> Iterator[Violation]:
    """A function fits on a screen, its signature and docstring included."""
    if source.path.startswith("migrations/versions/"):
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield Violation(
                    source.path,
                    node.lineno,
                    f"`{node.name}` has {lines} lines, at most {MAX_FUNCTION_LINES}; split it",
                )


def captioned(source: Source) -> Iterator[Violation]:
    """The first line of a file says what it holds."""
    if source.text.strip() and not ast.get_docstring(source.tree):
        yield Violation(source.path, 1, "begins without a docstring; say what the file holds")


PRODUCT_RULES: tuple[Rule, ...] = (
    sql_only_in_models,
    commit_only_in_session,
    celery_only_at_the_edges,
    web_only_in_app,
    no_io_at_import,
    empty_init,
    no_swallowed_errors,
    short_enough,
    short_functions,
    captioned,
)
EVERYWHERE: tuple[Rule, ...] = (no_swallowed_errors, short_enough, short_functions)

# ------------------------------------------------------------------ files


@functools.cache
def read_sources(root: Path, packages: tuple[str, ...]) -> list[Source]:
    """Every Python file of the given top folders."""
    return [
        Source.parse(file.relative_to(root).as_posix(), file.read_text())
        for package in packages
        for file in sorted((root / package).rglob("*.py"))
        if "__pycache__" not in file.parts
    ]


def module_name(path: str) -> str:
    """`app/main.py` -> `app.main`."""
    parts = PurePosixPath(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
