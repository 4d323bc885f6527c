"""Pushes the files of a checkpoint to a model repository of the hub, in one commit."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils.tqdm import disable_progress_bars
from pydantic import Field

from core.errors import InvalidInput, KdpoError, NotPermitted, Unavailable
from core.hub import hub_is_on
from core.settings import Settings
from core.spec import SpecModel

_NETWORK_ERRORS = (httpx2.HTTPError, OfflineModeIsEnabled, OSError)
_MAX_ID = 96
# Answers that another attempt may not get: too slow, another commit at the same time, too often.
_PASSING = frozenset({408, 409, 412, 423, 425, 429})


class PushTarget(SpecModel):
    """A repository of the hub, and the named token that may write it."""

    repo_id: str = Field(
        max_length=_MAX_ID,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="owner/name; made if it is not there",
    )
    token_secret: str = Field(
        pattern=r"^[A-Za-z0-9_-]{1,64}$", description="name of a token in the server's settings"
    )
    private: bool = Field(default=True, description="of a repository that is made")


@dataclass(frozen=True)
class Pushed:
    """What the hub has made of it."""

    repo_id: str
    commit: str
    url: str


def push_token(target: PushTarget, settings: Settings) -> str:
    """Return the token for a push that the server's settings allow.

    Raises:
        NotPermitted: code `push_not_allowed`: `models.push_allow` does not have the repository.
        InvalidInput: code `unknown_secret`, or `hub_off`: this server does not ask the hub.
    """
    if not any(fnmatchcase(target.repo_id, pattern) for pattern in settings.models.push_allow):
        raise NotPermitted(
            f"this server may not push to {target.repo_id!r}",
            code="push_not_allowed",
            param="push_to_hub.repo_id",
            hint=f"allowed: {', '.join(settings.models.push_allow) or 'nothing'} "
            "(KDPO_MODELS__PUSH_ALLOW)",
        )
    if not hub_is_on(settings):
        raise InvalidInput(
            "this server does not ask the hub (KDPO_MODELS__HUB_ENABLED, HF_HUB_OFFLINE)",
            code="hub_off",
            param="push_to_hub",
        )
    secret = settings.sources.secrets.get(target.token_secret)
    if secret is None:
        raise InvalidInput(
            f"this server has no secret named {target.token_secret!r}",
            code="unknown_secret",
            param="push_to_hub.token_secret",
            hint="the administrator sets one: KDPO_SOURCES__SECRETS__<NAME>=<token>",
        )
    return secret.get_secret_value()


def push(folder: Path, target: PushTarget, settings: Settings, *, message: str) -> Pushed:
    """Commit all files of a folder; the same files again make no second commit of the hub's.

    Raises:
        NotPermitted, InvalidInput: as `push_token`; code `push_refused`: the hub says no.
        Unavailable: the hub does not answer.
    """
    api = HfApi(token=push_token(target, settings))
    disable_progress_bars()  # a bar is not a line of a log
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    try:
        api.create_repo(target.repo_id, private=target.private, exist_ok=True)
        made = api.create_commit(
            target.repo_id,
            [CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in files],
            commit_message=message,
        )
    except (HfHubHTTPError, HFValidationError, ValueError, RuntimeError, *_NETWORK_ERRORS) as error:
        raise _failed(target, error) from error
    return Pushed(target.repo_id, made.oid, made.commit_url)


def _failed(target: PushTarget, error: Exception) -> KdpoError:
    said = None
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if 400 <= status < 500 and status not in _PASSING:
            said = f"answered {status}"
    elif isinstance(error, HFValidationError):
        said = "has no such names"
    elif isinstance(error, ValueError) and "metadata" in str(error):
        said = "does not take the front matter of README.md"
    if said is not None:
        return InvalidInput(
            f"the hub refuses the push to {target.repo_id}: it {said}",
            code="push_refused",
            param="push_to_hub",
            hint="name a token that may write there, and a name that the hub takes",
        )
    return Unavailable(
        f"the push to {target.repo_id} broke off: {type(error).__name__}",
        hint="the next attempt sends what the hub does not have yet",
    )
