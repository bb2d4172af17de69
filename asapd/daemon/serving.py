"""Serving: the HTTP server, the fast lane and the ingest socket, from the first connection to the last."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path

import trio

from asapd import config
from asapd.daemon.doors import Doors
from asapd.edge.connection import Limits, SocketTransport
from asapd.edge.fastlane import FastLane
from asapd.edge.http.app import create_app
from asapd.edge.ingest import run_ingest
from asapd.edge.large_bodies import LargeBodies
from asapd.edge.reporting import post_frame
from asapd.edge.serve import Door, HttpServer
from asapd.edge.services import Services
from asapd.edge.sockets import Peer
from asapd.runtime.room import Room
from asapd.wire.frames import MAX_FRAME_BYTES

GRACE_S = 5.0


class Serving:
    """What stands behind the doors while they are open."""

    def __init__(
        self,
        settings: config.Config,
        runtime_dir: Path,
        environ: Mapping[str, str],
        max_connections: int,
        log: logging.Logger,
    ) -> None:
        self._max_body_bytes = settings.http.max_body_bytes
        self._max_connections = max_connections
        # Reports may wait for reports, and exports for exports, which are larger and come more slowly.
        exports_bytes = settings.limits.max_buffered_bytes // 2
        self._exports = Room(max(1, exports_bytes))
        self._room = Room(settings.limits.max_buffered_bytes - exports_bytes)
        self._log = log
        self._doors = Doors(settings, runtime_dir, environ)
        self._server: HttpServer | None = None

    @property
    def addresses(self) -> list[str]:
        """Of every door that is open."""
        return self._doors.addresses

    @property
    def pages(self) -> list[str]:
        """Of the HTTP door."""
        return self._doors.pages

    @property
    def server(self) -> HttpServer:
        """The HTTP server, which is there once the doors are opened."""
        assert self._server is not None, "the doors are opened after the server is made"
        return self._server

    @contextlib.asynccontextmanager
    async def open(self, services: Services) -> AsyncIterator[None]:
        """Serve inside the context; at its end no connection is accepted any more, and those there are may end.

        Raises:
            CannotListen: with what to do.
        """
        limits = Limits(max_body_bytes=self._max_body_bytes)
        self._server = server = HttpServer(
            create_app(services, self._log.getChild("http")),
            max_connections=self._max_connections,
            limits=limits,
            grace_s=GRACE_S,
            large_bodies=LargeBodies(lambda: services.settings().metering.otlp.max_body_bytes, self._exports),
            log=self._log.getChild("http"),
        )
        with contextlib.closing(self._doors):
            ingest = await self._doors.open()
            lane = self._fast_lane(services, server, limits)
            async with trio.open_nursery() as doors:
                served = await doors.start(_serve_http, server, self._doors.http)
                scopes = [
                    await doors.start(_serve, self._ingest(ingest, services, lane)),
                    await doors.start(_serve, self._lane(lane)),
                ]
                yield
                server.stop()
                for scope in scopes:
                    scope.cancel()
                with trio.move_on_after(GRACE_S + 3):
                    await served.wait()
                doors.cancel_scope.cancel()

    def _fast_lane(self, services: Services, server: HttpServer, limits: Limits) -> FastLane:
        async def hand_over(stream: SocketTransport, peer: Peer | None) -> None:
            if peer is None:
                await server.serve_connection(stream, door="lane")
            else:
                await server.serve_connection(stream, door="ingest", annotations={"peer": peer})

        return FastLane(services, hand_over, room=self._room, log=self._log.getChild("lane"), limits=limits)

    def _ingest(
        self, listener: trio.SocketListener, services: Services, lane: FastLane
    ) -> Callable[..., Awaitable[None]]:
        async def take(body: bytes, peer: Peer, answer: Callable[[bytes], None]) -> None:
            await post_frame(services, services.ingest_caller(peer), body, answer)

        return partial(
            run_ingest,
            listener,
            take,
            max_frame_bytes=min(self._max_body_bytes, MAX_FRAME_BYTES),
            max_connections=self._max_connections,
            room=self._room,
            log=self._log.getChild("ingest"),
            http=lane.serve,
            grace_s=GRACE_S,
        )

    def _lane(self, lane: FastLane) -> Callable[..., Awaitable[None]]:
        return partial(lane.run, self._doors.lane, max_connections=self._max_connections, grace_s=GRACE_S)


async def _serve_http(server: HttpServer, doors: list[Door], *, task_status: trio.TaskStatus[trio.Event]) -> None:
    """Run the server; the event it reports is set once every connection is closed."""
    served = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run, doors)
        task_status.started(served)
    served.set()


async def _serve(run: Callable[..., Awaitable[None]], *, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
    """Run what listens; the scope it reports ends it."""
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            await nursery.start(run)
            task_status.started(scope)
