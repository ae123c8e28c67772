"""Which servers there are: addresses as given, and `dns:///host:port`, which stands for all that the name has now.

Looking a name up never holds up a call, but for the very first one. Calls drive it: one that finds the last
look-up older than `REFRESH_S` starts the next, in the background. A look-up that fails or finds nothing leaves
what was known.
"""

import asyncio
import hashlib
import logging
import math
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

REFRESH_S = 5.0
# At least so long between two look-ups of a name, however many servers fail meanwhile.
SOONEST_S = 1.0
_PREFIX = "dns:///"

_log = logging.getLogger(__name__)

# Looks (host, port) up: addresses "1.2.3.4:50051" and "[::1]:50051". Raises OSError.
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


@dataclass(frozen=True, slots=True)
class Target:
    """Where to connect, and for a looked-up address the name ("host:port") that it was looked up for."""

    address: str
    name: str = ""

    @property
    def host(self) -> str:
        """The host of `name`, which a certificate must be for; "" for an address as given."""
        return _split(self.name)[0] if self.name else ""


async def resolve(host: str, port: int) -> Sequence[str]:
    """All IPv4 and IPv6 addresses of `host`, as the operating system knows them."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    ips = [str(address[0]) for *_, address in found]
    return [f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}" for ip in dict.fromkeys(ips)]


def hash_order(targets: Iterable[Target], client_id: bytes) -> list[Target]:
    """`targets` in an order of this client's own (rendezvous hashing).

    Many clients that each talk to the first few of their order spread evenly, and a target that comes or goes
    moves no other.
    """

    def rank(target: Target) -> bytes:
        return hashlib.blake2b(f"{target.name} {target.address}".encode(), key=client_id, digest_size=8).digest()

    return sorted(dict.fromkeys(targets), key=rank)


class Discovery:
    """The targets that a list of addresses stands for; `on_change` is called when they became others."""

    def __init__(self, addresses: Sequence[str], on_change: Callable[[], None], look_up: Resolve | None = None) -> None:
        self._fixed = [Target(address) for address in addresses if not address.startswith(_PREFIX)]
        names = dict.fromkeys(address.removeprefix(_PREFIX) for address in addresses if address.startswith(_PREFIX))
        self._names = [_Name(name, on_change, look_up or resolve) for name in names]

    @property
    def targets(self) -> list[Target]:
        """All that is known now."""
        return [*self._fixed, *(target for name in self._names for target in name.targets)]

    @property
    def error(self) -> str:
        """Why nothing is known of the names for which that is so."""
        return "; ".join(name.error for name in self._names if not name.targets)

    def look(self, *, older_than_s: float = REFRESH_S) -> None:
        """Starts to look up again what was last looked up longer ago than that. Needs a running loop."""
        for name in self._names:
            name.look(older_than_s)

    async def first(self, timeout_s: float) -> None:
        """Waits until something is known or every look-up in progress has ended."""
        end_s = time.monotonic() + timeout_s
        while not self.targets:
            running = [name.task for name in self._names if name.task is not None and not name.task.done()]
            remaining_s = end_s - time.monotonic()
            if not running or remaining_s <= 0:
                return
            await asyncio.wait(running, timeout=remaining_s, return_when=asyncio.FIRST_COMPLETED)

    async def close(self) -> None:
        """Ends every look-up."""
        running = [name.task for name in self._names if name.task is not None]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


class _Name:
    """One name, and what it stood for when last looked up with success."""

    def __init__(self, name: str, on_change: Callable[[], None], look_up: Resolve) -> None:
        self._name = name
        self._host, self._port = _split(name)
        self._on_change = on_change
        self._look_up = look_up
        self._started_s = -math.inf
        self.targets: list[Target] = []
        self.error = ""
        self.task: asyncio.Task[None] | None = None

    def look(self, older_than_s: float) -> None:
        now_s = time.monotonic()
        if not self.targets:  # calls wait for it
            older_than_s = min(older_than_s, SOONEST_S)
        if now_s - self._started_s >= older_than_s and (self.task is None or self.task.done()):
            self._started_s = now_s
            self.task = asyncio.create_task(self._ask())

    async def _ask(self) -> None:
        try:
            found = await self._look_up(self._host, self._port)
        except (OSError, UnicodeError) as error:  # the latter: a name that no resolver would take
            self._failed(f"{self._host} cannot be resolved: {error}")
            return
        if not found:
            self._failed(f"{self._host} has no addresses")
            return
        self.error = ""
        targets = [Target(address, self._name) for address in found]
        if set(targets) != set(self.targets):
            self.targets = targets
            self._on_change()

    def _failed(self, error: str) -> None:
        if error != self.error:  # once, not every 5 s
            _log.warning("%s; its %d known addresses stay in use", error, len(self.targets))
        self.error = error


def _split(name: str) -> tuple[str, int]:
    host, _, port = name.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f'addresses has "{_PREFIX}{name}"; give "{_PREFIX}host:port" such as "dns:///teachers:50051"')
    return host, int(port)
