"""Which hosts and addresses the server may fetch from: an allow-list, and no way round it."""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

HTTPS_PORT = 443

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_HOST = re.compile(r"(?:\*\.)?(?:[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?)(?:\.[a-z0-9_-]+)*", re.ASCII)
_FORM = "host, *.host, host:port, or host=10.0.0.0/8 (several networks: host=a|b)"

# Where clouds answer a machine's questions about itself, with its credentials.
_METADATA = frozenset(
    ipaddress.ip_address(text)
    for text in (
        *("169.254.169.254", "169.254.170.2", "169.254.170.23", "100.100.100.200"),
        *("168.63.129.16", "192.0.0.192", "fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254"),
    )
)
# Networks whose addresses stand for IPv4 ones, which a gateway would connect to; and its relay.
_TRANSLATED = tuple(
    ipaddress.ip_network(text)
    for text in (
        "64:ff9b::/96",
        "64:ff9b:1::/48",
        "2002::/16",
        "2001::/32",
        "::/96",
        "192.88.99.0/24",
    )
)
_ENDING_IN_IPV4 = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "::/96")))


@dataclass(frozen=True)
class HostRule:
    """One entry of the allow-list.

    With `networks` all addresses of the host must lie in them, and may be private; without, all
    must be public.
    """

    host: str
    port: int
    networks: tuple[Network, ...]

    def matches(self, host: str, port: int) -> bool:
        """Whether the entry is about that host (in lower case) and port."""
        if port != self.port:
            return False
        if self.host.startswith("*."):
            return host.endswith(self.host[1:]) and len(host) > len(self.host) - 1
        return host == self.host


def parse_host_rule(text: str) -> HostRule:
    """Return the entry that a setting names: `host`, `*.host`, `:port` and `=networks` optional.

    Raises:
        ValueError: the text has another form.
    """
    name, given, networks = text.strip().lower().partition("=")
    host, colon, port = name.partition(":")
    if not _HOST.fullmatch(host) or (colon and not (port.isdecimal() and 0 < int(port) < 65536)):
        raise ValueError(f"received the host {text!r}, expected {_FORM}")
    try:
        allowed = tuple(map(ipaddress.ip_network, networks.split("|"))) if given else ()
    except ValueError as error:
        raise ValueError(f"received the host {text!r}: {error}; expected {_FORM}") from error
    return HostRule(host, int(port) if colon else HTTPS_PORT, allowed)


def rule_for(rules: Sequence[HostRule], host: str, port: int) -> HostRule | None:
    """Return the first entry about a host and port; exact names go before `*.` ones."""
    found = [rule for rule in rules if rule.matches(host, port)]
    return min(found, key=lambda rule: rule.host.startswith("*."), default=None)


def why_blocked(text: str, rule: HostRule) -> str | None:
    """Return why the server may not connect to an address, None when it may.

    An IPv4 address in IPv6 form is judged as what it is. Multicast, unspecified and metadata
    addresses are refused even where a network of the rule has them.
    """
    address: Address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address in _METADATA or _behind_gateway(address) in _METADATA:
        return "is a metadata address"
    if address.is_multicast:
        return "is a multicast address"
    if address.is_unspecified:
        return "is the unspecified address"
    if rule.networks:
        inside = any(address.version == n.version and address in n for n in rule.networks)
        return None if inside else "lies outside the networks that the host's entry names"
    return _why_not_public(address)


def _behind_gateway(address: Address) -> Address | None:
    """Return the IPv4 address that a gateway would connect to: the usual NAT64, 6to4, compatible.

    None where the address has another form.
    """
    if address.version == 4:
        return None
    if address.sixtofour is not None:
        return address.sixtofour
    if any(address in network for network in _ENDING_IN_IPV4):
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return None


def _why_not_public(address: Address) -> str | None:
    if address.is_loopback:
        return "is a loopback address"
    if address.is_link_local:
        return "is a link-local address"
    if any(address in network for network in _TRANSLATED):
        return "belongs to a gateway between IPv4 and IPv6"
    if isinstance(address, ipaddress.IPv6Address) and address.is_site_local:
        return "is a site-local address"
    if address.is_private or address.is_reserved or not address.is_global:
        return "is not a public address"
    return None
