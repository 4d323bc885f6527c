"""Where a webhook may point to: an address on a host that the server's administrator has listed."""

from dataclasses import dataclass

from core.errors import InvalidInput, NotPermitted
from core.hosts import HostRule, parse_host_rule, rule_for
from core.settings import WebhookSettings
from core.urls import PlainUrl, parse_url


@dataclass(frozen=True)
class WebhookTarget:
    """An address that may be asked, and what its host's entry allows."""

    url: PlainUrl
    rule: HostRule


def webhook_target(url: str, settings: WebhookSettings) -> WebhookTarget:
    """Return the parts of an address whose host is listed.

    Raises:
        NotPermitted: code `webhook_host_not_allowed`: nothing is listed, or not this host and port.
        InvalidInput: code `unusable_url`: no https, a name or password in it, or no plain URL.
    """
    try:
        parts = parse_url(url)
    except ValueError as error:
        raise _unusable(str(error)) from error
    if parts.scheme != "https" and not settings.allow_http:
        raise _unusable("it does not begin with https://; KDPO_WEBHOOKS__ALLOW_HTTP permits http")
    rules = [parse_host_rule(text) for text in settings.hosts]
    rule = rule_for(rules, parts.host, parts.port)
    if rule is None:
        raise NotPermitted(
            f"the host {parts.host[:200]!r} at port {parts.port} is not among those that this "
            "server may send webhooks to",
            code="webhook_host_not_allowed",
            param="url",
            hint="the administrator lists hosts in KDPO_WEBHOOKS__HOSTS",
        )
    return WebhookTarget(parts, rule)


def _unusable(why: str) -> InvalidInput:
    return InvalidInput(
        f"the URL cannot be used: {why}",
        code="unusable_url",
        param="url",
        hint="expected https://host/path",
    )
