"""How single values are written in the file: durations, sizes, percentages, money, addresses, names.

Each `read_*` takes whatever TOML gave and returns the inner form, or raises ValueError with a reason
in plain words that names what to write instead.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from decimal import Decimal
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from asapd.core.masking import why_not
from asapd.core.money import MoneyError, parse_usd
from asapd.core.rates import Rate
from asapd.core.support_hours import HoursError, parse_hours
from asapd.core.types import AGENT_URN, DAY_US, HOUR_US, MINUTE_US, SECOND_US

MILLISECOND_US = 1_000
MAX_DURATION_US = 36_500 * DAY_US
MAX_SIZE_BYTES = 2**40
MAX_RATE = 1_000_000

_UNITS_US = {
    "us": 1,
    "ms": MILLISECOND_US,
    "s": SECOND_US,
    "m": MINUTE_US,
    "h": HOUR_US,
    "d": DAY_US,
    "w": 7 * DAY_US,
}
_UNITS_BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_DURATION = re.compile(r"([0-9]{1,16})(us|ms|s|m|h|d|w)\Z")
_SIZE = re.compile(r"([0-9]{1,12}) ?(B|kB|MB|GB|KiB|MiB|GiB)\Z")
_RATE = re.compile(r"([0-9]{1,7})/(s|m|h)\Z")
_PERCENT = re.compile(r"[0-9]{1,3}(\.[0-9]{1,6})?%\Z")
_MODE = re.compile(r"0?[0-7]{3}\Z")
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?\Z")
_PEM = re.compile(r"-----BEGIN PUBLIC KEY-----\s+([A-Za-z0-9+/=\s]+)-----END PUBLIC KEY-----\s*\Z")
# RFC 8410: the DER of every Ed25519 SubjectPublicKeyInfo starts so and goes on with the 32 bytes.
_SPKI_ED25519 = bytes.fromhex("302a300506032b6570032100")
_URN_PREFIX = "urn:asap:agent:"


class Bind(msgspec.Struct, frozen=True):
    """An address to listen on: `tcp` has host and port, `unix` a path, `fd` an inherited descriptor."""

    kind: Literal["tcp", "unix", "fd"]
    host: str = ""
    port: int = 0
    path: Path | None = None
    fd: int = -1

    @property
    def text(self) -> str:
        """As written in the file and as Hypercorn takes it: `127.0.0.1:8727`, `unix:/path`, `fd://3`."""
        if self.kind == "unix":
            return f"unix:{self.path}"
        if self.kind == "fd":
            return f"fd://{self.fd}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """Whether only this host can reach it, as far as the text tells; an inherited descriptor counts as local."""
        if self.kind != "tcp" or self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False


def duration_text(us: int) -> str:
    """The shortest way to write a duration; whole days below two stay in hours: 24h, 7d, 90s, 250ms."""
    if us == 0:
        return "0s"
    for unit, unit_us in (("d", DAY_US), ("h", HOUR_US), ("m", MINUTE_US), ("s", SECOND_US), ("ms", MILLISECOND_US)):
        if us % unit_us == 0 and (unit != "d" or us >= 2 * DAY_US):
            return f"{us // unit_us}{unit}"
    return f"{us}us"


def size_text(size_bytes: int) -> str:
    """The shortest way to write a size: 8MiB, 1500B."""
    unit = max(
        (unit for unit, unit_bytes in _UNITS_BYTES.items() if size_bytes % unit_bytes == 0),
        key=lambda unit: _UNITS_BYTES[unit],
    )
    return f"{size_bytes // _UNITS_BYTES[unit]}{unit}"


def rate_text(rate: Rate) -> str:
    """As `read_rate` takes it."""
    return f"{rate.count}/{next(unit for unit in 'smh' if _UNITS_US[unit] == rate.period_us)}"


def read_duration(value: object) -> int:
    """`"30s"` to microseconds; units us, ms, s, m, h, d, w."""
    if not isinstance(value, str):
        raise ValueError('must be a duration in quotes with a unit, such as "30s" or "5m"')
    found = _DURATION.match(value)
    if found is None:
        raise ValueError(f'must be a duration such as "250ms", "30s", "5m", "1h" or "7d", not {shown(value)}')
    us = int(found[1]) * _UNITS_US[found[2]]
    if us > MAX_DURATION_US:
        raise ValueError("must be at most 36500d, a hundred years")
    return us


def duration_between(least_us: int, most_us: int = MAX_DURATION_US) -> Callable[[object], int]:
    """A `read_duration` with bounds, both included."""

    def read(value: object) -> int:
        us = read_duration(value)
        if us < least_us:
            raise ValueError(f"must be at least {duration_text(least_us)}, not {shown(value)}")
        if us > most_us:
            raise ValueError(f"must be at most {duration_text(most_us)}, not {shown(value)}")
        return us

    return read


def read_duration_or_forever(value: object) -> int | None:
    """A duration of at least a second, or `"forever"`, which is None."""
    if value == "forever":
        return None
    try:
        return duration_between(SECOND_US)(value)
    except ValueError as error:
        raise ValueError(f'{error}; or "forever"') from None


def read_size(value: object) -> int:
    """`"8MiB"` to bytes, at least one."""
    if not isinstance(value, str):
        raise ValueError('must be a size in quotes with a unit, such as "8MiB"')
    found = _SIZE.match(value)
    if found is None:
        raise ValueError(f'must be a size such as "512KiB", "8MiB" or "1GiB", not {shown(value)}')
    size = int(found[1]) * _UNITS_BYTES[found[2]]
    if not 1 <= size <= MAX_SIZE_BYTES:
        raise ValueError("must be between 1B and 1024GiB")
    return size


def read_rate(value: object) -> Rate:
    """`"100/s"` to so many in so long; a second, a minute or an hour."""
    found = _RATE.match(value) if isinstance(value, str) else None
    if found is None or not 1 <= int(found[1]) <= MAX_RATE:
        raise ValueError(f'must be a rate in quotes, from "1/h" to "{MAX_RATE}/s", such as "100/s" or "600/m"')
    return Rate(int(found[1]), _UNITS_US[found[2]])


def read_percent(value: object) -> Decimal:
    """`"99.5%"` to the exact number before the sign, 0 to 100, at most six decimals."""
    if not isinstance(value, str):
        raise ValueError('must be a percentage in quotes, such as "99.5%"')
    if _PERCENT.match(value) is None or (percent := Decimal(value[:-1])) > 100:
        raise ValueError(
            f'must be a percentage from "0%" to "100%" with at most six decimals, such as "99.5%", not {shown(value)}'
        )
    return percent


def read_usd(value: object) -> int:
    """An amount of USD, as a number or as text, to micro-USD."""
    if not isinstance(value, int | str | Decimal | float):
        raise ValueError('must be an amount of USD such as 0.25 or "0.25"')
    try:
        return parse_usd(value)
    except MoneyError as error:
        raise ValueError(str(error)) from None


def read_mode(value: object) -> int:
    """`"0660"` to the permission bits."""
    if not isinstance(value, str) or _MODE.match(value) is None:
        raise ValueError('must be a file mode as octal digits in quotes, such as "0660"')
    return int(value, 8)


def read_path(value: object) -> Path:
    """A file path as text; relative ones are resolved later, against the configuration file's directory."""
    if not isinstance(value, str):
        raise ValueError("must be a path in quotes")
    if not value or "\0" in value:
        raise ValueError("must be a path, not empty and without NUL characters")
    return Path(value)


def read_bind(value: object) -> Bind:
    """`HOST:PORT`, `[IPv6]:PORT`, `unix:/path` or `fd://N`."""
    if not isinstance(value, str):
        raise ValueError('must be an address in quotes, such as "127.0.0.1:8727"')
    if value.startswith("unix:"):
        return Bind("unix", path=read_path(value.removeprefix("unix:")))
    if value.startswith("fd://"):
        number = value.removeprefix("fd://")
        if re.fullmatch(r"[0-9]{1,4}", number) is None:
            raise ValueError('must name an inherited descriptor by its number, such as "fd://3"')
        return Bind("fd", fd=int(number))
    host, colon, port = value.rpartition(":")
    if not colon or re.fullmatch(r"[0-9]{1,5}", port) is None or int(port) > 65_535:
        raise ValueError(
            f'must be HOST:PORT with a port from 0 to 65535, such as "127.0.0.1:8727", or "unix:/path", '
            f"not {shown(value)}"
        )
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    try:
        if bracketed != (ip_address(host).version == 6):
            raise ValueError(f'must write an IPv6 address in brackets, such as "[::1]:8727", not {shown(value)}')
    except ValueError as error:
        if str(error).startswith("must"):
            raise
        if bracketed or _HOST_NAME.match(host) is None:
            raise ValueError(f"must name a host or an IP address before the port, not {shown(value)}") from None
    return Bind("tcp", host=host, port=int(port))


def read_network(value: object) -> IPv4Network | IPv6Network | Literal["host"]:
    """A network in CIDR form, a single address, or the word `host`."""
    if value == "host":
        return "host"
    if isinstance(value, str):
        try:
            return ip_network(value)
        except ValueError as error:
            if "host bits" in str(error):
                wide = ip_network(value, strict=False)
                raise ValueError(f'{shown(value)} has bits set behind its prefix; write "{wide}"') from None
    raise ValueError('must be "host", or a network in quotes such as "10.0.0.0/8" or "fd00::/8"')


def check_urn(value: str) -> str:
    """An agent's name, `urn:asap:agent:<name>`."""
    if AGENT_URN.match(value) is None:
        raise ValueError(
            f'must be an agent\'s name such as "urn:asap:agent:writer" (letters, digits and ._:- after the prefix), '
            f"not {shown(value)}"
        )
    return value


def check_agent_pattern(value: str) -> str:
    """An agent's name, or the start of one followed by `*`."""
    stem = value.removesuffix("*")
    if stem == value:
        return check_urn(value)
    if not (_URN_PREFIX.startswith(stem) or AGENT_URN.match(stem)):
        raise ValueError(
            f'must be an agent\'s name or a beginning of one with * at the end, such as "urn:asap:agent:team-*", '
            f"not {shown(value)}"
        )
    return value


def check_name(value: str) -> str:
    """A name for people and logs: 1 to 200 printable characters without spaces around."""
    if not 1 <= len(value) <= 200 or not value.isprintable() or value != value.strip():
        raise ValueError("must be a name of 1 to 200 printable characters, without spaces around it")
    return value


def check_text(value: str) -> str:
    """Free text of at most 200 printable characters."""
    if not 1 <= len(value) <= 200 or not value.isprintable():
        raise ValueError("must be text of 1 to 200 printable characters")
    return value


def check_mask(value: str) -> str:
    """A pattern of what is masked in audit entries, whose cost is bounded."""
    if (reason := why_not(check_text(value))) is not None:
        raise ValueError(reason)
    return value


def check_host(value: str) -> str:
    """A host name or address as it may stand in a Host header, without scheme or path."""
    bare = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    try:
        ip_address(bare)
    except ValueError:
        if _HOST_NAME.match(value) is None:
            raise ValueError(
                f'must be a host name such as "asapd.example.org", without scheme, port or path, not {shown(value)}'
            ) from None
    return value


def check_origin(value: str) -> str:
    """A web origin, `https://HOST[:PORT]` (RFC 6454)."""
    parts = _split_url(value)
    if parts.path or parts.query or parts.fragment:
        raise ValueError('must be an origin such as "https://dash.example.org", without path or trailing slash')
    return value


def check_agent_url(value: str) -> str:
    """Where an agent answers: http or https, without query or fragment."""
    parts = _split_url(value)
    if parts.query or parts.fragment or "?" in value or "#" in value:
        raise ValueError("must be the agent's base address, without ? or # parts")
    return value


def check_webhook_url(value: str) -> str:
    """Where alerts are posted: http or https, without fragment, and not link-local, where nothing is ever sent."""
    if _split_url(value).fragment:
        raise ValueError("must not have a # part, which is never sent")
    if is_link_local(value):
        raise ValueError("must not be a link-local address, to which nothing is ever sent: name another of that host")
    return value


def is_link_local(url: str) -> bool:
    """Whether the host of an address that was checked is written as a link-local one, which asapd never connects to."""
    try:
        ip = ip_address(urlsplit(url).hostname or "")
    except ValueError:
        return False
    return (getattr(ip, "ipv4_mapped", None) or ip).is_link_local


def check_public_key(value: str) -> str:
    """The shape of an Ed25519 public key: base64 of its 32 bytes, or a PEM (RFC 8410)."""
    if "PRIVATE KEY" in value:
        raise ValueError("is a private key, which has no place here: give the public key")
    if pem := _PEM.match(value.strip()):
        raw = _base64("".join(pem[1].split()))
        if len(raw) != 44 or not raw.startswith(_SPKI_ED25519):
            raise ValueError("is a PEM, but not of an Ed25519 public key")
    elif len(_base64(value)) != 32:
        raise ValueError("must be the 32 bytes of an Ed25519 public key in base64, or its PEM")
    return value


def check_timezone(value: str) -> str:
    """A time zone of the IANA database."""
    if value == "UTC":
        return value  # known also on hosts without the time zone database
    try:
        ZoneInfo(value)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f'must be a time zone this host knows, such as "Europe/Berlin", not {shown(value)}') from None
    return value


def check_support_hours(value: str) -> str:
    """Support hours with a zone that this host knows."""
    try:
        check_timezone(parse_hours(value).zone)
    except HoursError as error:
        raise ValueError(str(error)) from None
    return value


def shown(value: object) -> str:
    """A value as an operator would recognise it, cut to a readable length."""
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return ascii(text)[1:-1] if not text.isprintable() else text if len(text) <= 60 else f'{text[:56]}..."'


def _base64(value: str) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return b""


def _split_url(value: str) -> SplitResult:
    # The value is not shown: an address with a password in it must not reach a log.
    if not (value.isascii() and value.isprintable()) or " " in value or "\\" in value:
        raise ValueError("must be written in plain ASCII without spaces; write an international name in its xn-- form")
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ValueError('must be an address such as "http://127.0.0.1:9000", with http or https and a host')
    if "@" in parts.netloc:
        raise ValueError("must not hold a user name or password")
    return parts
