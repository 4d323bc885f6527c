"""What this server can do: kernels, divergences, methods, layouts, limits, models at hand."""

from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Request, Response

from app.catalog_entries import DivergenceEntry, KernelEntry, divergences, kernels
from app.conditional import CONDITIONAL_RESPONSES
from app.deps import AnyCaller, Config
from app.responses import ListOf, Schema, conditional, list_of
from core.errors import NotFound
from core.layout_names import LayoutName
from core.settings import Mode, Settings
from core.spec import DivergenceName, KernelName

router = APIRouter(tags=["meta"])

Name = Annotated[str, Path(max_length=64, pattern=r"^[a-z0-9_]+$")]


class Limits(Schema):
    """What one request, dataset or stream may take at most."""

    upload_bytes: int
    body_bytes: int
    rows: int
    line_bytes: int
    decompressed_bytes: int
    pairs_at_least: int
    prompts_at_least: int
    wait_seconds: float
    streams_per_key: int


class Capabilities(Schema):
    """What a client needs to know to offer choices."""

    object: Literal["capabilities"] = "capabilities"
    mode: Mode
    kernels: list[KernelName]
    divergences: list[DivergenceName]
    methods: tuple[Literal["dpo", "kernel_dpo", "auto"], ...] = ("dpo", "kernel_dpo", "auto")
    layouts: list[LayoutName]
    models: list[str]
    hub: bool
    hub_patterns: list[str]
    limits: Limits


@router.get(
    "/capabilities",
    operation_id="get_capabilities",
    response_model=Capabilities,
    responses=CONDITIONAL_RESPONSES,
)
def get_capabilities(request: Request, _caller: AnyCaller, settings: Config) -> Response:
    """Return what this server can do: `models` are those in its folders, `hub` others by id."""
    return conditional(
        request,
        Capabilities(
            mode=settings.mode,
            kernels=list(KernelName),
            divergences=list(DivergenceName),
            layouts=list(LayoutName),
            models=_local_models(settings),
            hub=settings.models.hub_enabled,
            hub_patterns=list(settings.models.hub_allow),
            limits=Limits(
                upload_bytes=settings.api.max_upload_bytes,
                body_bytes=settings.api.max_body_bytes,
                rows=settings.data.max_rows,
                line_bytes=settings.data.max_line_bytes,
                decompressed_bytes=settings.data.max_decompressed_bytes,
                pairs_at_least=settings.data.min_pairs,
                prompts_at_least=settings.data.min_prompts,
                wait_seconds=settings.api.wait_max_s,
                streams_per_key=settings.api.max_streams,
            ),
        ),
    )


@router.get(
    "/kernels",
    operation_id="list_kernels",
    response_model=ListOf[KernelEntry],
    responses=CONDITIONAL_RESPONSES,
)
def list_kernels(request: Request, _caller: AnyCaller) -> Response:
    """List the kernels with formulas, parameters, ranges, defaults and constraints."""
    found = kernels()
    return conditional(request, list_of(found, [one.name for one in found], has_more=False))


@router.get(
    "/kernels/{name}",
    operation_id="get_kernel",
    response_model=KernelEntry,
    responses=CONDITIONAL_RESPONSES,
)
def get_kernel(request: Request, _caller: AnyCaller, name: Name) -> Response:
    """Return one kernel."""
    for entry in kernels():
        if entry.name == name:
            return conditional(request, entry)
    raise _unknown("kernel", name, list(KernelName))


@router.get(
    "/divergences",
    operation_id="list_divergences",
    response_model=ListOf[DivergenceEntry],
    responses=CONDITIONAL_RESPONSES,
)
def list_divergences(request: Request, _caller: AnyCaller) -> Response:
    """List the divergences with formulas, parameters, ranges, modes and measured costs."""
    found = divergences()
    return conditional(request, list_of(found, [one.name for one in found], has_more=False))


@router.get(
    "/divergences/{name}",
    operation_id="get_divergence",
    response_model=DivergenceEntry,
    responses=CONDITIONAL_RESPONSES,
)
def get_divergence(request: Request, _caller: AnyCaller, name: Name) -> Response:
    """Return one divergence."""
    for entry in divergences():
        if entry.name == name:
            return conditional(request, entry)
    raise _unknown("divergence", name, list(DivergenceName))


def _unknown(kind: str, name: str, known: Sequence[str]) -> NotFound:
    return NotFound(f"no {kind} {name!r}", hint=f"there are: {', '.join(known)}")


def _local_models(settings: Settings) -> list[str]:
    """Return the names of the folders that hold a model."""
    found = {
        folder.name
        for parent in settings.model_dirs
        if parent.is_dir()
        for folder in parent.iterdir()
        if (folder / "config.json").is_file()
    }
    return sorted(found)
