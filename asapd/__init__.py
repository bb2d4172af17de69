"""asapd: the host daemon of the ASAP protocol's observability and economics layer."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("asapd")
except PackageNotFoundError:  # files that nobody installed, from which the client is imported all the same
    __version__ = "unknown"
