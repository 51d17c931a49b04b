"""The API keys of one process: those of a file, which is read again when it changes, and those of the environment.

Promises that the time of a look-up tells nothing of the keys, that no key is kept once it is hashed, and that a file
which breaks or vanishes while the service runs takes nobody's access away and gives nobody any.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from serve_app.access.caller import NO_LIMITS, Caller, Limits
from serve_app.access.key_file import NAME, KeyDocument, KeyFile, KeyFileError, TenantDocument, read_key_file
from serve_app.core import Priority

logger = logging.getLogger(__name__)

VARIABLE = "SERVE_APP_API_KEYS"
"""Environment variable of the service: `KEY` or `NAME=KEY`, several with commas or spaces between them."""
DEFAULT_NAME = "default"
"""Name and tenant of a key of the environment that has none."""
LEAST_CHARACTERS = 16
"""Of a key of the environment. A shorter one could be guessed, and found from its SHA-256."""
MOST_CHARACTERS = 512
"""Of a key that somebody presents. A longer one is wrong."""
RELOAD_S = 2.0
"""Interval of looks at the file: a revoked key is refused this late at most. A look takes 20 us in a thread."""

_PREFIX = "sa-"
_KEY_BYTES = 32
_WRITTEN = re.compile(rf"({NAME})=([!-~]{{{LEAST_CHARACTERS},}})")
_KEY = re.compile(r"[!-~]+")


@dataclass(frozen=True, slots=True)
class Key:
    """What is kept of one key."""

    digest: bytes
    """SHA-256 of the key."""
    caller: Caller
    expires_at: float | None = None
    """Seconds since 1970; None: never."""


class UnknownKey(Exception):
    """No key is the one that was presented."""


class ExpiredKey(Exception):
    """The key was one of ours."""


class KeyRing:
    """Some keys. Never changes."""

    def __init__(self, keys: Iterable[Key]) -> None:
        # The index of a key depends on a secret of this process. So whoever can measure how long a look-up of a wrong
        # key takes learns nothing of the digests that are right.
        self._secret = secrets.token_bytes(32)
        self._keys = {self._index(key.digest): key for key in keys}

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, presented: str) -> Key | None:
        """The key that is `presented`; None for one that is not here."""
        digest = digest_of(presented)
        key = self._keys.get(self._index(digest))
        return key if key is not None and hmac.compare_digest(key.digest, digest) else None

    def _index(self, digest: bytes) -> bytes:
        return hmac.digest(self._secret, digest, hashlib.sha256)


class ApiKeys:
    """The keys that a service takes. Without a file and without keys in the environment it asks for none."""

    def __init__(
        self,
        path: Path | None = None,
        environment: Mapping[str, str] | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Reads the file, which blocks. Raises `KeyFileError`; `now`: seconds since 1970."""
        self._path = path
        self._now = now
        self._fixed = keys_of_environment((environment or {}).get(VARIABLE, ""))
        self.required = path is not None or bool(self._fixed)
        """Whether callers must have a key."""
        self.fault = ""
        """Why the file as it is now is not used; "" when it is."""
        self._stamp = _stamp(path) if path is not None else None
        self._ring = self._read()

    def __len__(self) -> int:
        return len(self._ring)

    def find(self, presented: str) -> Key:
        """The key that is `presented`. Raises `UnknownKey` and `ExpiredKey`."""
        key = self._ring.find(presented) if len(presented) <= MOST_CHARACTERS else None
        if key is None:
            raise UnknownKey
        if key.expires_at is not None and self._now() >= key.expires_at:
            raise ExpiredKey
        return key

    async def watch(self, period_s: float = RELOAD_S) -> None:
        """Keep up with the file until cancelled. Reads it on a thread."""
        while self._path is not None:
            await asyncio.sleep(period_s)
            try:
                await asyncio.to_thread(self.refresh)
            except Exception:  # whatever it is, a later look may succeed
                logger.exception("the file of API keys can't be looked at")

    def refresh(self) -> None:
        """Read the file if it has changed. If it can't be used, keep the keys that were there, and log why.

        So it is with a file that has vanished, too: a file that is being replaced, or whose disk is away, must not
        lock everybody out. To refuse everybody, remove the file's keys.
        """
        if self._path is None or (stamp := _stamp(self._path)) == self._stamp:
            return
        self._stamp = stamp
        try:
            self._ring = self._read()
        except KeyFileError as error:
            self.fault = str(error)
            logger.error("the API keys stay as they were: %s", error)
        else:
            self.fault = ""
            logger.info("read %d API keys", len(self._ring))

    def _read(self) -> KeyRing:
        of_file = () if self._path is None else keys_of_file(read_key_file(self._path))
        return KeyRing((*of_file, *self._fixed))


def new_key() -> str:
    """A key that nobody can guess."""
    return _PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def digest_of(key: str) -> bytes:
    """SHA-256. Keys are long and random, so that it needs no salt and may be fast."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def keys_of_file(file: KeyFile) -> tuple[Key, ...]:
    """The keys, each with what its tenant has."""
    return tuple(_key(document, file.tenants.get(document.tenant or document.name)) for document in file.keys)


def _key(document: KeyDocument, tenant: TenantDocument | None) -> Key:
    tenant = tenant or TenantDocument()
    caller = Caller(
        name=document.name,
        tenant=document.tenant or document.name,
        admin=document.admin,
        models=None if document.models is None else frozenset(document.models),
        priorities=frozenset(Priority if document.priorities is None else map(Priority, document.priorities)),
        limits=Limits(**document.limits.model_dump()),
        tenant_limits=Limits(**tenant.limits.model_dump()),
        weight=tenant.weight,
    )
    expires_at = None if document.expires is None else document.expires.timestamp()
    return Key(bytes.fromhex(document.sha256), caller, expires_at)


def keys_of_environment(text: str) -> tuple[Key, ...]:
    """The keys in the environment variable. Raises `KeyFileError`, which repeats none of them."""
    keys = []
    for number, entry in enumerate(text.replace(",", " ").split(), 1):
        named = _WRITTEN.fullmatch(entry)
        name, key = (named[1], named[2]) if named else (DEFAULT_NAME, entry)
        if len(key) < LEAST_CHARACTERS or not _KEY.fullmatch(key):
            raise KeyFileError(
                f"key {number} in {VARIABLE} must have at least {LEAST_CHARACTERS} characters of ASCII; "
                "`serve-app keys create` makes a good one"
            )
        keys.append(Key(digest_of(key), Caller(name=name, tenant=name, limits=NO_LIMITS)))
    return tuple(keys)


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Differs when the file has been replaced or written; None when it can't be looked at."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_dev
