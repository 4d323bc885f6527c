"""What a request may name as a source, as far as nobody needs to be asked."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from core.errors import InvalidInput, NotPermitted
from core.settings import Settings
from core.sources import DatasetSource, HttpsSource, check_source, locate, shown, token_of

ADAPTER: TypeAdapter[DatasetSource] = TypeAdapter(DatasetSource)
HUB = {"type": "huggingface", "repo_id": "acme/prefs"}


def settings_of(**sources: Any) -> Settings:
    return Settings(data_dir=Path("unused"), sources=sources)


@pytest.mark.parametrize(
    "source",
    [
        {},
        {"type": "ftp", "url": "ftp://a"},
        {"type": "huggingface"},
        {**HUB, "token": "hf_secret"},
        {**HUB, "repo_id": "prefs"},
        {**HUB, "repo_id": "../etc/passwd"},
        {**HUB, "repo_id": "acme/../x"},
        {**HUB, "revision": "-x"},
        {**HUB, "token_secret": "TEAM/../x"},
        {"type": "https", "url": "https://a.org/x", "sha256": "abc"},
        {"type": "https", "url": "https://a.org/x", "headers": {}},
        {"type": "path", "path": "a\0b"},
        {"type": "path", "path": ""},
    ],
)
def test_unknown_fields_and_forms_are_refused(source: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ADAPTER.validate_python(source)


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ({"type": "https", "url": "https://a.org/x"}, "KDPO_SOURCES__HTTPS_HOSTS"),
        ({"type": "path", "path": "/data/x"}, "KDPO_SOURCES__PATHS"),
    ],
)
def test_off_by_default(source: dict[str, Any], named: str) -> None:
    with pytest.raises(NotPermitted) as caught:
        check_source(ADAPTER.validate_python(source), settings_of())
    assert caught.value.code == "source_not_allowed"
    assert named in str(caught.value.hint)


def test_hub_follows_its_switch_and_its_list() -> None:
    source = ADAPTER.validate_python(HUB)
    check_source(source, settings_of())
    with pytest.raises(NotPermitted, match="administrator has not switched it on"):
        check_source(source, Settings(data_dir=Path("unused"), models={"hub_enabled": False}))
    with pytest.raises(NotPermitted, match="not among those"):
        check_source(source, settings_of(hub_allow="other/*,acme/else"))
    check_source(source, settings_of(hub_allow="other/*,acme/*"))


def test_secrets_are_named_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDPO_SOURCES__SECRETS__TEAM", "hf_abcdefgh")
    settings = Settings(data_dir=Path("unused"))
    source = ADAPTER.validate_python({**HUB, "token_secret": "team"})
    assert token_of(source, settings) == "hf_abcdefgh"  # type: ignore[arg-type]
    assert "hf_abcdefgh" not in repr(settings)
    assert "hf_abcdefgh" not in settings.model_dump_json()
    with pytest.raises(InvalidInput) as caught:
        check_source(ADAPTER.validate_python({**HUB, "token_secret": "other"}), settings)
    assert caught.value.code == "unknown_secret"
    assert "team" not in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize(
    "url",
    [
        *("http://a.org/x", "ftp://a.org/x", "//a.org/x", "https:///x", "file:///etc/passwd"),
        *("https://user:pw@a.org/x", "https://a.org@evil.net/", "https://a.org/x#part"),
        *("https://a.org/a b", "https://a.org/\r\nHost: x", "https://a.org\\@evil.net/"),
        *("https://a.org:99999/", "https://a.org:x/", "https://bücher.org/", "https://[::1/"),
        *("https://a..net/", "https://.net/", f"https://{'a' * 64}.net/"),
    ],
)
def test_urls_that_cannot_be_used(url: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        locate(url, settings_of(https_hosts="a.org,*.net"))
    assert caught.value.code == "unusable_url"


@pytest.mark.parametrize(
    "url",
    ["https://evil.net/", "https://a.org.evil.net/", "https://a.org:8443/", "https://127.0.0.1/",
     "https://2130706433/", "https://0x7f.1/", "https://[::1]/", "https://a.org./"],
)  # fmt: skip
def test_hosts_that_are_not_listed(url: str) -> None:
    with pytest.raises(NotPermitted) as caught:
        locate(url, settings_of(https_hosts="a.org"))
    assert caught.value.code == "source_not_allowed"


def test_a_listed_address_is_taken_apart() -> None:
    found = locate("https://A.org/data/x.jsonl?sig=1%2F2", settings_of(https_hosts="a.org"))
    assert (found.host, found.port, found.target) == ("a.org", 443, "/data/x.jsonl?sig=1%2F2")


def test_the_query_of_a_url_is_not_shown() -> None:
    source = HttpsSource(type="https", url="https://a.org/x.jsonl?sig=SECRET")
    assert shown(source).model_dump()["url"] == "https://a.org/x.jsonl?…"


@pytest.mark.parametrize("sources", [{"https_hosts": "http://a.org"}, {"paths": "data:/srv"}])
def test_settings_that_would_allow_nothing_or_too_much_are_refused(sources: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="expected"):
        settings_of(**sources)
