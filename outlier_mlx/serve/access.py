"""Who may ask: hosts, origins and keys; and the answer to those who may not."""

import hmac
import ipaddress
from dataclasses import dataclass
from email.message import Message
from typing import Any

_ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}


class Refused(Exception):
    """A request that gets an error for an answer.

    Attributes:
        status: the HTTP status.
        code: a word for programs, or None.
    """

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code

    def as_json(self) -> dict[str, Any]:
        """The error as OpenAI's API words it."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _ERROR_TYPES.get(self.status, default)
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        hosts: names, in lower case, that may stand in Host besides "localhost" and IP addresses.
        origins: what may stand in Origin; "*" is any.
        api_key: the key that requests must carry, or None.
    """

    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    api_key: str | None = None

    def check(self, headers: Message, *, free: bool) -> None:
        """Refuse requests from elsewhere, and those without the key unless they are `free`.

        A page that rebinds its own name to this address still sends that name as Host; an IP
        address cannot be rebound. A browser says in Origin which page asks.

        Raises:
            Refused: 400, 401 or 403.
        """
        hosts = headers.get_all("Host", [])
        if len(hosts) != 1:
            raise Refused(400, "one Host header is needed")
        name = host_name(hosts[0])
        if not (name == "localhost" or name in self.hosts or is_address(name)):
            raise Refused(
                403, f"host {name!r} is not served here; --allow-host {name} would", "host"
            )
        origin = headers.get("Origin")
        if origin is not None and not self._allows(origin):
            raise Refused(
                403,
                f"origin {origin!r} may not ask; --allow-origin {origin} would let it",
                "origin",
            )
        if self.api_key is not None and not free:
            scheme, _, key = headers.get("Authorization", "").partition(" ")
            given = key.strip().encode("latin-1", "replace")
            same = hmac.compare_digest(given, self.api_key.encode())
            if scheme.lower() != "bearer" or not same:
                raise Refused(401, "the API key is missing or wrong", "invalid_api_key")

    def cors_headers(self, origin: str | None) -> dict[str, str]:
        """Headers that let a page read the answer; none unless its origin was allowed."""
        if origin is None or not self._allows(origin):
            return {}
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Methods": "GET, POST",
            # The wildcard does not cover Authorization.
            "Access-Control-Allow-Headers": "*, Authorization",
            "Vary": "Origin",
        }

    def _allows(self, origin: str) -> bool:
        return "*" in self.origins or origin.lower() in self.origins


def host_name(host: str) -> str:
    """The name in a Host header or URL authority: lower case, no port, no brackets."""
    host = host.strip().lower()
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.removesuffix(".")


def is_address(name: str) -> bool:
    """Whether a name is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
