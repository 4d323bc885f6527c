"""Where a dataset may come from besides an upload: what a request says, and what is allowed."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Literal, assert_never

from huggingface_hub import is_offline_mode
from pydantic import Field

from core.errors import InvalidInput, NotPermitted
from core.hosts import HostRule, parse_host_rule, rule_for
from core.settings import Settings
from core.spec import SpecModel
from core.urls import parse_url

Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f]+$")]

HubRepo = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}$",
        description="organisation/name",
    ),
]
SecretName = Annotated[
    str,
    Field(
        pattern=r"^[a-z0-9_]{1,64}$",
        description="name of a secret in the server's settings; never the token",
    ),
]


class HuggingFaceSource(SpecModel):
    """Data files of a dataset repository on the hub; its code is never run."""

    type: Literal["huggingface"]
    repo_id: HubRepo
    config: Name | None = Field(default=None, description="needed where there are several")
    split: Name | None = Field(default=None, description="needed where there are several")
    revision: str | None = Field(
        default=None,
        max_length=200,
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_./-]*$",
        description="branch, tag or commit; the commit it names now is what is read",
    )
    token_secret: SecretName | None = None


class HttpsSource(SpecModel):
    """One file at an https address on a host that the server's administrator has listed."""

    type: Literal["https"]
    url: str = Field(min_length=9, max_length=4096)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")


class PathSource(SpecModel):
    """One file on the server, below a folder that the administrator has listed."""

    type: Literal["path"]
    path: str = Field(
        min_length=1,
        max_length=4096,
        pattern=r"^[^\x00]+$",
        description="absolute, or relative to one of the listed folders",
    )


DatasetSource = Annotated[HuggingFaceSource | HttpsSource | PathSource, Field(discriminator="type")]


@dataclass(frozen=True)
class Location:
    """An https address that may be asked: `target` is path and query."""

    host: str
    port: int
    target: str
    rule: HostRule


def check_source(source: DatasetSource, settings: Settings) -> None:
    """Check what can be told without asking anybody: whether the server may fetch it at all.

    Raises:
        NotPermitted: code `source_not_allowed`.
        InvalidInput: codes `unusable_url`, `unknown_secret`.
    """
    match source:
        case HuggingFaceSource():
            _check_hub(source, settings)
        case HttpsSource():
            locate(source.url, settings)
        case PathSource():
            if not settings.sources.paths:
                raise _off(
                    "paths on the server", "KDPO_SOURCES__PATHS lists folders; or upload the file"
                )
        case _:
            assert_never(source)


def _check_hub(source: HuggingFaceSource, settings: Settings) -> None:
    if not settings.models.hub_enabled or is_offline_mode():
        which = "HF_HUB_OFFLINE" if settings.models.hub_enabled else "KDPO_MODELS__HUB_ENABLED"
        raise _off("the hub", f"{which} switches it; or download the files and upload them")
    allowed = settings.sources.hub_allow
    if ".." in source.repo_id or not any(fnmatchcase(source.repo_id, p) for p in allowed):
        raise NotPermitted(
            f"dataset {source.repo_id!r} is not among those that this server may take from the hub",
            code="source_not_allowed",
            param="source.repo_id",
            hint=f"allowed: {', '.join(allowed)} (KDPO_SOURCES__HUB_ALLOW)",
        )
    token_of(source, settings)


def token_of(source: HuggingFaceSource, settings: Settings) -> str | None:
    """Return the token that the source's secret names, None when it names none.

    Raises:
        InvalidInput: code `unknown_secret`.
    """
    if source.token_secret is None:
        return None
    return named_secret(source.token_secret, settings, param="source.token_secret")


def named_secret(name: str, settings: Settings, *, param: str) -> str:
    """Return the hub token that the server's settings have under a name.

    Raises:
        InvalidInput: code `unknown_secret`.
    """
    secret = settings.sources.secrets.get(name)
    if secret is None:
        raise InvalidInput(
            f"this server has no secret named {name!r}",
            code="unknown_secret",
            param=param,
            hint="the administrator sets one: KDPO_SOURCES__SECRETS__<NAME>=<token>",
        )
    return secret.get_secret_value()


def locate(url: str, settings: Settings) -> Location:
    """Return the parts of an https address whose host is listed.

    Raises:
        NotPermitted: code `source_not_allowed`: nothing is listed, or not this host and port.
        InvalidInput: code `unusable_url`: no https, a name or password in it, or no plain URL.
    """
    if not settings.sources.https_hosts:
        raise _off("https addresses", "KDPO_SOURCES__HTTPS_HOSTS lists hosts; or upload the file")
    try:
        parts = parse_url(url)
    except ValueError as error:
        raise _unusable(str(error)) from error
    if parts.scheme != "https":
        raise _unusable("it does not begin with https:// and a host")
    host, port = parts.host, parts.port
    rules = [parse_host_rule(text) for text in settings.sources.https_hosts]
    rule = rule_for(rules, host, port)
    if rule is None:
        raise NotPermitted(
            f"the host {host[:200]!r} at port {port} is not among those that this server may ask",
            code="source_not_allowed",
            param="source.url",
            hint="the administrator lists hosts in KDPO_SOURCES__HTTPS_HOSTS; or upload the file",
        )
    return Location(host, port, parts.target, rule)


def shown(source: DatasetSource) -> DatasetSource:
    """Return the source as it may be shown: the query of a URL can be a signature."""
    if isinstance(source, HttpsSource) and "?" in source.url:
        return source.model_copy(update={"url": source.url.partition("?")[0] + "?…"})
    return source


def _off(what: str, hint: str) -> NotPermitted:
    return NotPermitted(
        f"this server takes no datasets from {what}: its administrator has not switched it on",
        code="source_not_allowed",
        param="source",
        hint=hint,
    )


def _unusable(why: str) -> InvalidInput:
    return InvalidInput(
        f"the URL cannot be used: {why}",
        code="unusable_url",
        param="source.url",
        hint="expected https://host/path, as a browser would copy it",
    )
