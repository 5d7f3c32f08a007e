"""One client for the web: every request has a deadline, every body a limit, and nothing is kept that was not counted first.

It lives in a thread of its own, so that whoever waits can stop waiting.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import importlib.metadata
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

from difffeat.runtime.http_coding import decoder
from difffeat.runtime.http_url import host_of, redirected, sendable
from difffeat.runtime.patience import MIN_RATE, current_stop
from difffeat.runtime.remote_errors import Refused, TooLong, Unreadable, seconds_until

T = TypeVar("T")

REDIRECTS = 10
UNSTATED = 256 << 20
"""Bytes of a body whose length is not stated, or whose coding may make it grow, that are held in memory at most."""
SPOOLED = 8 << 30
"""Bytes, at most, of a file that is kept in a temporary one because its server sends no ranges and states no length."""
_REDIRECT = (301, 302, 303, 307, 308)
_RANGE = re.compile(r"bytes\s+(?:(\d+)-(\d+)|\*)/(\d+|\*)", re.IGNORECASE)


class NoRanges(Exception):
    """The server sends the whole body whatever part is asked for; `size` where it states it."""

    def __init__(self, size: int | None) -> None:
        super().__init__("the server sends no ranges")
        self.size = size


@dataclass(frozen=True)
class _Deadline:
    """Of one attempt: it moves on with the bytes that come."""

    timeout: asyncio.Timeout
    end: float

    def received(self, count: int) -> None:
        self.timeout.reschedule(self.end + count / MIN_RATE)


class HttpClient:
    """Blocking calls, to be made from any thread; each raises Stopped when the thread's wait is ended, TimeoutError after `seconds` without enough
    bytes, Refused, TooLong, Unreadable, and what aiohttp raises.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._session: Any = None
        threading.Thread(target=self._loop.run_forever, name="http", daemon=True).start()

    def whole(self, url: str, limit: int, seconds: float) -> bytes:
        """The whole body. Raises TooLong beyond `limit`, or `UNSTATED` where its length is not stated."""
        return self._run(self._whole(url, limit, seconds))

    def part(self, url: str, start: int, end: int, seconds: float) -> bytes:
        """Bytes `start` to `end` (exclusive), fewer where a server gives fewer. Raises NoRanges."""
        return self._run(self._part(url, start, end, seconds))

    def size(self, url: str, seconds: float) -> int:
        """Bytes of the body, by a request for the first of them: HEAD is refused by presigned addresses. Raises NoRanges."""
        return self._run(self._size(url, seconds))

    def spool(self, url: str, seconds: float) -> BinaryIO:
        """The whole body in a temporary file that has no name."""
        file: BinaryIO = tempfile.TemporaryFile(prefix="difffeat-")  # noqa: SIM115  handed on
        try:
            self._run(self._into(url, file, seconds))
        except BaseException:
            file.close()
            raise
        return file

    def close(self) -> None:
        """End the session, as far as that takes no time."""
        if self._session is not None:
            with suppress(Exception):
                asyncio.run_coroutine_threadsafe(self._session.close(), self._loop).result(0.2)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return current_stop().result(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def _whole(self, url: str, limit: int, seconds: float) -> bytes:
        async with self._get(url, {}, seconds) as (reply, deadline):
            _require_body(reply)
            stated = _stated(reply)
            if stated is not None and stated > limit:
                raise TooLong(f"it has {stated} bytes, more than the limit of {limit}")
            body = await _collect(reply, deadline, limit if stated is not None else min(limit, UNSTATED))
            first, total = _range_of(reply) if reply.status == 206 and not _coded(reply) else (0, None)
        if first != 0:
            raise Unreadable(f"the server sends a part that begins at byte {first}, and the whole was asked for")
        if total is not None and total > limit:
            raise TooLong(f"it has {total} bytes, more than the limit of {limit}")
        while total is not None and len(body) < total:  # a server that gives nothing but parts
            try:
                more = await self._part(url, len(body), total, seconds)
            except NoRanges:
                more = b""
            if not more:
                raise Unreadable(f"it has {total} bytes, and the server sends no more than {len(body)}")
            body += more
        return bytes(body)

    async def _part(self, url: str, start: int, end: int, seconds: float) -> bytes:
        async with self._get(url, {"Range": f"bytes={start}-{end - 1}"}, seconds, also=(416,)) as (reply, deadline):
            if reply.status == 416:
                if (total := _range_of(reply)[1]) is not None and start >= total:
                    return b""
                raise NoRanges(None)
            if reply.status == 206:
                first, _ = _range_of(reply)
                if _coded(reply):
                    raise NoRanges(None)  # a part of a coded body cannot be decoded
                if first is not None and first != start:
                    raise Unreadable(f"asked for bytes {start} to {end}, the server sends those from {first} on")
                return bytes(await _collect(reply, deadline, end - start))[: end - start]
            _require_body(reply)
            raise NoRanges(_stated(reply))  # 200, or 206 of a size that nobody knows

    async def _size(self, url: str, seconds: float) -> int:
        async with self._get(url, {"Range": "bytes=0-0"}, seconds, also=(416,)) as (reply, _):
            first, total = _range_of(reply)
            if reply.status == 416:
                if total == 0:
                    return 0
                raise NoRanges(None)  # whatever part is asked for
            if reply.status == 206 and total is not None and first == 0 and not _coded(reply):
                return total
            _require_body(reply)
            raise NoRanges(_stated(reply))

    async def _into(self, url: str, file: BinaryIO, seconds: float) -> None:
        async with self._get(url, {}, seconds) as (reply, deadline):
            _require_body(reply)
            stated, count = _stated(reply), 0
            async for piece in _pieces(reply, deadline):
                count += len(piece)
                if stated is None and count > SPOOLED:
                    raise TooLong(f"it has more than {SPOOLED} bytes, the limit for a file whose length is not stated")
                file.write(piece)

    @asynccontextmanager
    async def _get(self, url: str, headers: dict[str, str], seconds: float, also: tuple[int, ...] = ()) -> AsyncIterator[tuple[Any, _Deadline]]:
        """The reply at the end of all redirects. Raises Refused for any but success and the statuses in `also`."""
        try:
            async with asyncio.timeout(seconds) as timeout:
                end = asyncio.get_running_loop().time() + seconds
                async with await self._followed(sendable(url), headers) as reply:
                    if not 200 <= reply.status < 300 and reply.status not in also:
                        raise Refused(reply.status, reply.reason or "", seconds_until(reply.headers.get("Retry-After"), time.time()))
                    yield reply, _Deadline(timeout, end)
        except TimeoutError:
            raise TimeoutError(f"no answer, or too little of it, within {seconds:.3g} s") from None

    async def _followed(self, url: str, headers: dict[str, str]) -> Any:
        import yarl

        session, first = await self._opened(), host_of(url)
        for _ in range(REDIRECTS + 1):
            address = yarl.URL(url, encoded=True)
            reply = await session.get(address, headers={"Accept-Encoding": "identity", **headers}, allow_redirects=False)
            location = reply.headers.get("Location")
            if reply.status not in _REDIRECT or location is None:
                return reply
            reply.release()
            user = url.partition("://")[2].partition("/")[0].rpartition("@")[0]
            url = redirected(url, location)
            if user and host_of(url) == first and "@" not in url.partition("://")[2].partition("/")[0]:
                url = url.replace("://", f"://{user}@", 1)
        raise Unreadable(f"it redirects more than {REDIRECTS} times")

    async def _opened(self) -> Any:
        """The session; what users set for fsspec's web client (headers, auth, trust_env) holds here too."""
        if self._session is None:
            import aiohttp
            from fsspec.config import conf

            options = {**conf.get("http", {}), **conf.get("https", {})}.get("client_kwargs", {})
            version = importlib.metadata.version("difffeat")
            ours = {"headers": {"User-Agent": f"difffeat/{version} aiohttp/{aiohttp.__version__}"}, "cookie_jar": aiohttp.DummyCookieJar()}
            connector = aiohttp.TCPConnector(limit=0, resolver=_resolver())
            self._session = aiohttp.ClientSession(
                **{**ours, **options, "connector": connector, "timeout": aiohttp.ClientTimeout(None), "auto_decompress": False}
            )
        return self._session


def _range_of(reply: Any) -> tuple[int | None, int | None]:
    """First byte and total of `Content-Range`; None for what it does not say."""
    match = _RANGE.fullmatch(reply.headers.get("Content-Range", "").strip())
    if match is None:
        return None, None
    return (None if match[1] is None else int(match[1])), (None if match[3] == "*" else int(match[3]))


def _stated(reply: Any) -> int | None:
    """The length that a body will have; None where it is not stated, or only before its coding is undone."""
    return None if _coded(reply) else reply.content_length


def _coded(reply: Any) -> bool:
    return reply.headers.get("Content-Encoding", "").strip().lower() not in ("", "identity")


def _require_body(reply: Any) -> None:
    if reply.status in (204, 205):
        raise Refused(reply.status, f"{reply.reason or 'No Content'}: there is nothing at this address")


async def _pieces(reply: Any, deadline: _Deadline) -> AsyncIterator[bytes]:
    """The body as it comes, its coding undone. Raises Unreadable."""
    coding, received = decoder(reply.headers.get("Content-Encoding", "")), 0
    async for data in reply.content.iter_any():
        received += len(data)
        deadline.received(received)
        for piece in coding.feed(data):
            yield piece
            await asyncio.sleep(0)
    coding.close()


async def _collect(reply: Any, deadline: _Deadline, limit: int) -> bytearray:
    body = bytearray()
    async for piece in _pieces(reply, deadline):
        body += piece
        if len(body) > limit:
            body.clear()  # the error's traceback holds this frame
            raise TooLong(f"it has more than {limit} bytes, the limit")
    return body


def _resolver() -> Any:
    """Names to addresses in threads that nobody waits for at the end: the system's call knows no deadline."""
    from aiohttp.abc import AbstractResolver

    class Resolver(AbstractResolver):
        async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_INET) -> Any:
            loop = asyncio.get_running_loop()
            found = await _in_daemon(loop, lambda: socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG))
            return [
                {"hostname": host, "host": address[0], "port": address[1], "family": kind, "proto": proto, "flags": socket.AI_NUMERICHOST}
                for kind, _, proto, _, address in found
            ]

        async def close(self) -> None:
            return

    return Resolver()


async def _in_daemon(loop: asyncio.AbstractEventLoop, action: Callable[[], T]) -> T:
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if not future.done():
            future.set_result(result) if error is None else future.set_exception(error)

    def work() -> None:
        result, failed = None, None
        try:
            result = action()
        except BaseException as error:
            failed = error
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, result, failed)

    threading.Thread(target=work, name="resolve", daemon=True).start()
    return await future


def http_client() -> HttpClient:
    """The client of this process."""
    with _MAKING:
        return _client(os.getpid())


_MAKING = threading.Lock()


@functools.lru_cache(maxsize=1)
def _client(process: int) -> HttpClient:
    client = HttpClient()
    atexit.register(client.close)
    return client
