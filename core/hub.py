"""The model hub: pins a commit before a job is made, brings its files when the job runs."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils.tqdm import disable_progress_bars

from core.errors import InvalidInput, KdpoError, NotPermitted, Unavailable
from core.modelref import (
    CONVERT_HINT,
    PICKLES,
    ModelRef,
    check_model_dir,
    is_hub_id,
    not_found,
    resolve_local,
)
from core.settings import Settings

# Weights as safetensors, and what a tokenizer needs; never code, never pickles.
ALLOW_PATTERNS = (
    "*.safetensors",  # first: `fetch_tokenizer` leaves it out
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "merges.txt",
    "*.tiktoken",
)
IGNORE_PATTERNS = ("*/*",)

# What huggingface_hub raises when the network, a proxy or the server fails.
NETWORK_ERRORS = (httpx2.HTTPError, OfflineModeIsEnabled, OSError)


def resolve(name: str, settings: Settings) -> ModelRef:
    """Return the model of that name: a folder on this machine, else a hub repository.

    Raises:
        InvalidInput: there is no such model, or it cannot be used; the code says why.
        NotPermitted: the hub id is not among `settings.models.hub_allow`.
    """
    return resolve_local(name, settings) or preflight(name, settings)


def preflight(repo_id: str, settings: Settings) -> ModelRef:
    """Pin the newest commit of a hub repository, or the cached one when the hub is off.

    Raises:
        InvalidInput: code `model_not_found`, `model_gated`, `model_not_safetensors` or
            `model_unreachable`.
        NotPermitted: the id is not among `settings.models.hub_allow`.
    """
    if not is_hub_id(repo_id):
        raise not_found(repo_id, settings)
    if not any(fnmatchcase(repo_id, pattern) for pattern in settings.models.hub_allow):
        raise NotPermitted(
            f"model {repo_id!r} is not among the models that this server may take from the hub",
            code="model_not_allowed",
            param="model",
            hint=f"allowed: {', '.join(settings.models.hub_allow)} (KDPO_MODELS__HUB_ALLOW)",
        )
    if not hub_is_on(settings):
        return _cached(repo_id, settings, cause=None)
    api = HfApi(token=_token(settings))
    try:
        info = api.model_info(repo_id, timeout=settings.models.hub_timeout_s)
        if info.gated:
            api.auth_check(repo_id)
    except (GatedRepoError, RepositoryNotFoundError, HFValidationError) as error:
        raise _refused(repo_id, error, settings) from error
    except NETWORK_ERRORS as error:
        return _cached(repo_id, settings, cause=error)
    _check_listing(repo_id, [sibling.rfilename for sibling in info.siblings or ()])
    return ModelRef(name=repo_id, source="hub", repo_id=repo_id, revision=info.sha)


def fetch(ref: ModelRef, settings: Settings) -> Path:
    """Return a folder with the model's files, downloaded if need be, and checked.

    Raises:
        InvalidInput: the files are not there or are not usable (see `check_model_dir`).
        Unavailable: the hub does not answer and the files are not in the cache.
    """
    if ref.source == "local":
        if ref.path is None or not ref.path.is_dir():
            raise InvalidInput(
                f"the folder {ref.path} of model {ref.name!r} is gone",
                code="model_not_found",
                param="model",
                hint="put it back, or make the job again with another model",
            )
        folder = ref.path
    else:
        folder = _download(ref, settings)
    check_model_dir(folder)
    return folder


def fetch_tokenizer(ref: ModelRef, settings: Settings) -> Path:
    """Return a folder with the model's tokenizer and configuration; weights are not downloaded.

    Raises:
        InvalidInput, Unavailable: as `fetch`.
    """
    if ref.source == "local":
        return fetch(ref, settings)
    return _download(ref, settings, patterns=ALLOW_PATTERNS[1:])


def hub_is_on(settings: Settings) -> bool:
    """Whether the hub may be asked: `KDPO_MODELS__HUB_ENABLED`, and not `HF_HUB_OFFLINE`."""
    return settings.models.hub_enabled and not is_offline_mode()


def _download(
    ref: ModelRef, settings: Settings, *, patterns: Sequence[str] = ALLOW_PATTERNS
) -> Path:
    if ref.repo_id is None or ref.revision is None:
        raise InvalidInput(
            f"model {ref.name!r} has no pinned commit", code="model_not_found", param="model"
        )
    disable_progress_bars()  # a bar is not a line of a log
    try:
        return Path(
            snapshot_download(
                ref.repo_id,
                revision=ref.revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(IGNORE_PATTERNS),
                token=_token(settings),
                local_files_only=not hub_is_on(settings),
                etag_timeout=settings.models.hub_timeout_s,
            )
        )
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _refused(ref.repo_id, error, settings) from error
    except LocalEntryNotFoundError as error:
        raise _unreachable(ref.repo_id, settings, cause=error) from error
    except NETWORK_ERRORS as error:
        raise Unavailable(
            f"the download of {ref.repo_id} broke off: {type(error).__name__}",
            code="model_unreachable",
            hint="what has arrived is kept; the next attempt goes on from there",
        ) from error


def _cached(repo_id: str, settings: Settings, *, cause: Exception | None) -> ModelRef:
    """Return the commit of the snapshot in the local cache: that of `main`, else the newest."""
    problem: Exception | None = cause
    for revision in (None, *_cached_commits(repo_id)):
        try:
            folder = Path(
                snapshot_download(
                    repo_id,
                    revision=revision,
                    allow_patterns=list(ALLOW_PATTERNS),
                    ignore_patterns=list(IGNORE_PATTERNS),
                    local_files_only=True,
                )
            )
        except HFValidationError as error:
            raise _refused(repo_id, error, settings) from error
        except LocalEntryNotFoundError as error:
            problem = problem or error
            continue
        check_model_dir(folder)
        return ModelRef(name=repo_id, source="hub", repo_id=repo_id, revision=folder.name)
    raise _unreachable(repo_id, settings, cause=cause) from problem


def _cached_commits(repo_id: str) -> list[str]:
    """Return the commits in the cache, newest first: a download by commit leaves no `main`."""
    repository = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")
    snapshots = repository / "snapshots"
    if not snapshots.is_dir():
        return []
    folders = sorted(snapshots.iterdir(), key=lambda f: f.stat().st_mtime, reverse=True)
    return [folder.name for folder in folders]


def _unreachable(repo_id: str, settings: Settings, *, cause: Exception | None) -> InvalidInput:
    if not settings.models.hub_enabled:
        why = "it is switched off here (KDPO_MODELS__HUB_ENABLED)"
    elif is_offline_mode():
        why = "HF_HUB_OFFLINE is set"
    elif isinstance(cause, HfHubHTTPError):
        why = f"it answered {cause.response.status_code}"
    else:
        why = "the connection failed" if cause is None else type(cause).__name__
    return InvalidInput(
        f"kdpo could not reach the hub for model {repo_id!r} ({why}), and the model is not in "
        "the local cache",
        code="model_unreachable",
        param="model",
        hint="give a local path or the name of a folder in "
        + ", ".join(str(root) for root in settings.model_dirs),
        retryable=cause is not None,
    )


def _refused(repo_id: str, error: Exception, settings: Settings) -> KdpoError:
    if isinstance(error, GatedRepoError):
        return InvalidInput(
            f"model {repo_id!r} is gated and this server's token may not read it",
            code="model_gated",
            param="model",
            hint="accept the terms on the model's page and set KDPO_MODELS__HUB_TOKEN",
        )
    return not_found(repo_id, settings)


def _check_listing(repo_id: str, files: Sequence[str]) -> None:
    if any("/" not in name and name.endswith(".safetensors") for name in files):
        return
    pickles = [name for name in files if name.endswith(PICKLES)]
    found = f"only {', '.join(pickles[:3])}" if pickles else "no weights at all"
    raise InvalidInput(
        f"model {repo_id!r} has {found}, expected *.safetensors",
        code="model_not_safetensors",
        param="model",
        hint=CONVERT_HINT,
    )


def _token(settings: Settings) -> str | None:
    token = settings.models.hub_token
    return None if token is None else token.get_secret_value()
