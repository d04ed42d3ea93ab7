"""Who may talk to the server.

A page from elsewhere can make the user's browser send requests to this server, and a name that is made to point at
127.0.0.1 (DNS rebinding) makes such a page look like ours. So on the loopback the Host must be a name of this machine;
elsewhere every request needs the token; and a request that changes something must not come from another origin.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

MIN_TOKEN = 8


@dataclass(frozen=True)
class Refusal:
    """status: of HTTP."""

    status: int
    message: str


@dataclass(frozen=True)
class Guard:
    """``token``: asked of every request, if there is one. Without one only names of the loopback are served."""

    token: str | None = None

    def refusal(self, method: str, headers: Mapping[str, str]) -> Refusal | None:
        """Why a request is not served; None if it is."""
        host = headers.get("Host") or ""
        if self.token is None and not is_loopback(hostname(host)):
            return Refusal(403, "this server answers to localhost only")
        if self.token is not None and not self.knows(headers.get("Authorization") or ""):
            return Refusal(401, "this server wants its token: as password, or as Authorization: Bearer TOKEN")
        if method not in ("GET", "HEAD"):
            origin, site = headers.get("Origin"), headers.get("Sec-Fetch-Site")
            if origin is not None and not same_host(origin, host):
                return Refusal(403, "requests from pages of other origins are not served")
            if site not in (None, "same-origin", "none"):
                return Refusal(403, "requests from pages of other sites are not served")
        return None

    def knows(self, authorization: str) -> bool:
        """Whether the token is given, as Bearer or as the password of Basic."""
        kind, _, value = authorization.partition(" ")
        given = ""
        if kind.lower() == "bearer":
            given = value.strip()
        elif kind.lower() == "basic":
            try:
                given = base64.b64decode(value).decode("utf-8", "replace").partition(":")[2]
            except (binascii.Error, ValueError):
                return False
        return hmac.compare_digest(given.encode(), (self.token or "").encode())


def hostname(host: str) -> str:
    """Of a Host header, without the port; "" where there is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def same_host(origin: str, host: str) -> bool:
    """Whether an Origin ("http://name:port") is the page that this Host served. "null" is nobody's."""
    parts = origin.partition("://")
    return parts[0] in ("http", "https") and parts[2].lower() == host.lower() != ""
