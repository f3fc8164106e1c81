"""Which IP addresses are public, and which are never asked for anything."""

from __future__ import annotations

import ipaddress

# Services of clouds that hand out credentials; no picture lives there.
_METADATA = frozenset(
    map(
        ipaddress.ip_address,
        ["169.254.169.254", "169.254.170.2", "100.100.100.200", "fd00:ec2::254"],
    )
)
# `ip_address.is_global` misses several of these in the Python versions supported.
_PRIVATE = [
    ipaddress.ip_network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
        *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16"),
        *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        *("::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32", "2002::/16"),
        *("fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8"),
    )
]
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_ISATAP = frozenset({0x00005EFE, 0x02005EFE})

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_public(ip: IPAddress) -> bool:
    """Whether `ip` is a public address; IPv4 inside IPv6 is judged by the IPv4 part."""
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.scope_id:
            return False
        low = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if ip.ipv4_mapped or ip in _NAT64:
            return is_public(low)
        if (int(ip) >> 32) & 0xFFFFFFFF in _ISATAP and not is_public(low):
            return False
    return not any(ip in network for network in _PRIVATE if network.version == ip.version)


def is_metadata(ip: IPAddress) -> bool:
    """Whether `ip` is that of a service which hands out credentials inside a cloud."""
    if isinstance(ip, ipaddress.IPv6Address) and (ip.ipv4_mapped or ip in _NAT64):
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip in _METADATA
