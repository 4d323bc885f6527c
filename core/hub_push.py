"""Pushes the files of a checkpoint to a model repository of the hub, in one commit."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, Self

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils.tqdm import disable_progress_bars
from pydantic import Field, model_validator

from core.errors import InvalidInput, KdpoError, NotPermitted, Unavailable
from core.hub import NETWORK_ERRORS, hub_is_on
from core.settings import Settings
from core.sources import HubRepo, SecretName, named_secret
from core.spec import SpecModel

# Answers that another attempt may not get: too slow, another commit at the same time, too often.
_PASSING = frozenset({408, 409, 412, 423, 425, 429})


class PushTarget(SpecModel):
    """A repository of the hub, and the named token that may write it."""

    repo_id: HubRepo
    token_secret: SecretName
    private: bool = Field(default=True, description="of a repository that is made")


class ExportOptions(SpecModel):
    """What an export makes of a checkpoint, and where it goes."""

    merge: bool = Field(
        default=True,
        description="merge the adapter into the base model's weights, as a checkpoint of its own; "
        "false: push the checkpoint as it is",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="precision of the merged weights; null: that of the base"
    )
    push_to_hub: PushTarget | None = Field(
        default=None, description="push what is made, or the checkpoint, to the hub"
    )

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if not self.merge and self.push_to_hub is None:
            raise ValueError("merge is false and push_to_hub is missing: nothing is to be done")
        if not self.merge and self.dtype is not None:
            raise ValueError("dtype is of merged weights, and merge is false: leave one out")
        return self


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
    return named_secret(target.token_secret, settings, param="push_to_hub.token_secret")


def push(folder: Path, target: PushTarget, settings: Settings, *, message: str) -> Pushed:
    """Commit all files of a folder; a repository that is not there is made.

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
    except (ValueError, RuntimeError, *NETWORK_ERRORS) as error:
        raise _failed(target, error) from error
    return Pushed(target.repo_id, made.oid, made.commit_url)


def _failed(target: PushTarget, error: Exception) -> KdpoError:
    why, hint = None, "name a token that may write there, and a name that the hub takes"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if 400 <= status < 500 and status not in _PASSING:
            why = f"answered {status}"
    elif isinstance(error, HFValidationError):
        why = "has no such names"
    elif isinstance(error, ValueError) and "metadata" in str(error):
        why, hint = "does not take the front matter of README.md", "push what is merged"
    if why is None:
        return Unavailable(
            f"the push to {target.repo_id} broke off: {type(error).__name__}",
            hint="the next attempt pushes again",
        )
    return InvalidInput(
        f"the hub refuses the push to {target.repo_id}: it {why}",
        code="push_refused", param="push_to_hub", hint=hint,
    )  # fmt: skip
