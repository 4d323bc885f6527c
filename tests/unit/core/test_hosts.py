"""The allow-list of hosts, and which addresses are refused whatever the list says."""

import pytest

from core.hosts import HostRule, parse_host_rule, rule_for, why_blocked

PUBLIC = HostRule("data.example.org", 443, ())


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "::1", "0.0.0.0", "::"),  # noqa: S104
        *("10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1"),
        *("169.254.169.254", "169.254.0.1", "fe80::1", "fe80::1%eth0", "100.100.100.200"),
        *("168.63.129.16", "192.0.0.192", "fd00:ec2::254", "fc00::1", "fd12:3456::1", "fec0::1"),
        *("224.0.0.1", "239.255.255.250", "ff02::1", "ff0e::1", "255.255.255.255", "240.0.0.1"),
        *("192.0.2.1", "198.51.100.1", "203.0.113.1", "198.18.0.1", "192.88.99.1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1"),
        *("64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::a00:1", "2002:7f00:1::", "2001::1"),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert why_blocked(address, PUBLIC) is not None


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "::ffff:8.8.8.8"],
)
def test_public_addresses(address: str) -> None:
    assert why_blocked(address, PUBLIC) is None


def test_a_network_permits_what_lies_in_it_and_nothing_else() -> None:
    rule = parse_host_rule("files.corp:8443=10.1.0.0/16|fd00::/8")
    assert (rule.host, rule.port) == ("files.corp", 8443)
    for address in ("10.1.2.3", "::ffff:10.1.2.3", "fd00::1"):
        assert why_blocked(address, rule) is None, address
    for address in ("10.2.0.1", "8.8.8.8", "127.0.0.1", "::1", "2606:4700::1111"):
        assert why_blocked(address, rule) is not None, address


@pytest.mark.parametrize(
    "address",
    [
        *("169.254.169.254", "::ffff:169.254.169.254", "224.0.0.1", "0.0.0.0", "fd00:ec2::254"),  # noqa: S104
        *("64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "::169.254.169.254"),
    ],
)
def test_no_network_permits_metadata_multicast_or_nothing(address: str) -> None:
    assert why_blocked(address, parse_host_rule("h=0.0.0.0/0|::/0")) is not None


def test_the_most_exact_entry_counts() -> None:
    rules = [parse_host_rule(t) for t in ("*.example.org", "a.example.org=10.0.0.0/8", "b.org:444")]
    assert rule_for(rules, "a.example.org", 443) is rules[1]
    assert rule_for(rules, "x.y.example.org", 443) is rules[0]
    assert rule_for(rules, "b.org", 444) is rules[2]
    for host, port in (
        ("example.org", 443),
        (".example.org", 443),
        ("evilexample.org", 443),
        ("a.example.org", 8443),
        ("b.org", 443),
        ("a.example.org.evil.net", 443),
        ("a.example.org.", 443),
    ):
        assert rule_for(rules, host, port) is None, host


@pytest.mark.parametrize(
    "text",
    ["", "*", "*.", "https://a.org", "a.org/path", "a.org:0", "a.org:99999", "a.org=", "a.org=x",
     "a.org=10.0.0.1/8", "a b", "a.*.org", "user@a.org", "a.org:", "-a.org"],
)  # fmt: skip
def test_entries_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected host, \*\.host"):
        parse_host_rule(text)
