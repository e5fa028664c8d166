"""Access: whose requests are answered, by key, and from which pages of browsers."""

import hashlib
import hmac
import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from t2i.pipelines.serving.api.errors import ApiError

from t2i.errors import InputError

LOOPBACK_NAMES = frozenset(("127.0.0.1", "localhost", "[::1]"))
KEY_LENGTHS = range(16, 257)
DEFAULT_PORTS = {"http": "80", "https": "443"}
# What pages of other sites may read of an answer, where --cors allows them any
EXPOSED_HEADERS = "x-request-id, retry-after, x-should-retry"


def is_loopback(host: str) -> bool:
    """Return True if an address to listen on is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# Keys


class Keys:
    """Keys of clients, by names for logs and for turns. Their hashes are kept, not the keys."""

    def __init__(self, keys: Mapping[str, str]):
        self.digests = {name: hash_key(key) for name, key in keys.items()}

    def find_name(self, given: str) -> str | None:
        """Return the name of a key; None for an unknown one. The time that it takes says nothing about the keys."""
        # Every key is compared, also after the right one
        digest, found = hash_key(given), None
        for name, known in self.digests.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found


def hash_key(key: str) -> bytes:
    """Return the hash of a key, which all have the same length."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def read_keys(path: str | Path) -> Keys:
    """Return the keys of a file: one `name: key` or one key a line; empty lines and comments after # are skipped.

    Raises InputError for a file that every user can read, and for a line that is no key.
    """
    # Before a line is read: whoever shares the machine may have read it too
    path = Path(path)
    try:
        if os.name == "posix" and (mode := path.stat().st_mode) & 0o027:
            what = f"{str(path)!r} is open to others (mode {mode & 0o777:o})"
            raise InputError(f"{what}; `chmod 600` keeps keys to yourself")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"{str(path)!r} cannot be read: {reason}") from error
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, key = (part.strip() for part in line.rpartition(":"))
        name, where = name or f"key-{len(keys) + 1}", f"{str(path)!r}, line {number}"
        if not re.fullmatch(r"[!-~]+", key) or len(key) not in KEY_LENGTHS:
            raise InputError(f"{where}: a key has {KEY_LENGTHS[0]} to {KEY_LENGTHS[-1]} visible ASCII characters")
        if not re.fullmatch(r"[\w.@-]{1,64}", name):
            raise InputError(f"{where}: a name has 1 to 64 letters, digits and characters of . _ @ -")
        if name in keys or key in keys.values():
            raise InputError(f"{where}: the {'name' if name in keys else 'key'} is there twice")
        keys[name] = key
    if not keys:
        raise InputError(f"{str(path)!r} has no key; write one `name: key` a line")
    return Keys(keys)


# Hosts and origins


@dataclass(frozen=True)
class Access:
    """Rules of who may send requests.

    Args:
        keys: of clients; None lets everyone in who can reach the server.
        hosts: names that the header Host may have, without port; None for any. Without keys they keep a page of
            another site, whose name leads to this machine, from reaching the server.
        public_url: where clients reach the server, if that is not where it listens.
        cors: origins of other sites whose pages may use the server.
    """

    keys: Keys | None = field(default=None, repr=False)
    hosts: frozenset[str] | None = None
    public_url: str | None = None
    cors: tuple[str, ...] = ()

    @classmethod
    def build(cls, host: str, keys: str | Path | None, public_url: str | None, cors: tuple[str, ...]) -> "Access":
        """Return the rules for a server that listens on `host`. Raises InputError."""
        if not is_loopback(host) and keys is None:
            what = f"host {host!r} lets other machines in, which needs --keys FILE"
            raise InputError(f"{what}; 127.0.0.1 serves this machine alone")
        if public_url is not None:
            public_url = check_url("public-url", public_url)
        cors = tuple(check_origin("cors", origin) for origin in cors)
        hosts = None
        if is_loopback(host):
            own = f"[{host}]" if ":" in host else host
            hosts = (
                LOOPBACK_NAMES | {own} | ({split_host(urlsplit(public_url).netloc).lower()} if public_url else set())
            )
        return cls(read_keys(keys) if keys is not None else None, hosts, public_url, cors)

    def check_host(self, headers: Headers) -> None:
        """Refuse a request for another host than this one. Raises ApiError."""
        host = headers.get("host", "")
        if self.hosts is not None and split_host(host.lower()) not in self.hosts:
            what = f"host {host[:100]!r} is not allowed; start the server with --public-url to allow it"
            raise ApiError(403, "unknown_host", what)

    def check_origin(self, headers: Headers) -> None:
        """Refuse a request of a page of another site. Raises ApiError."""
        origin = headers.get("origin")
        if origin is None or origin in self.cors:
            return
        # The page of this server names it as the request does, with a scheme that a proxy may have changed
        own = {normalize_origin(f"{scheme}://{headers.get('host', '')}") for scheme in DEFAULT_PORTS}
        if self.public_url is not None:
            own.add(normalize_origin("://".join(urlsplit(self.public_url)[:2])))
        if normalize_origin(origin) not in own:
            what = f"pages of {origin[:100]} may not use this server; --cors allows an origin, --public-url its own"
            raise ApiError(403, "foreign_origin", what)

    def find_key_name(self, headers: Headers) -> str:
        """Return the name of a request's key; "" where none is asked for. Raises ApiError for a wrong one."""
        if self.keys is None:
            return ""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            what = "the request has no key; send it as `Authorization: Bearer KEY`"
        elif (name := self.keys.find_name(given.strip())) is not None:
            return name
        else:
            what = "the key is wrong"
        raise ApiError(401, "invalid_api_key", what, headers={"www-authenticate": "Bearer"})

    def build_cors_headers(self, headers: Headers) -> dict[str, str]:
        """Return what lets a page of an allowed site read the answer, or ask before it sends a request."""
        origin = headers.get("origin")
        if not self.cors:
            return {}
        # Stores between here and the browser must not give one site's answer to another
        found = {"vary": "origin"}
        if origin in self.cors:
            found |= {"access-control-allow-origin": origin, "access-control-expose-headers": EXPOSED_HEADERS}
        if origin in self.cors and "access-control-request-method" in headers:
            asked = headers.get("access-control-request-headers", "authorization, content-type")
            found |= {"access-control-allow-methods": "GET, POST", "access-control-allow-headers": asked}
            found["access-control-max-age"] = "600"
        return found


def split_host(netloc: str) -> str:
    """Return the host of "HOST:PORT"; one of IPv6 keeps its brackets."""
    return re.sub(r":\d*$", "", netloc)


def normalize_origin(origin: str) -> str:
    """Return an origin in small letters, without the port that its scheme has anyway."""
    scheme, _, netloc = origin.lower().partition("://")
    return f"{scheme}://{netloc.removesuffix(':' + DEFAULT_PORTS.get(scheme, ''))}"


def check_url(name: str, value: str) -> str:
    """Return an address of HTTP without the slash at its end. Raises InputError."""
    try:
        parts = urlsplit(value)
        valid = parts.scheme in DEFAULT_PORTS and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or not re.fullmatch(r"[!-~]+", value) or parts.query or parts.fragment or parts.username is not None:
        raise InputError(f"{name} must be an address such as https://images.example.org, got {value[:100]!r}")
    return value.rstrip("/")


def check_origin(name: str, value: str) -> str:
    """Return an origin as browsers send it. Raises InputError, also for "*", which would let every site in."""
    found = check_url(name, value)
    if urlsplit(found).path:
        raise InputError(f"{name} must be a scheme and a host, such as https://images.example.org, got {value[:100]!r}")
    return normalize_origin(found)
