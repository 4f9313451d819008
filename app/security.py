"""Who may call: API keys with scopes and rates, read from a TOML file; and the headers of every answer.

The file holds the SHA-256 of each key alone. A slow, salted hash is for what people choose: `new_key` draws 256 random
bits, which nobody finds from their hash or by trying. So a wrong key costs its sender nothing but the answer: locking
out would only let one caller shut out another behind the same proxy.
"""

import hmac
import logging
import math
import secrets
import stat
import time
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal

from fastapi import Depends, Request
from fastapi.params import Depends as Dependency
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app import logs

Scope = Literal["predict", "admin", "metrics"]

HEADERS: Mapping[str, str] = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}  # of every answer; Strict-Transport-Security is for the proxy that ends TLS to say
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)  # of a page of ours, in place of the Content-Security-Policy above

REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)  # of a version's report, one file with its style inside, which runs nothing

LOG = logging.getLogger(__name__)
BEARER = HTTPBearer(auto_error=False, description="A key made by `dermlens keys new`.")
LOOK_EVERY_S = 1
BURST_S = 60  # a full bucket holds a minute's requests


class Unauthorized(Exception):
    """No key, or one that is not in the file."""


class Forbidden(Exception):
    """The key lacks the scope."""


class RateLimited(Exception):
    """The key has had its requests; `retry_after_s` says when there is another."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("this key has had its requests for now: try again later")
        self.retry_after_s = retry_after_s


class BadKeys(ValueError):
    """A key file, or a key, that cannot be used."""


class Key(BaseModel):
    """One entry of the file; `per_minute` is the rate of its requests and their largest burst, None no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    scopes: frozenset[Scope] = Field(min_length=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$", repr=False)
    per_minute: int | None = Field(None, ge=1, strict=True)


class _KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    keys: tuple[Key, ...] = Field(min_length=1)


@dataclass(frozen=True, repr=False)  # both fields are secrets, or nearly
class NewKey:
    """A key to hand over, which is kept nowhere, and the lines for the key file."""

    secret: str
    toml: str


def new_key(name: str, scopes: Collection[str], *, per_minute: int | None = None) -> NewKey:
    """Draw a key.

    Raises:
        BadKeys: the name, a scope or the rate is not valid.
    """
    secret = "dl_" + secrets.token_urlsafe(32)
    digest = sha256(secret.encode()).hexdigest()
    try:
        Key.model_validate({"name": name, "scopes": scopes, "sha256": digest, "per_minute": per_minute})
    except ValidationError as error:
        raise BadKeys(_first(error)) from None
    listed = ", ".join(f'"{scope}"' for scope in sorted(scopes))
    lines = ["[[keys]]", f'name = "{name}"', f"scopes = [{listed}]", f'sha256 = "{digest}"']
    if per_minute is not None:
        lines.append(f"per_minute = {per_minute}")
    return NewKey(secret, "\n".join(lines) + "\n")


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file.

    Raises:
        BadKeys: one line that names the file, the key and what is wrong, and never a secret.
    """
    try:
        # Anyone may read it, as mounted secrets often are: hashes give no key away. One more line would be a key
        if path.stat().st_mode & stat.S_IWOTH:
            raise BadKeys(f"{path}: everyone may write to it: chmod o-w")
        keys = _KeyFile.model_validate(tomllib.loads(path.read_text())).keys
    except OSError as error:
        raise BadKeys(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        raise BadKeys(f"{path}: {_first(error)}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadKeys(f"{path}: not TOML: {error}") from None
    for one, other in combinations(keys, 2):
        if one.name == other.name:
            raise BadKeys(f"{path}: two keys are named {one.name}")
        if one.sha256 == other.sha256:
            raise BadKeys(f"{path}: {one.name} and {other.name} have the same sha256")
    return keys


def _first(error: ValidationError) -> str:
    """Where and what the first mistake is; never the value, which may be a key pasted into the wrong place."""
    mistake = error.errors()[0]
    place = mistake["loc"]
    if place[0] == "keys" and len(place) > 1:
        place = (f"key {int(place[1]) + 1}", *place[2:])
    return ": ".join(str(part) for part in (*place, mistake["msg"]) if not isinstance(part, int))


class KeyRing:
    """The keys of a file, read again when it changes."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the file; `clock` gives seconds that never go back. Raises `BadKeys`."""
        self._path = path
        self._clock = clock
        self._seen = _stamp(path)
        self._keys = read_keys(path)
        self._look_at = clock() + LOOK_EVERY_S
        self._full_at: dict[str, float] = {}  # by key name, when its bucket is full again

    def admit(self, presented: str | None, scope: Scope) -> Key:
        """The key that was presented, where it may do this now; it has then one request less.

        Raises:
            Unauthorized, Forbidden, RateLimited.
        """
        self._look()
        if not presented:
            raise Unauthorized("send an API key: Authorization: Bearer KEY")
        digest = sha256(presented.encode()).hexdigest()
        # Compares them all, each in constant time: how long it takes tells nothing of the keys
        found = [key for key in self._keys if hmac.compare_digest(key.sha256, digest)]
        if not found:
            raise Unauthorized("the API key is not known")
        key = found[0]
        if scope not in key.scopes:
            raise Forbidden(f"the API key lacks the scope {scope}")
        if key.per_minute is not None:
            self._spend(key.name, 60 / key.per_minute)
        return key

    def _spend(self, name: str, cost_s: float) -> None:
        """A token bucket as one number: each request puts off by its cost the time when the bucket is full again."""
        now = self._clock()
        full_at = max(self._full_at.get(name, now), now) + cost_s
        over_s = full_at - now - BURST_S
        if over_s > 1e-6:  # seven sevenths of a minute may come to a little more than one
            raise RateLimited(math.ceil(over_s))
        self._full_at[name] = full_at

    def _look(self) -> None:
        """Read the file again if it changed; a bad one is told once, and the keys from before it stay."""
        now = self._clock()
        if now < self._look_at:
            return
        self._look_at = now + LOOK_EVERY_S
        stamp = _stamp(self._path)
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._keys = read_keys(self._path)
            LOG.info("%s: read again, keys: %d", self._path, len(self._keys))
        except BadKeys as error:
            LOG.error("%s; the keys from before stay", error)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Differs when the file does; None where it cannot be looked at."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def guard(keys: KeyRing | None, scope: Scope) -> list[Dependency]:
    """What a route of this scope needs as its `dependencies=`; raises as `KeyRing.admit`, before the body is read.

    Without a key file every route is open but those of `admin`, which are off. The key's name is left in
    `request.scope["key_name"]`.
    """
    if keys is None and scope != "admin":
        return []

    async def check(
        request: Request, presented: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]
    ) -> None:
        if keys is None:
            raise Forbidden("admin routes are off: set DERMLENS_API_KEYS")
        request.scope["key_name"] = keys.admit(presented.credentials if presented else None, scope).name
        logs.note(key=request.scope["key_name"])

    return [Depends(check)]
