"""One pool of connections to TorchServe: aiohttp's, behind httpx's transport interface.

httpx's own pool collapses under concurrency, and the `httpx-aiohttp` package streams every
answer and reports every lost connection as a ConnectTimeout. Answers here are small and always wanted whole, so this
reads them at once.
"""

from __future__ import annotations

import io

import aiohttp
import httpx

# aiohttp adds these unasked; TorchServe reads every header with four system calls.
UNWANTED_HEADERS = ("accept", "accept-encoding", "user-agent")
# Above it aiohttp wants a file, to write piece by piece instead of blocking the loop.
LARGE_BODY_BYTES = 1024 * 1024
IDLE_S = 60

# What aiohttp's errors are in httpx's words; the nearest class above an error decides.
ERRORS: dict[type[BaseException], type[httpx.TransportError]] = {
    aiohttp.ClientConnectorError: httpx.ConnectError,
    aiohttp.ClientConnectionError: httpx.ReadError,
    aiohttp.ClientPayloadError: httpx.ReadError,
    aiohttp.ClientError: httpx.RemoteProtocolError,
}


class PooledTransport(httpx.AsyncBaseTransport):
    """Sends requests over kept connections and gives answers whole. It has no timeouts: the caller has a deadline."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """The answer to `request`.

        Raises:
            httpx.TransportError: there is none.
        """
        body = request.content
        try:
            async with self._open_session().request(
                request.method,
                str(request.url),
                headers=[(name.decode("ascii"), value.decode("ascii")) for name, value in request.headers.raw],
                data=io.BytesIO(body) if len(body) > LARGE_BODY_BYTES else body,
                allow_redirects=False,
            ) as response:
                content = await response.read()
        except aiohttp.ClientError as error:
            kind = next(ERRORS[base] for base in type(error).__mro__ if base in ERRORS)
            raise kind(type(error).__name__, request=request) from error
        return httpx.Response(response.status, content=content, request=request)

    async def aclose(self) -> None:
        """Closes the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _open_session(self) -> aiohttp.ClientSession:
        # Not in the constructor: a session belongs to the event loop in which it is made.
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # Admission bounds the calls in flight; a second bound here would only queue what was admitted.
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=UNWANTED_HEADERS,
                timeout=aiohttp.ClientTimeout(total=None),
                auto_decompress=False,
            )
        return self._session
