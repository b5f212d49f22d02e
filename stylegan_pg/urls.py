"""URLs and credentials: masking of secrets in URLs, and lookup of the credentials for a server.

A user name and a password for a host (and port) are searched in this order:

    1. the URL itself, https://USER:PASSWORD@HOST/...; this part is never written to files or messages
    2. $STYLEGAN_PG_HTTP_AUTH, a list of HOST[:PORT]=USER:PASSWORD separated by spaces
    3. $NETRC, or ~/.netrc
"""

from __future__ import annotations

import base64
import netrc
import os
import re
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from braceexpand import braceexpand

from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable

AUTH = "STYLEGAN_PG_HTTP_AUTH"
MASK = "***"
_PORTS = {"http": 80, "https": 443}
# The user information extends to the last @ before the host. If the text after the colon is not a port number, it is a
# password, which may contain slashes.
_USER = re.compile(r"(?<=://)(?:[^/?#@\s'\"]*:(?!\d*[/?#:{])[^@\s'\"]*@|[^/?#@\s'\"]*@)(?:[^/?#\s'\"]*@)?")
_SECRET = r"[\w.-]*(?:sig|signature|token|key|keyid|secret|pass|passwd|password|credentials?|auth|authorization|cookie)"
_PARAMETER = re.compile(rf"([?&;#]{_SECRET}=)[^&;\s'\"]*", re.IGNORECASE)
_USERS = r"(?:-u|--user|--proxy-user)(?=[=\s]['\"]?[^\s'\"]*:)"
_OPTION = rf"(?:{_USERS}|--oauth2-bearer|-b|--{_SECRET})(?:=|\s+)['\"]?|-u(?=[^\s'\"=-][^\s'\"]*:)|sshpass\s+-p\s*"
_SCHEME = r"(?:[\w-]+\s+(?=[^\s'\"]))?(?![\w-]+\s+\$)"  # the scheme of an Authorization header, such as Basic or Bearer
# Secrets in the options of commands such as curl, wget, gsutil and aws. A text that begins with $ is a variable.
_OF_COMMANDS = tuple(
    re.compile(rf"({before})(?!\$){value}+", re.IGNORECASE)
    for before, value in (
        (rf"(?:^|[\s:])(?:{_OPTION})", r"[^\s'\"&;]"),
        (rf"\b{_SECRET}:\s*(?!\s){_SCHEME}", r"[^'\"]"),  # a header, up to the closing quotation mark
        (rf"\b{_SECRET}=", r"[^\s'\"&;]"),
    )
)


def without_secrets(url: str) -> str:
    """Return a URL that is safe to store in files. User name and password are removed, and the values of secret
    parameters (token=, sig=, ...) are replaced by ***.

    In a `pipe:` command, literal passwords, tokens and keys are replaced by ***; variables such as $TOKEN remain.
    """
    if url.startswith("pipe:"):
        text = _USER.sub(f"{MASK}@", url)
        for pattern in (_PARAMETER, *_OF_COMMANDS):
            text = pattern.sub(rf"\1{MASK}", text)
        return text
    if "://" not in url:
        return url
    return _PARAMETER.sub(rf"\1{MASK}", _USER.sub("", url))


def shown(url: str) -> str:
    """Return a URL or a path in the form used in messages: without secrets and query, and escaped for terminals."""
    text = without_secrets(url)
    return printable(text if text.startswith("pipe:") or "://" not in text else text.split("?", 1)[0])


def runs_command(url: str) -> bool:
    """Return whether reading a URL, a brace pattern, or several of them joined by "::", runs a command (`pipe:`)."""
    try:
        return any(one.startswith("pipe:") for part in url.split("::") for one in braceexpand(part))
    except ValueError:  # it is not a valid brace pattern, so the text is used literally
        return url.startswith("pipe:")


# ------------------------------------------------------------------------------------------------------ credentials


def split_user(url: str) -> tuple[str, str]:
    """Split a URL into the URL without USER:PASSWORD@, and the decoded text "USER:PASSWORD" or ""."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    return (urlunsplit(parts._replace(netloc=host)), unquote(user)) if at else (url, "")


def authorization(url: str) -> str:
    """Return the value of the Authorization header for a URL; "" if there are no credentials for its host."""
    bare, user = split_user(url)
    user = user or _from_environment(urlsplit(bare)) or _from_netrc(urlsplit(bare))
    return f"Basic {base64.b64encode(user.encode()).decode()}" if user else ""


def same_server(a: str, b: str) -> bool:
    """Return whether credentials for the URL `a` may also be sent to `b`. Both must have the same host and port, and
    the scheme must not change from https to http."""
    first, second = urlsplit(a), urlsplit(b)
    if (first.hostname or "").lower() != (second.hostname or "").lower():
        return False
    ports = (_port(first), _port(second))
    if first.scheme == second.scheme:
        return ports[0] == ports[1]
    return (first.scheme, second.scheme) == ("http", "https") and ports == (80, 443)


def _port(parts: SplitResult) -> int | None:
    return parts.port or _PORTS.get(parts.scheme)


def _from_environment(parts: SplitResult) -> str:
    for entry in os.environ.get(AUTH, "").split():
        host, sign, user = entry.partition("=")
        if not sign or ":" not in user:
            raise UsageError(
                f"${AUTH} has an entry that is not of the form HOST=USER:PASSWORD: write it this way, and separate "
                "entries by spaces"
            )
        if host.lower() in {(parts.hostname or "").lower(), f"{parts.hostname}:{_port(parts)}".lower()}:
            return user
    return ""


def _from_netrc(parts: SplitResult) -> str:
    path = Path(os.environ.get("NETRC") or os.path.expanduser("~/.netrc"))
    try:
        found = netrc.netrc(str(path)).authenticators(parts.hostname or "")
    except FileNotFoundError:
        return ""
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError) as error:  # str(error) may contain a password
        reason = getattr(error, "strerror", None) or "it is not a text file"
        if isinstance(error, netrc.NetrcParseError):
            reason = f"line {error.lineno} is not valid in a netrc file"
        raise UsageError(f"{path} cannot be read ({reason}): correct it, or set ${AUTH}") from None
    return f"{found[0]}:{found[2]}" if found and found[2] else ""
