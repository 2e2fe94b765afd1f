"""Access control: allowed hosts, origins and API keys, and the error for everyone else."""

import hmac
import ipaddress
import re
from dataclasses import dataclass
from email.message import Message
from typing import Any

_HOST = re.compile(r"(\[(?P<address>[^\]]*)\]|(?P<name>[^\[\]:]*))(:[0-9]*)?")
ALLOWED_HEADERS = "*, Authorization, Content-Type, X-Api-Key, Anthropic-Version, Anthropic-Beta"
_ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}


class Refused(Exception):
    """The server answers the request with an error.

    Attributes:
        status: the HTTP status.
        code: OpenAI's error code, or None.
        param: the name of the request's field that is wrong, or None.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param

    def as_json(self) -> dict[str, Any]:
        """The body of OpenAI's error response."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _ERROR_TYPES.get(self.status, default)
        fields = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}


@dataclass(frozen=True)
class Access:
    """Which requests are allowed.

    Attributes:
        hosts: allowed Host names in lower case, besides "localhost" and IP addresses.
        origins: allowed values of Origin; "*" allows any.
        api_key: the key that requests must send, or None.
    """

    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    api_key: str | None = None

    def check(self, headers: Message, *, needs_key: bool) -> None:
        """Refuse unknown hosts and origins, and a missing or wrong key.

        With DNS rebinding, a web page points its own name at this machine. The browser still sends
        that name as Host, so unknown names are refused; IP addresses cannot be rebound. A browser
        sends the page's origin as Origin. That of this server's own page is the host that is asked,
        with its port; the scheme is https behind a proxy with TLS.

        Args:
            headers: the request's.
            needs_key: whether the endpoint requires the API key.

        Raises:
            Refused: 400, 401 or 403.
        """
        hosts = headers.get_all("Host", [])
        if len(hosts) != 1:
            raise Refused(400, "expected one Host header")
        name = host_name(hosts[0])
        if not (name == "localhost" or name in self.hosts or is_address(name)):
            cure = f"; --allow-host {name} allows it" if name else ""
            raise Refused(403, f"host {hosts[0][:80]!r} is not allowed{cure}", "host")
        origin = headers.get("Origin")
        own = {f"{scheme}://{hosts[0].strip().lower()}" for scheme in ("http", "https")}
        if origin is not None and origin.lower() not in own and not self._allows(origin):
            raise Refused(
                403,
                f"origin {origin!r} is not allowed; --allow-origin {origin} allows it",
                "origin",
            )
        if self.api_key is not None and needs_key:
            scheme, _, key = headers.get("Authorization", "").partition(" ")
            bearer = scheme.lower() == "bearer" and self._is_key(key)
            if not self._is_key(headers.get("X-Api-Key", "")) and not bearer:
                raise Refused(401, "the API key is missing or wrong", "invalid_api_key")

    def _is_key(self, given: str) -> bool:
        """Whether this is the API key, in a time that does not tell how much of it is right."""
        key = (self.api_key or "").encode()
        return hmac.compare_digest(given.strip().encode("latin-1", "replace"), key)

    def cors_headers(self, origin: str | None) -> dict[str, str]:
        """Headers that let a web page read the response; none unless its origin is allowed."""
        if origin is None or not self._allows(origin):
            return {}
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Methods": "GET, POST, DELETE",
            # The wildcard does not cover Authorization, and older browsers do not know it.
            "Access-Control-Allow-Headers": ALLOWED_HEADERS,
            "Access-Control-Expose-Headers": "*",
            "Vary": "Origin",
        }

    def _allows(self, origin: str) -> bool:
        return "*" in self.origins or origin.lower() in self.origins


def host_name(host: str) -> str:
    """The name in a Host header or URL, in lower case, without port and brackets.

    It is empty if the header is malformed: there is more than a port after the name, or brackets
    around something else than an address.
    """
    match = _HOST.fullmatch(host.strip().lower())
    if match is None or (match["address"] is not None and not is_address(match["address"])):
        return ""
    return (match["address"] or match["name"]).removesuffix(".")


def is_address(name: str) -> bool:
    """Whether a name is an IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
