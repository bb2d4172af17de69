"""asapd: the host daemon of the ASAP protocol's observability and economics layer."""

from importlib.metadata import version

__version__ = version("asapd")
