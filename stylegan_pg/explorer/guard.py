"""Which requests the explorer's server answers.

They must be addressed to it by an allowed name, because any web page could otherwise reach it through a name of its own
that points to this machine (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """ASGI middleware: refuses requests under foreign names or from other pages, and adds HEADERS to all answers."""

    def __init__(self, app: ASGIApp, names: Collection[str] = (), any_address: bool = False):
        """
        Args:
            names: under which the server may be addressed, in lower case.
            any_address: whether numeric addresses other than this machine's own are allowed, too.
        """
        self.app, self.names, self.any_address = app, names, any_address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        origins = [value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"]
        refusal = ""
        if len(hosts) != 1 or not self.allows(hosts[0]):
            refusal = "this name of the server is not allowed: use the address that the command printed"
        elif any(origin not in (f"http://{hosts[0]}", f"https://{hosts[0]}") for origin in origins):
            refusal = "requests of other pages are refused"
        if refusal:
            await JSONResponse({"error": refusal}, 403)(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)

    def allows(self, host: str) -> bool:
        """Whether a Host header names this server."""
        name = host_name(host)
        if name is None or name in self.names:
            return name is not None
        try:
            return ipaddress.ip_address(name).is_loopback or self.any_address
        except ValueError:
            return False


def host_name(host: str) -> str | None:
    """The name or address in a Host header, in lower case and without the port; None if it is malformed."""
    if host.startswith("["):
        name, closed, port = host[1:].partition("]")
        if not closed or (port and not port.startswith(":")):
            return None
        port = port[1:]
    else:
        name, _, port = host.partition(":")
    if (port and not (port.isascii() and port.isdigit())) or not name:
        return None
    return name.lower().rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def allowed_names(host: str, more: Collection[str] = ()) -> tuple[set[str], bool]:
    """The names for Guard where the server is bound to `host`, and whether any numeric address is allowed."""
    names = {"localhost", *(name.lower().rstrip(".") for name in more)}
    loopback = host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
    if not loopback:
        names |= {host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}
    return names, not loopback
