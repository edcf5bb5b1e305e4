"""What servers say about robots: robots.txt (RFC 9309) and the headers that opt an image out of training."""

import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from protego import Protego
from yarl import URL

MAX_ROBOTS_BYTES = 500 * 1024
"""RFC 9309, 2.5: parsers read at least this much; what follows is ignored."""

_KEPT_S = 24 * 3600  # RFC 9309, 2.4
_KEPT_HOSTS = 4096
_VALUED = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")


@dataclass(frozen=True)
class Rules:
    """What one host allows; `parsed` is None where there is no robots.txt, and all is allowed."""

    parsed: Protego | None = None

    @classmethod
    def parse(cls, body: bytes) -> "Rules":
        """Read a robots.txt; lines that are none, as of an HTML page served in its place, are ignored."""
        return cls(Protego.parse(body.decode("utf-8-sig", "replace")))

    def allow(self, url: URL, agent: str) -> bool:
        """Tell whether the robot called `agent` may fetch a URL."""
        return self.parsed is None or bool(self.parsed.can_fetch(str(url), agent))


class RulesCache:
    """The rules of the hosts asked last, for a day."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[float, Rules]] = OrderedDict()

    def get(self, origin: str) -> Rules | None:
        """Return the rules of an origin, None if they are not known or too old."""
        until_s, rules = self._kept.get(origin, (0.0, None))
        if rules is None or until_s < time.monotonic():
            return None
        self._kept.move_to_end(origin)
        return rules

    def put(self, origin: str, rules: Rules) -> None:
        """Remember the rules of an origin."""
        self._kept[origin] = (time.monotonic() + _KEPT_S, rules)
        if len(self._kept) > _KEPT_HOSTS:
            self._kept.popitem(last=False)


def opted_out(tags: Iterable[str], agent: str, directives: Sequence[str]) -> str:
    """Return the directive of `X-Robots-Tag` headers that opts an image out, or an empty string.

    A header may name the robot that it and what follows in it is for, `otherbot: noai, noindex`; without a name it is
    for all. `none` stands for `noindex, nofollow`.

    Args:
        tags: The values of all headers of that name.
        agent: Our own name.
        directives: Those that are kept to.
    """
    wanted = {directive.lower() for directive in directives}
    for tag in tags:
        ours = True
        for part in tag.lower().split(","):
            name, colon, rest = part.partition(":")
            if colon and name.strip() not in _VALUED:
                ours = name.strip() in ("*", agent.lower())
                part = rest
            found = "noindex" if part.strip() == "none" else part.strip()
            if ours and found in wanted:
                return found
    return ""
