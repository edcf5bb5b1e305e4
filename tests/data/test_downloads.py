"""Every way in which a server, a URL or an image can be wrong has a verdict, and nothing hangs."""

import asyncio
import gzip
import ipaddress
import random
import socket
import ssl
import time
import tracemalloc
import zlib
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from PIL import Image
from pydantic import ValidationError

from pixart_data import addresses
from pixart_data.addresses import Refused, guarded_socket, parse_url
from pixart_data.downloads import Downloader
from pixart_data.records import Reason
from pixart_data.robots import opted_out
from pixart_data.sections import Downloads
from tests.web import (
    Web,
    after,
    bomb_png,
    endless,
    gzip_bomb,
    http,
    in_turn,
    name_server,
    picture,
    reset,
    stall,
    trickle,
)

LIMIT_S = 15
QUICK = {
    "connect_timeout_s": 2.0,
    "read_timeout_s": 1.0,
    "total_timeout_s": 2.0,
    "max_attempts": 2,
    "backoff_s": 0.01,
    "max_wait_s": 1.0,
    "max_bytes": 200_000,
    "max_redirects": 3,
    "allow_private_addresses": True,
}
GOOD = picture()


@pytest.fixture(scope="module")
def web():
    with Web() as web:
        yield web


@pytest.fixture(autouse=True)
def _fresh(request):
    """Let a test see its own requests only."""
    if "web" in request.fixturenames:
        web = request.getfixturevalue("web")
        for record in (web.pages, web.robots, web.asked, web.connections, web.agents):
            record.clear()


def fetch_all(urls, **settings):
    found = []
    started_s = time.monotonic()
    Downloader(Downloads(**{**QUICK, **settings})).fetch(urls, found.append)
    assert time.monotonic() - started_s < LIMIT_S
    assert sorted(map(repr, urls)) == sorted(repr(download.url) for download in found)
    for download in found:
        assert (download.error is None) == (download.facts is not None) == bool(download.data)
        assert bool(download.detail) == (download.error is not None)
    return {download.url: download for download in found}


def fetch(url, **settings):
    return fetch_all([url], **settings)[url]


def test_a_good_image_comes_as_it_was_sent(web):
    web.pages["a.jpg"] = http(200, GOOD, "Content-Type: image/jpeg", "Set-Cookie: a=b")
    found = fetch(web.url("a.jpg"), contact="https://example.org/bot")
    assert found.error is None
    assert found.data == GOOD
    assert (found.facts.extension, found.facts.width_px, found.facts.height_px) == ("jpg", 64, 48)
    assert (found.http_status, found.num_attempts) == (200, 1)
    assert all(line.startswith("User-Agent: pixart-toolkit/") for line in web.agents)
    assert all(line.endswith("(+https://example.org/bot)") for line in web.agents)


@pytest.mark.parametrize(
    ("form", "extension"),
    [("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif"), ("BMP", "bmp"), ("TIFF", "tif"), ("AVIF", "avif")],
)
@pytest.mark.parametrize("check", ["full", "header"])
def test_the_kind_is_told_from_the_bytes(web, form, extension, check):
    web.pages["a.jpg"] = http(200, picture(form=form), "Content-Type: text/html")
    found = fetch(web.url("a.jpg"), check=check)
    assert (found.error, found.facts.extension, found.facts.width_px) == (None, extension, 64)


@pytest.mark.parametrize("check", ["full", "header"])
def test_sizes_are_those_after_the_rotation(web, check):
    exif = Image.Exif()
    exif[0x0112] = 6
    web.pages["a"] = http(200, picture(exif=exif))
    found = fetch(web.url("a"), check=check)
    assert (found.facts.width_px, found.facts.height_px) == (48, 64)


# Answers: path, page, verdict, requests expected

CHUNKED = "Transfer-Encoding: chunked"
JPEG = "Content-Type: image/jpeg"
SENT_AGAIN = 2  # aiohttp itself repeats a GET once whose connection was lost before any answer (RFC 9112, 9.3.1)
ANSWERS = {
    "gone": (http(404), Reason.NOT_FOUND, 1),
    "gone-for-good": (http(410), Reason.NOT_FOUND, 1),
    "forbidden": (http(403), Reason.ACCESS_DENIED, 1),
    "login": (http(401, b"", "WWW-Authenticate: Basic"), Reason.ACCESS_DENIED, 1),
    "teapot": (http(418), Reason.ACCESS_DENIED, 1),
    "too-many": (http(429), Reason.RATE_LIMITED, 2),
    "come-back-tomorrow": (http(429, b"", "Retry-After: 86400"), Reason.RATE_LIMITED, 1),
    "retry-after-nonsense": (http(429, b"", "Retry-After: soon"), Reason.RATE_LIMITED, 2),
    "request-timeout": (http(408), Reason.TIMED_OUT, 2),
    "broken": (http(500), Reason.SERVER_ERROR, 2),
    "down": (http(503), Reason.SERVER_ERROR, 2),
    "no-content": (http(204, length=False), Reason.BAD_RESPONSE, 1),
    "partial": (http(206, GOOD), Reason.BAD_RESPONSE, 1),
    "not-modified": (http(304, length=False), Reason.BAD_RESPONSE, 1),
    "status-999": (http(999), Reason.BAD_RESPONSE, 1),
    "empty": (http(200, b"", JPEG), Reason.ZERO_BYTES, 1),
    "html": (http(200, b"<!doctype html><h1>Sorry</h1>", JPEG), Reason.NOT_AN_IMAGE, 1),
    "random": (http(200, bytes(range(256)) * 4, JPEG), Reason.NOT_AN_IMAGE, 1),
    "svg": (http(200, b"<svg xmlns='http://www.w3.org/2000/svg'/>"), Reason.NOT_AN_IMAGE, 1),
    "cut-jpeg": (http(200, GOOD[: len(GOOD) // 2], JPEG), Reason.TRUNCATED_IMAGE, 1),
    "cut-header": (http(200, GOOD[:20], JPEG), Reason.TRUNCATED_IMAGE, 1),
    "pixel-bomb": (http(200, bomb_png()), Reason.TOO_LARGE, 1),
    "length-too-short": (http(200, GOOD, "Content-Length: 500", length=False), Reason.BAD_RESPONSE, 1),
    "length-too-long": (http(200, GOOD, "Content-Length: 190000", length=False), Reason.CONNECTION_FAILED, 2),
    "length-negative": (http(200, GOOD, "Content-Length: -5", length=False), Reason.BAD_RESPONSE, 1),
    "length-words": (http(200, GOOD, "Content-Length: many", length=False), Reason.BAD_RESPONSE, 1),
    "length-twice": (http(200, GOOD, "Content-Length: 5"), Reason.BAD_RESPONSE, 1),
    "announced-huge": (http(200, GOOD, "Content-Length: 999999999", length=False), Reason.TOO_LARGE, 1),
    "big": (http(200, picture(600, 600, "PNG")), Reason.TOO_LARGE, 1),
    "chunks-of-garbage": (http(200, b"zz\r\nnot hex\r\n", CHUNKED, length=False), Reason.BAD_RESPONSE, 1),
    "chunks-cut": (http(200, b"fff\r\nabc", CHUNKED, length=False), Reason.CONNECTION_FAILED, 2),
    "gzip-bomb": (http(200, gzip_bomb(), "Content-Encoding: gzip"), Reason.TOO_LARGE, 1),
    "gzip-cut": (http(200, gzip.compress(GOOD)[:-50], "Content-Encoding: gzip"), Reason.BAD_RESPONSE, 1),
    "gzip-lie": (http(200, GOOD, "Content-Encoding: gzip"), Reason.BAD_RESPONSE, 1),
    "brotli": (http(200, GOOD, "Content-Encoding: br"), Reason.BAD_RESPONSE, 1),
    "gzip-twice": (
        http(200, gzip.compress(gzip.compress(GOOD)), "Content-Encoding: gzip, gzip"),
        Reason.BAD_RESPONSE,
        1,
    ),
    "huge-header": (http(200, GOOD, f"X-Long: {'x' * 100_000}"), Reason.BAD_RESPONSE, 1),
    "many-headers": (http(200, GOOD, *(f"X-{i}: {'x' * 900}" for i in range(5000))), Reason.BAD_RESPONSE, 1),
    "bad-header-bytes": (b"HTTP/1.1 200 OK\r\nX-\x00Y\xff: a\r\n\r\n" + GOOD, Reason.BAD_RESPONSE, 1),
    "header-without-colon": (b"HTTP/1.1 200 OK\r\nnonsense\r\n\r\n" + GOOD, Reason.BAD_RESPONSE, 1),
    "http-0.9": (GOOD, Reason.BAD_RESPONSE, 1),
    "binary": (bytes(range(256)) * 10, Reason.BAD_RESPONSE, 1),
    "ssh": (b"SSH-2.0-OpenSSH_9.6\r\n", Reason.BAD_RESPONSE, 1),
    "nothing": (b"", Reason.CONNECTION_FAILED, 2 * SENT_AGAIN),
    "half-a-header": (b"HTTP/1.1 200 OK\r\nContent-Le", Reason.CONNECTION_FAILED, 2 * SENT_AGAIN),
    "reset-at-once": (reset(b""), Reason.CONNECTION_FAILED, 2 * SENT_AGAIN),
    "reset-in-body": (reset(http(200, GOOD, "Content-Length: 90000", length=False)), Reason.CONNECTION_FAILED, 2),
    "slow-headers": (after(5, http(200, GOOD)), Reason.TIMED_OUT, 2),
    "slow-trickle": (trickle(http(200, GOOD)), Reason.TIMED_OUT, 2),
    "silent-in-body": (stall(http(200, GOOD[:99], "Content-Length: 5000", length=False)), Reason.TIMED_OUT, 2),
    "endless": (endless(http(200, b"", JPEG, length=False)), Reason.TOO_LARGE, 1),
    "endless-headers": (endless(b"HTTP/1.1 200 OK\r\n", b"X-Y: z\r\n" * 1000), Reason.BAD_RESPONSE, 1),
    "endless-continue": (endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 50), Reason.TIMED_OUT, 2),
    "loop": (http(302, b"", "Location: loop"), Reason.TOO_MANY_REDIRECTS, 4),
    "nowhere": (http(302), Reason.BAD_RESPONSE, 1),
    "to-file": (http(302, b"", "Location: file:///etc/passwd"), Reason.BAD_URL, 1),
    "to-data": (http(301, b"", "Location: data:image/png;base64,AAAA"), Reason.BAD_URL, 1),
    "to-ftp": (http(307, b"", "Location: ftp://127.0.0.1/x"), Reason.BAD_URL, 1),
    "to-nonsense": (http(308, b"", "Location: http://[::1/"), Reason.BAD_URL, 1),
    "to-bytes": (http(302, b"", "Location: http://\xff\xfe/"), Reason.BAD_URL, 1),
    "to-user": (http(302, b"", "Location: http://a:b@127.0.0.1/"), Reason.BAD_URL, 1),
    "noai": (http(200, GOOD, "X-Robots-Tag: noai"), Reason.OPTED_OUT, 1),
    "tdm": (http(200, GOOD, "TDM-Reservation: 1"), Reason.OPTED_OUT, 1),
    "noai-on-redirect": (http(302, b"", "Location: good", "X-Robots-Tag: noimageai"), Reason.OPTED_OUT, 1),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_every_answer_has_a_verdict(web, name):
    page, reason, num_requests = ANSWERS[name]
    web.pages |= {name: page, "good": http(200, GOOD)}
    found = fetch(web.url(name))
    assert found.error is reason, found.detail
    assert web.asked[name] == num_requests


def test_all_of_them_at_once_beside_good_ones(web):
    """One bad host each; none holds up the good ones, and the account balances."""
    web.pages |= {name: page for name, (page, _, _) in ANSWERS.items()}
    urls = {name: web.url(name, f"127.0.0.{i % 40 + 2}") for i, name in enumerate(ANSWERS)}
    for i in range(30):
        web.pages[f"good-{i}"] = http(200, picture(seed=i))
        urls[f"good-{i}"] = web.url(f"good-{i}", f"127.0.0.{i % 10 + 45}")
    found = fetch_all(list(urls.values()), concurrency=8)
    assert len(found) == len(urls)
    for name, url in urls.items():
        if name.startswith("good-"):
            assert found[url].error is None, found[url].detail
        else:
            assert found[url].error is not None, name


def test_no_mangled_answer_escapes(web):
    """Answers with bytes changed, lost and added, in the header most of all: each ends as a row, whatever it does."""
    source = random.Random(20)
    whole = http(200, GOOD, JPEG, "X-Robots-Tag: all", "ETag: x", "Retry-After: 1", "Location: /x")
    end = whole.index(b"\r\n\r\n") + 4
    urls = []
    for i in range(300):
        data = bytearray(whole)
        for _ in range(source.randint(1, 6)):
            place = source.randrange(end if source.random() < 0.9 else len(data))
            data[place : place + source.randint(0, 3)] = source.randbytes(source.randint(0, 3))
        web.pages[f"{i}"] = bytes(data)
        urls.append(web.url(f"{i}", f"127.0.0.{1 + i % 50}"))
    found = fetch_all(urls, max_attempts=1)
    verdicts = {download.error for download in found.values()}
    assert {None, Reason.BAD_RESPONSE, Reason.TRUNCATED_IMAGE} < verdicts


# URLs

URLS = {
    "": Reason.BAD_URL,
    "   ": Reason.BAD_URL,
    None: Reason.BAD_URL,
    "no scheme.jpg": Reason.BAD_URL,
    "//example.org/x.jpg": Reason.BAD_URL,
    "http://": Reason.BAD_URL,
    "http:///x.jpg": Reason.BAD_URL,
    "http://127.0.0.1:99999/x": Reason.BAD_URL,
    "http://127.0.0.1:0/x": Reason.BAD_URL,
    "http://127.0.0.1:port/x": Reason.BAD_URL,
    "http://user:secret@127.0.0.1/x": Reason.BAD_URL,
    "http://[::1/x": Reason.BAD_URL,
    "http://a..b/x": Reason.BAD_URL,
    f"http://{'a' * 300}.invalid/": Reason.BAD_URL,
    "http://2130706433/x": Reason.BAD_URL,
    "http://127.0.0.1/\x00": Reason.BAD_URL,
    "http://127.0.0.1/a\r\nHost: evil": Reason.BAD_URL,
    "http://127.0.0.1/\ud800": Reason.BAD_URL,
    "data:image/png;base64,iVBORw0KGgo=": Reason.BAD_URL,
    "file:///etc/passwd": Reason.BAD_URL,
    "ftp://127.0.0.1/x.jpg": Reason.BAD_URL,
    "javascript:alert(1)": Reason.BAD_URL,
    "s3://bucket/key.jpg": Reason.BAD_URL,
    "http://127.0.0.1/" + "x" * 100_000: Reason.BAD_URL,
    "http://host.invalid/x.jpg": Reason.HOST_NOT_FOUND,
    "http://ünïcode.invalid/ü ü.jpg": Reason.HOST_NOT_FOUND,
    "https://under_score.invalid/x": Reason.HOST_NOT_FOUND,
}


@pytest.mark.parametrize("url", URLS, ids=lambda url: repr(url)[:40])
def test_every_url_has_a_verdict(url, monkeypatch):
    name_server(monkeypatch)
    found = fetch(url)
    assert found.error is URLS[url], found.detail
    assert len(found.detail) < 600
    assert "secret" not in found.detail


def test_a_name_server_that_is_busy_is_asked_again(monkeypatch):
    asked = name_server(monkeypatch)
    for host, count in (("busy.invalid", 3), ("gone.invalid", 1)):
        found = fetch(f"http://{host}/a.jpg", max_attempts=3)
        assert (found.error, asked[host]) == (Reason.HOST_NOT_FOUND, count)


@pytest.mark.parametrize(
    "path", ["a%20b.jpg", "a b.jpg", "ü.jpg", "x.jpg?sig=a%2Bb%3D&u=~%7E", "100%.jpg", "a//b/../c.jpg", "x.jpg#part"]
)
def test_odd_paths_reach_their_server(web, path):
    asked = path.split("#")[0].replace(" ", "%20").replace("ü", "%C3%BC")
    web.pages |= {asked.partition("?")[0]: http(200, GOOD)}
    found = fetch(web.url(path))
    if ".." in path:  # how such a path is spelt on the wire is the client's affair
        assert found.error in (None, Reason.NOT_FOUND)
    else:
        assert found.error is None, (found.detail, web.asked)
        assert web.asked[asked] == 1


def test_a_closed_port_and_a_server_that_never_accepts():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    found = fetch(f"http://127.0.0.1:{port}/x.jpg", robots=False)
    assert (found.error, found.http_status, found.num_attempts) == (Reason.CONNECTION_FAILED, None, 2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf:
        address = deaf.getsockname()
        with socket.create_connection(address):  # fills the queue
            found = fetch(f"http://127.0.0.1:{address[1]}/x.jpg")
    assert found.error is Reason.TIMED_OUT


def test_a_certificate_that_nobody_vouches_for(tmp_path):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(self_signed(tmp_path))
    with Web(context) as web:
        web.pages["a.jpg"] = http(200, GOOD)
        found = fetch(web.url("a.jpg"))
    assert found.error is Reason.CONNECTION_FAILED
    assert "certificate" in found.detail.lower()
    assert not web.asked


def test_http_where_tls_is_expected(web):
    found = fetch(web.url("a.jpg").replace("http://", "https://"))
    assert found.error is Reason.TIMED_OUT  # this one waits for the end of a header that never comes


def self_signed(folder):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(1))
        .not_valid_after(now + timedelta(1))
        .sign(key, hashes.SHA256())
    )
    form = serialization.PrivateFormat.PKCS8
    path = folder / "server.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path


# Private addresses

PRIVATE = [
    "127.0.0.1",
    "localhost",
    "0x7f.1",
    "[::1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::7f00:1]",
    "[64:ff9b::7f00:1]",
    "[2002:7f00:1::]",
    "[fe80::1]",
    "[fd00::1]",
    "[ff02::1]",
    "[::]",
    "0.0.0.0",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "169.254.169.254",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
]


@pytest.mark.parametrize("host", PRIVATE)
@pytest.mark.parametrize("robots", [True, False])
def test_private_addresses_are_refused(web, host, robots):
    found = fetch(f"http://{host}:{web.port}/a.jpg", allow_private_addresses=False, robots=robots)
    assert found.error is Reason.PRIVATE_ADDRESS, found.detail
    assert not web.asked
    assert not web.connections  # not even a connection


INNER = ["192.0.0.192", "192.0.0.9", "168.63.129.16", "192.88.99.1", "100.64.0.1", "100.127.255.255", "198.18.0.1"]
INNER += ["198.19.255.255", "240.0.0.1", "255.255.255.255"]
INNER_6 = ["fec0::1", "feff::1", "3fff::1", "3fff:fff::1", "64:ff9b:1::808:808", "5f00::1"]
KNOWN = ["169.254.169.254", "127.0.0.1", "10.0.0.1", "0.0.0.0"]
KNOWN_6 = ["fd00:ec2::254", "2001:db8::1"]


@pytest.mark.parametrize("lenient", [False, True])
def test_addresses_that_are_not_of_the_internet_are_refused_in_every_spelling(lenient, monkeypatch):
    """Those of INNER whatever Python's own lists are: with `lenient` they know nothing."""
    inner, inner_6 = (INNER, INNER_6) if lenient else (INNER + KNOWN, INNER_6 + KNOWN_6)
    if lenient:
        for kind in (ipaddress.IPv4Address, ipaddress.IPv6Address):
            monkeypatch.setattr(kind, "is_global", True)
            monkeypatch.setattr(kind, "is_reserved", False)
    spelt = [f"{prefix}{text}" for text in inner for prefix in ("", "::ffff:", "64:ff9b::")]
    spelt += [str(ipaddress.IPv6Address(0x2002 << 112 | int(ipaddress.IPv4Address(text)) << 80)) for text in inner]
    for text in [*spelt, *inner_6]:
        assert not addresses.is_public(ipaddress.ip_address(text)), text


@pytest.mark.parametrize(
    "text",
    ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "168.63.129.17", "192.0.1.1"],
)
def test_public_addresses_are_not(text, monkeypatch):
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    monkeypatch.setattr(addresses.socket, "socket", lambda **options: options)  # a machine may be without IPv6
    assert guarded_socket((family, socket.SOCK_STREAM, 0, "", (text, 80)))["family"] == family


def test_of_a_name_with_both_kinds_of_addresses_the_public_ones_are_taken(monkeypatch):
    def resolve(host, *args, **options):
        family, found = socket.AF_INET, ["10.0.0.1", "93.184.216.34"] if host == "both.example" else ["10.0.0.1"]
        return [(family, socket.SOCK_STREAM, 6, "", (address, 80)) for address in found]

    async def addresses_of(host):
        return [result["host"] for result in await addresses.PublicResolver().resolve(host, 80)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert asyncio.run(addresses_of("both.example")) == ["93.184.216.34"]
    with pytest.raises(addresses.PrivateAddress, match=r"10\.0\.0\.1"):
        asyncio.run(addresses_of("inside.example"))


def test_a_name_that_changes_its_address_after_the_check(web, monkeypatch):
    """DNS rebinding: whatever a resolver thought of the name, the address that is connected to is private."""

    class Lying(addresses.PublicResolver):
        async def resolve(self, host, port=0, family=socket.AF_INET):
            return [{"hostname": host, "host": "127.0.0.1", "port": port, "family": 2, "proto": 0, "flags": 0}]

    monkeypatch.setattr("pixart_data.answers.PublicResolver", Lying)
    found = fetch(f"http://rebinding.example:{web.port}/a.jpg", allow_private_addresses=False)
    assert found.error is Reason.PRIVATE_ADDRESS
    assert not web.connections


def test_a_redirect_to_a_private_address(web, monkeypatch):
    """The first host is taken for public here; the second is not, and is not connected to."""
    real = addresses.is_public
    monkeypatch.setattr(addresses, "is_public", lambda ip: str(ip) == "127.0.0.9" or real(ip))
    web.pages["in"] = http(302, b"", f"Location: {web.url('a.jpg', '127.0.0.10')}")
    web.pages["a.jpg"] = http(200, GOOD)
    found = fetch(web.url("in", "127.0.0.9"), allow_private_addresses=False)
    assert found.error is Reason.PRIVATE_ADDRESS
    assert "127.0.0.10" in found.detail
    assert web.asked["in"] == 1
    assert not web.connections["127.0.0.10"]


# Redirects and retries


def test_redirects_are_followed_within_the_limit(web):
    target = web.url("a.jpg", "127.0.0.2")
    web.pages["r1"] = http(301, b"", "Location: /r2?x=1")
    web.pages["r2"] = http(302, b"", f"Location: {target}")
    web.pages["a.jpg"] = http(200, GOOD)
    assert fetch(web.url("r1"), max_redirects=2).data == GOOD
    assert web.asked["127.0.0.2/robots.txt"] == 1
    assert fetch(web.url("r1"), max_redirects=1).error is Reason.TOO_MANY_REDIRECTS


def test_passing_failures_are_tried_again(web):
    web.pages["busy"] = in_turn(http(503), http(500), http(200, GOOD))
    found = fetch(web.url("busy"), max_attempts=3)
    assert (found.error, found.num_attempts, found.http_status) == (None, 3, 200)
    web.pages["cut"] = in_turn(http(200, GOOD, "Content-Length: 99999", length=False), http(200, GOOD))
    assert fetch(web.url("cut")).data == GOOD


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_waited_for(web, as_date):
    when = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True) if as_date else "1"
    web.pages["later"] = in_turn(http(429, b"", f"Retry-After: {when}"), http(200, GOOD))
    started_s = time.monotonic()
    assert fetch(web.url("later"), max_wait_s=3.0).error is None
    assert time.monotonic() - started_s > 0.9


def test_a_host_that_wants_a_pause_gets_it_from_all(web):
    web.pages["busy"] = in_turn(http(429, b"", "Retry-After: 1"), http(200, GOOD))
    times_s = []

    async def note(request, writer):
        times_s.append(time.monotonic())
        writer.write(http(200, GOOD))

    web.pages["other"] = note
    started_s = time.monotonic()
    found = fetch_all([web.url("busy"), web.url("other")], concurrency_per_host=1)
    assert all(download.error is None for download in found.values())
    assert times_s[0] - started_s > 0.9


def test_a_silent_host_is_left_alone(web):
    web.pages["dead"] = reset(b"")
    urls = [web.url(f"dead?{i}") for i in range(60)]
    good = web.url("a.jpg", "127.0.0.2")
    web.pages["a.jpg"] = http(200, GOOD)
    found = fetch_all([*urls, good])
    assert {found[url].error for url in urls} == {Reason.CONNECTION_FAILED}
    assert found[good].error is None
    num_asked = sum(count for path, count in web.asked.items() if path.startswith("dead"))
    assert 12 * SENT_AGAIN <= num_asked < 16 * SENT_AGAIN
    assert sum("left alone" in found[url].detail for url in urls) > 40


def test_a_host_that_refuses_again_and_again_is_not_waited_for(web):
    web.pages["busy"] = http(429, b"", "Retry-After: 1")
    urls = [web.url(f"busy?{i}") for i in range(60)]
    found = fetch_all(urls, max_wait_s=1.0, concurrency_per_host=4)
    assert {download.error for download in found.values()} == {Reason.RATE_LIMITED}
    assert 12 <= sum(count for path, count in web.asked.items() if path.startswith("busy")) < 16


def test_few_requests_at_once(web):
    now, most = Counter(), Counter()

    async def count(request, writer):
        for name in (writer.get_extra_info("sockname")[0], "all"):
            now[name] += 1
            most[name] = max(most[name], now[name])
        await asyncio.sleep(0.03)
        now.subtract((writer.get_extra_info("sockname")[0], "all"))
        writer.write(http(200, GOOD))

    web.pages["a"] = count
    urls = [web.url(f"a?{i}", f"127.0.0.{1 + i % 2}") for i in range(40)]
    found = fetch_all(urls, concurrency_per_host=3)
    assert all(download.error is None for download in found.values())
    assert most == {"127.0.0.1": 3, "127.0.0.2": 3, "all": 6}
    most.clear()
    found = fetch_all(urls, concurrency_per_host=30, concurrency=5)
    assert all(download.error is None for download in found.values())
    assert most["all"] == 5


def test_slow_hosts_do_not_hold_up_others(web):
    """A host that answers only when all of another's requests are done would wait for ever, did they wait for it."""
    all_done = asyncio.Event()

    async def wait(request, writer):
        await all_done.wait()
        writer.write(http(200, GOOD))

    async def count(request, writer):
        writer.write(http(200, GOOD))
        if web.asked.total() - web.asked["slow?0"] >= 8 + 2:  # two of them robots.txt
            all_done.set()

    web.pages |= {"slow": wait, "quick": count}
    slow = [web.url(f"slow?{i}") for i in range(8)]
    quick = [web.url(f"quick?{i}", "127.0.0.2") for i in range(8)]
    patient = {"read_timeout_s": 10.0, "total_timeout_s": 10.0, "max_attempts": 1}
    found = fetch_all([*slow, *quick], concurrency=2, concurrency_per_host=1, **patient)
    assert {download.error for download in found.values()} == {None}


def test_what_the_caller_raises_ends_the_batch(web):
    web.pages |= {"a": http(200, GOOD), "b": after(3, http(200, GOOD))}

    def full(download):
        raise OSError("disk full")

    started_s = time.monotonic()
    with pytest.raises(OSError, match="disk full"):
        Downloader(Downloads(**{**QUICK, "read_timeout_s": 30.0, "total_timeout_s": 30.0})).fetch(
            [web.url("b", "127.0.0.2"), web.url("a")], full
        )
    assert time.monotonic() - started_s < 2


# Robots and opt-outs

FORBIDS = b"User-agent: *\nDisallow: /private/\n\nUser-agent: pixart-toolkit\nDisallow: /no-models/\n"


def test_robots_txt_is_kept_to(web):
    web.robots["127.0.0.3"] = http(200, FORBIDS)
    web.pages |= dict.fromkeys(("no-models/a", "private/a", "free/a"), http(200, GOOD))
    urls = {path: web.url(path, "127.0.0.3") for path in web.pages}
    found = {path: fetch_all(list(urls.values()))[url].error for path, url in urls.items()}
    assert found == {"no-models/a": Reason.ROBOTS_DISALLOWED, "private/a": None, "free/a": None}
    other = fetch_all(list(urls.values()), user_agent="another")
    assert {path: other[url].error for path, url in urls.items()} == {
        "no-models/a": None,
        "private/a": Reason.ROBOTS_DISALLOWED,
        "free/a": None,
    }
    assert fetch(urls["no-models/a"], robots=False).error is None


def test_robots_txt_is_read_once_for_a_host(web):
    web.robots["127.0.0.3"] = http(200, FORBIDS)
    web.pages["a"] = http(200, GOOD)
    downloader = Downloader(Downloads(**QUICK))
    found = []
    for _ in range(2):
        downloader.fetch([web.url(f"a?{i}", "127.0.0.3") for i in range(10)], found.append)
    assert [download.error for download in found] == [None] * 20
    assert web.asked["127.0.0.3/robots.txt"] == 1


def test_robots_txt_of_a_redirect_target_is_kept_to(web):
    web.robots["127.0.0.3"] = http(200, b"User-agent: *\nDisallow: /\n")
    web.pages["r"] = http(302, b"", f"Location: {web.url('a', '127.0.0.3')}")
    web.pages["a"] = http(200, GOOD)
    assert fetch(web.url("r")).error is Reason.ROBOTS_DISALLOWED
    assert web.asked["a"] == 0


TOO_LONG = b"User-agent: *\nDisallow: /early\n" + b"# padding\n" * 60_000 + b"Disallow: /late\n"
ROBOTS = {  # what a host sends: verdict on /early, on /late
    "none": (http(404), None, None),
    "forbidden": (http(403), None, None),
    "empty": (http(200), None, None),
    "html": (http(200, b"<html>404 not found</html>"), None, None),
    "binary": (http(200, bytes(range(256)) * 99), None, None),
    "no-content": (http(204, length=False), None, None),
    "huge": (http(200, TOO_LONG), Reason.ROBOTS_DISALLOWED, None),
    "gzipped": (
        http(200, gzip.compress(b"User-agent: *\nDisallow: /early"), "Content-Encoding: gzip"),
        Reason.ROBOTS_DISALLOWED,
        None,
    ),
    "loop": (http(302, b"", "Location: /robots.txt"), None, None),
    "error": (http(500), Reason.SERVER_ERROR, Reason.SERVER_ERROR),
    "busy": (http(429), Reason.RATE_LIMITED, Reason.RATE_LIMITED),
    "reset": (reset(b""), Reason.CONNECTION_FAILED, Reason.CONNECTION_FAILED),
    "not-http": (b"hello\r\n\r\n", Reason.BAD_RESPONSE, Reason.BAD_RESPONSE),
    "silent": (after(5, http(200)), Reason.TIMED_OUT, Reason.TIMED_OUT),
    "endless": (endless(http(200, b"User-agent: *\nDisallow: /early\n", length=False)), Reason.ROBOTS_DISALLOWED, None),
}


@pytest.mark.parametrize("name", ROBOTS)
def test_every_robots_txt_has_a_meaning(web, name):
    page, early, late = ROBOTS[name]
    web.robots["127.0.0.4"] = page
    web.pages |= dict.fromkeys(("early", "late"), http(200, GOOD))
    urls = [web.url("early", "127.0.0.4"), web.url("late", "127.0.0.4")]
    found = fetch_all(urls)
    assert [found[url].error for url in urls] == [early, late], found[urls[0]].detail
    assert web.asked["early"] == (early is None)


OUT = ["noai", "noimageai", "noindex", "noimageindex"]


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ([], ""),
        (["all"], ""),
        (["noai"], "noai"),
        ([" NoAI , noimageai"], "noai"),
        (["nofollow, noimageindex"], "noimageindex"),
        (["none"], "noindex"),
        (["nofollow", "noindex"], "noindex"),
        (["googlebot: noindex"], ""),
        (["googlebot: nofollow, noindex"], ""),
        (["pixart-toolkit: noai"], "noai"),
        (["PixArt-Toolkit: noindex, noai"], "noindex"),
        (["*: noai"], "noai"),
        (["googlebot: noindex, pixart-toolkit: noai"], "noai"),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST"], ""),
        (["max-image-preview: large, noai"], "noai"),
        (["noaid"], ""),
        ([":::,,,:"], ""),
    ],
)
def test_opt_out_headers(tags, found):
    assert opted_out(tags, "pixart-toolkit", OUT) == found


def test_opt_outs_are_a_setting(web):
    web.pages["a"] = http(200, GOOD, "X-Robots-Tag: noindex", "tdm-reservation: 1")
    assert fetch(web.url("a")).error is Reason.OPTED_OUT
    assert fetch(web.url("a"), opt_out_directives=["noai"]).detail == "tdm-reservation: 1"
    assert fetch(web.url("a"), opt_out_directives=[]).error is None


# Content


def test_sizes_are_a_setting(web):
    web.pages |= {"wide": http(200, picture(300, 20)), "square": http(200, picture(40, 40))}
    urls = [web.url("wide"), web.url("square")]
    cases = [
        ({}, None, None),
        ({"min_side_px": 30}, Reason.TOO_SMALL, None),
        ({"max_aspect": 3.0}, Reason.EXTREME_ASPECT, None),
    ]
    cases.append(({"max_image_pixels": 2000}, Reason.TOO_LARGE, None))
    for settings, wide, square in cases:
        for check in ("full", "header"):
            found = fetch_all(urls, **settings, check=check)
            assert [found[url].error for url in urls] == [wide, square], (settings, check)


def test_a_header_check_lets_a_cut_image_pass(web):
    web.pages |= {"cut": http(200, GOOD[: len(GOOD) // 2]), "html": http(200, b"<html>"), "head": http(200, GOOD[:20])}
    assert fetch(web.url("cut"), check="header").error is None
    assert fetch(web.url("html"), check="header").error is Reason.NOT_AN_IMAGE
    assert fetch(web.url("head"), check="header").error is Reason.TRUNCATED_IMAGE


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [
        ("gzip", gzip.compress),
        ("deflate", zlib.compress),
        ("deflate", lambda data: zlib.compress(data)[2:-4]),
        ("identity", bytes),
    ],
)
def test_encodings_that_were_not_asked_for(web, encoding, pack):
    web.pages["a"] = http(200, pack(GOOD), f"Content-Encoding: {encoding}")
    assert fetch(web.url("a")).data == GOOD


def test_a_bomb_is_not_unpacked(web):
    web.pages["bomb"] = http(200, gzip_bomb(), "Content-Encoding: gzip")
    fetch(web.url("bomb"))  # whatever is imported late
    tracemalloc.start()
    try:
        assert fetch(web.url("bomb")).error is Reason.TOO_LARGE
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_a_body_of_exactly_the_limit_is_taken(web):
    web.pages["a"] = http(200, GOOD)
    assert fetch(web.url("a"), max_bytes=len(GOOD)).error is None
    assert fetch(web.url("a"), max_bytes=len(GOOD) - 1).error is Reason.TOO_LARGE
    web.pages["a"] = http(200, gzip.compress(GOOD, 0), "Content-Encoding: gzip")
    assert fetch(web.url("a"), max_bytes=len(GOOD) - 1).error is Reason.TOO_LARGE


@pytest.mark.parametrize("settings", [{"contact": "a\r\nX: y"}, {"contact": "a b"}, {"user_agent": "a: b"}])
def test_headers_cannot_be_smuggled_in(settings):
    with pytest.raises(ValidationError):
        Downloads(**settings)


def test_signed_urls_are_kept_to_the_letter():
    text = "https://cdn.example/a%2Fb.jpg?Signature=a%2Bb%3d~&x=%7e+1"
    assert str(parse_url(text)) == text
    with pytest.raises(Refused):
        parse_url("https://")
