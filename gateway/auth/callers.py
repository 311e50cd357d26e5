"""Callers, their API keys, scopes and quotas: checked before a body is read."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import math
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from limits import RateLimitItem, parse
from limits.aio.storage.redis.redispy import RedispyBridge
from limits.storage import storage_from_string

from contracts.watched_file import WatchedFile
from gateway.auth import keys
from gateway.refusals import KeyExpired, KeyMissing, KeyUnknown, ModelForbidden, QuotaExceeded, ScopeMissing
from gateway.request_context import Caller, Quota
from gateway.settings import SettingsError
from gateway.settings_docs import mask_passwords

if TYPE_CHECKING:
    from pathlib import Path

    from limits.aio.storage import Storage
    from starlette.requests import Request

    from gateway.settings import Settings

logger = logging.getLogger(__name__)
STORE_TIMEOUT_S = 0.25
STORE_PAUSE_S = 5.0  # after a failure of the store quotas are not counted for so long: each try delays a call
TIDY_S = 5.0


class Callers:
    """The keys and quotas of one gateway process.

    Quotas have fixed windows, the cheapest of the library's strategies, which is exact over each window. The library's
    store counts them without its strategy class, which would need a second round trip to report what is left.

    With `waits_for_file` an unusable key file is no error: its keys are unknown until the file can be used.

    Raises:
        SettingsError: the keys, the quotas or the store cannot be used.
    """

    def __init__(self, settings: Settings, *, waits_for_file: bool = False) -> None:
        self._asks = settings.asks_for_keys
        try:
            self._fixed_keys = keys.check_names(keys.parse_entry(entry) for entry in settings.keys)
        except keys.KeyFileError as error:
            raise SettingsError(f"GATEWAY_KEYS: {error}") from error
        self._file: WatchedFile[tuple[keys.Key, ...]] | None = None
        if self._asks and settings.keys_file is not None:
            missing = "it does not exist, `gradserve keys` makes it"
            self._file = WatchedFile(settings.keys_file, self._load, missing=missing)
            self.refresh_keys()
            if self._file.error is not None and not waits_for_file:
                raise SettingsError(f"GATEWAY_KEYS_FILE={settings.keys_file} cannot be used: {self._file.error}")
        self._per_key = parse_quota("GATEWAY_RATE_PER_KEY", settings.rate_per_key)
        self._per_address = parse_quota("GATEWAY_RATE_PER_ADDRESS", settings.rate_per_address)
        # A key with a quota of its own may be added at any time.
        has_quotas = self._asks or self._per_key or self._per_address
        self._storage = _storage(settings.rate_store) if has_quotas else None
        self._store_paused_until = 0.0

    def refresh_keys(self) -> None:
        """Re-read the key file if it has changed; an unusable file leaves the keys as they are."""
        if self._file is not None and self._file.refresh() and self._file.error is not None:
            logger.error("key file not used, the keys are unchanged: %s", self._file.error)

    @property
    def _keys(self) -> tuple[keys.Key, ...]:
        """All known keys."""
        return self._fixed_keys if self._file is None or self._file.content is None else self._file.content

    def _load(self, path: Path) -> tuple[keys.Key, ...]:
        return keys.check_names((*self._fixed_keys, *keys.load_keys(path)))

    async def admit(self, request: Request, scope: str, default_model: str | None = None) -> None:
        """Admit the call, and put the caller into `request.state.caller`, also if it is refused.

        A call that names no model is one to `default_model`, or to none.

        Raises:
            KeyMissing, KeyUnknown, KeyExpired: the request has no valid key.
            ScopeMissing: the key lacks `scope`.
            ModelForbidden: the key is limited to other models.
            QuotaExceeded: the caller's quota is used up.
        """
        request.state.caller = Caller(address_of(request))
        if self._per_address is not None:
            await self._spend(request, self._per_address, "address", address_of(request))
        if not self._asks:
            return
        key = self._find(presented_key(request))
        request.state.caller = request.state.caller._replace(
            client=key.name, name=key.name, key=key.id, models=key.models
        )
        if key.is_expired():
            raise KeyExpired(key.expires)
        if scope not in key.scopes:
            raise ScopeMissing(scope)
        if key.models:
            asked = request.path_params.get("model") or request.query_params.get("model") or default_model
            check_may_call(request.state.caller, asked)
        quota = _own_quota(key.quota) if key.quota else self._per_key
        if quota is not None:
            await self._spend(request, quota, "key", key.name)

    def client_of(self, request: Request) -> str | None:
        """Return the name or address that a call's places count for; None if its key is missing or unknown."""
        if not self._asks:
            return address_of(request)
        try:
            return self._find(presented_key(request)).name
        except (KeyMissing, KeyUnknown):
            return None

    async def close(self) -> None:
        """Close the connections to the quotas' store; the library has no method for it."""
        bridge = getattr(self._storage, "bridge", None)
        if isinstance(bridge, RedispyBridge):
            await bridge.storage.aclose()

    def _find(self, secret: str) -> keys.Key:
        presented = keys.digest(secret)
        found = None
        for key in self._keys:  # always all of them, so that the time does not depend on the key
            if hmac.compare_digest(key.sha256, presented):
                found = key
        if found is None:
            raise KeyUnknown
        return found

    async def _spend(self, request: Request, quota: RateLimitItem, kind: str, who: str) -> None:
        storage = self._storage
        if storage is None or time.monotonic() < self._store_paused_until:
            return
        name = quota.key_for(kind, who)
        try:
            count = await storage.incr(name, quota.get_expiry())
            ends = await storage.get_expiry(name)
        except Exception as error:  # noqa: BLE001 — the stores' clients have no common base class
            # Without its store the gateway serves all calls.
            if time.monotonic() >= self._store_paused_until:  # only the first of the calls that waited together logs it
                logger.warning("quotas are not counted for %g s: %s", STORE_PAUSE_S, type(error).__name__)
            self._store_paused_until = time.monotonic() + STORE_PAUSE_S
            return
        left_s = max(1, math.ceil(ends - time.time()))
        spent = Quota(kind, quota.amount, quota.get_expiry(), max(0, quota.amount - count), left_s)
        caller: Caller = request.state.caller
        request.state.caller = caller._replace(quotas=(*caller.quotas, spent))
        if count > quota.amount:
            raise QuotaExceeded(str(quota), left_s)


def check_may_call(caller: Caller, model: str | None) -> None:
    """Refuse a call to a model if the caller's key is limited to others.

    Raises:
        ModelForbidden: the key is limited to other models.
    """
    if caller.models and model is not None and model not in caller.models:
        raise ModelForbidden(model, caller.models)


def presented_key(request: Request) -> str:
    """Return the secret in `Authorization: Bearer` or `x-api-key`.

    Raises:
        KeyMissing: the request has neither header.
    """
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    secret = token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
    if not secret:
        raise KeyMissing
    return secret


def address_of(request: Request) -> str:
    """Return the address that quotas count by: the client's IPv4 address, or the /64 network of its IPv6 address."""
    return _caller_address(request.client.host if request.client else "unknown")


@lru_cache(maxsize=1024)
def _caller_address(host: str) -> str:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 4:
        return host
    if address.ipv4_mapped is not None:  # a socket for both families names an IPv4 client so
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


def parse_quota(name: str, quota: str) -> RateLimitItem | None:
    """Parse the quota of the setting `name`; None if it is empty.

    Raises:
        SettingsError: `quota` is no quota.
    """
    if not quota:
        return None
    try:
        item = parse(quota)
    except ValueError as error:
        raise SettingsError(f"{name}={quota!r} is no quota: write like 600/minute") from error
    if item.amount < 1:
        raise SettingsError(f"{name}={quota!r} allows no call: write like 600/minute")
    return item


class MemoryWindows:
    """Counts calls in fixed windows, in memory.

    The library's own store walks over all callers after each call: with 50,000 callers it blocks the event loop for 11
    ms.
    """

    def __init__(self) -> None:
        self._windows: dict[str, tuple[int, float]] = {}  # the calls so far, and the end in Unix time
        self._tidied_at = 0.0

    def __len__(self) -> int:
        """Return the number of windows that are held."""
        return len(self._windows)

    async def incr(self, name: str, expiry: float) -> int:
        """Count a call and return the calls in the window; a new window lasts `expiry` seconds."""
        now = time.time()
        if abs(now - self._tidied_at) > TIDY_S:
            self._tidied_at = now
            self._windows = {each: window for each, window in self._windows.items() if window[1] > now}
        count, ends = self._windows.get(name, (0, 0.0))
        if ends <= now:
            count, ends = 0, now + expiry
        self._windows[name] = (count + 1, ends)
        return count + 1

    async def get_expiry(self, name: str) -> float:
        """Return the end of the window in Unix time."""
        return self._windows[name][1] if name in self._windows else time.time()


@lru_cache(maxsize=1024)
def _own_quota(quota: str) -> RateLimitItem:
    """Parse a key's own quota; gateway/auth/keys.py has checked its form."""
    return parse(quota)


def _storage(store: str) -> Storage | MemoryWindows:
    if store.startswith("memory:"):
        return MemoryWindows()
    options: dict[str, Any] = {
        "implementation": "redispy",
        "socket_timeout": STORE_TIMEOUT_S,
        "socket_connect_timeout": STORE_TIMEOUT_S,
    }
    try:
        storage: Storage = storage_from_string(f"async+{store}", **options)  # type: ignore[assignment]
    except Exception as error:
        # The library's message repeats the address.
        raise SettingsError(mask_passwords(f"GATEWAY_RATE_STORE={store} cannot be used: {error}")) from error
    return storage
