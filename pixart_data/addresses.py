"""Which URLs and which network addresses a download may go to.

A list from the web names any host it likes, and a name may resolve to anything: to this machine, to a router, to a
cloud's metadata service. So the address itself is checked, at the moment a socket is made for it: what was checked is
what is connected to, however the name was spelt, resolved or redirected to.
"""

import ipaddress
import re
import socket
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

from pixart_data.records import Reason

MAX_URL_CHARS = 8000
_PLAIN = re.compile(r"[A-Za-z0-9\-._~:/?\[\]@!$&'()*+,;=%]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_REFUSED = [
    ipaddress.ip_network(text)
    for text in (
        "100.64.0.0/10",  # behind a provider's NAT; one cloud's metadata service (100.100.100.200)
        "168.63.129.16/32",  # the host agent of one cloud, though the address is a public one
        "192.0.0.0/24",  # protocols; one cloud's metadata service (192.0.0.192)
        "192.88.99.0/24",  # relays into 6to4
        "198.18.0.0/15",  # benchmarks
        "240.0.0.0/4",  # of no use yet, and broadcast
        "64:ff9b:1::/48",  # a network's own NAT64, to any IPv4 address
        "3fff::/20",  # documentation
        "5f00::/16",  # segments of a route
        "fec0::/10",  # sites
    )
]
"""What `is_global` lets through in some releases of Python, or in all."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Refused(Exception):
    """Why a URL is not asked for: a signal for the row's `error` and `detail`."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class PrivateAddress(OSError):
    """A socket to an address that is not public was about to be made."""


def parse_url(text: Any) -> URL:
    """Return the URL that a list or a server gives, without its fragment, as it goes on the wire.

    What is legal ASCII is kept to the letter, since signed URLs do not survive being spelt another way; the rest is
    percent-encoded, host names are IDNA-encoded.

    Raises:
        Refused: If it is none, is neither http nor https, or carries a user name.
    """
    if not isinstance(text, str) or not text.strip():
        raise Refused(Reason.BAD_URL, f"expected a URL, found {text!r:.80}")
    text = text.strip().split("#")[0]
    if len(text) > MAX_URL_CHARS:
        raise Refused(Reason.BAD_URL, f"{len(text)} characters, more than {MAX_URL_CHARS}: {text[:60]!a}...")
    if _CONTROL.search(text):
        raise Refused(Reason.BAD_URL, f"control characters in {text[:80]!a}")
    scheme = text.partition(":")[0].lower() if ":" in text else ""
    if scheme not in ("http", "https"):
        raise Refused(Reason.BAD_URL, f"expected http:// or https://, found {text[:80]!a}")
    try:
        url = URL(text)
        if _PLAIN.fullmatch(text):
            url = URL(text, encoded=True)
        host, port = url.host, url.port
        (url.raw_host or "").encode("idna")
    except ValueError as error:  # UnicodeError is one: a host that IDNA cannot spell
        raise Refused(Reason.BAD_URL, f"{text[:80]!a}: {error}") from error
    if not host or not port:
        raise Refused(Reason.BAD_URL, f"expected a host and a port from 1 to 65535, found {text[:80]!a}")
    if url.user is not None or url.password is not None:
        raise Refused(Reason.BAD_URL, f"a user name or password in the URL of {host}")
    return url


def is_public(address: Address) -> bool:
    """Tell an address of the internet from one of this machine, the local network, or no single machine."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in _NAT64:  # how a network without IPv4 reaches IPv4 hosts
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address.sixtofour is not None or address.teredo is not None:
            return False  # tunnels, given up long ago, to any IPv4 address
    if any(address in network for network in _REFUSED):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def guarded_socket(info: Any) -> socket.socket:
    """Make a socket for an address that `getaddrinfo` gave, if it is public: aiohttp's `socket_factory`.

    Raises:
        PrivateAddress: If it is not.
    """
    family, kind, protocol, _, place = info
    _require_public(place[0])
    return socket.socket(family=family, type=kind, proto=protocol)


class PublicResolver(AbstractResolver):
    """Resolves names to their public addresses, so that one private address beside public ones does no harm."""

    def __init__(self) -> None:
        self._system = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return the public addresses of a host.

        Raises:
            PrivateAddress: If it has others only.
            OSError: If it has none.
        """
        found = await self._system.resolve(host, port, family)
        public = [result for result in found if _is_public_text(result["host"])]
        if found and not public:
            _require_public(found[0]["host"])
        return public

    async def close(self) -> None:
        """Nothing is held."""


def _is_public_text(text: str) -> bool:
    return is_public(ipaddress.ip_address(text.partition("%")[0]))


def _require_public(text: str) -> None:
    if not _is_public_text(text):
        raise PrivateAddress(f"{text} is not a public address")
