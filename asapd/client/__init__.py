"""The client: reports usage to asapd from any Python program, with nothing but the standard library.

`Meter` for threads, `AsyncMeter` for asyncio and Trio, `AsgiMiddleware` and `WsgiMiddleware` for web applications.
"""

from asapd.client.asgi import AsgiMiddleware
from asapd.client.async_meter import AsyncMeter
from asapd.client.delegation import Allowed, Authorization, Denied, Estimate, Unavailable
from asapd.client.event import Details
from asapd.client.meter import Meter
from asapd.client.middleware import Rules
from asapd.client.stats import Stats
from asapd.client.task import Task, current_task
from asapd.client.wsgi import WsgiMiddleware

__all__ = [
    "Allowed",
    "AsgiMiddleware",
    "AsyncMeter",
    "Authorization",
    "Denied",
    "Details",
    "Estimate",
    "Meter",
    "Rules",
    "Stats",
    "Task",
    "Unavailable",
    "WsgiMiddleware",
    "current_task",
]
