"""A real ASAP agent for the daemon to probe: an HTTP server on a thread of its own."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

BASE = "urn:asap:agent:"


class Agent:
    """Answers health and manifest until it is killed; what it says may be changed at any time."""

    def __init__(self, name: str, sla: dict[str, Any] | None = None) -> None:
        self.urn = BASE + name
        self.health: dict[str, Any] = {"status": "healthy", "agent_id": self.urn, "version": "1", "asap_version": "0.1"}
        self.manifest: dict[str, Any] = {"id": self.urn, "name": name, "version": "1", "sla": sla, "ttl_seconds": 300}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        agent = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                documents = {
                    "/.well-known/asap/health": agent.health,
                    "/.well-known/asap/manifest.json": agent.manifest,
                }
                found = documents.get(self.path)
                body = json.dumps(found).encode()
                self.send_response(404 if found is None else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- the base class's name
                pass

        return Handler

    def kill(self) -> None:
        """Stop answering: connections are refused from now on."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self.kill()
