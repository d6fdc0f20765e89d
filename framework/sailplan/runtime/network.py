"""How other hosts reach this one: its own name, the interface that leads to the first node, and
what gloo and NCCL were told to use.

gloo listens on the address of its interface, GLOO_SOCKET_IFNAME, or else on the address of the
host's own name. Debian and Ubuntu give that name 127.0.1.1 in /etc/hosts: ranks of other hosts then
wait for an address that is their own machine.
"""

from __future__ import annotations

import os
import socket
import time
from ipaddress import ip_address

import psutil

from sailplan.errors import ConfigurationError
from sailplan.runtime.environment import host_name

CHOSEN = "GLOO_SOCKET_IFNAME"


def interfaces() -> dict[str, list[str]]:
    """Return this host's network interfaces with their addresses, IPv4 first."""
    return {
        name: [
            address.address.partition("%")[0]
            for family in (socket.AF_INET, socket.AF_INET6)
            for address in addresses
            if address.family == family
        ]
        for name, addresses in psutil.net_if_addrs().items()
    }


def own_address() -> str | None:
    """Return the address of this host's own name; None where it has none."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    return str(found[0][4][0]) if found else None


def way_to(host: str) -> tuple[str, str] | None:
    """Return (interface, address) that lead from here to a host; None where nothing does.

    No packet is sent: the kernel's routes say it.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(place)
            address = str(probe.getsockname()[0])
    except OSError:
        return None
    known = (name for name, addresses in interfaces().items() if address in addresses)
    return next(known, "?"), address


def listening_address() -> tuple[str, str | None]:
    """Return (what gloo goes by, the address that it listens on; None: there is none)."""
    chosen = os.environ.get(CHOSEN, "").partition(",")[0]
    if not chosen:
        return f"own name {socket.gethostname()}", own_address()
    return f"{CHOSEN}={chosen}", next(iter(interfaces().get(chosen, [])), None)


def check_first_node(seconds: float = 10.0) -> None:
    """Raise ConfigurationError where this host finds no address for the first node's name.

    Connecting to it would be tried until the start's limit. seconds: for name servers that are
    slow to answer.
    """
    first = os.environ.get("MASTER_ADDR", "")
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(first, None, type=socket.SOCK_STREAM)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigurationError(
                    f"MASTER_ADDR: found {first!r}, for which host {host_name()} has no address "
                    f"({error.strerror}), expected a name or address of the first node that all "
                    "nodes know: export it"
                ) from error
        time.sleep(0.5)


def check_reachable() -> None:
    """Raise ConfigurationError where ranks of other hosts could not reach the ranks of this one."""
    first = os.environ.get("MASTER_ADDR", "")
    if first == "localhost" or first.startswith("127."):
        return  # all of the launch's "hosts" are this one
    by, address = listening_address()
    if address is not None and not ip_address(address).is_loopback:
        return
    way = way_to(first)
    known = {
        name: addresses[0]
        for name, addresses in interfaces().items()
        if addresses and not ip_address(addresses[0]).is_loopback
    }
    if way is not None and not ip_address(way[1]).is_loopback:
        name, usable = way
    else:  # this is the first node: any interface may be the right one
        name, usable = next(iter(known.items()), ("NAME", "none"))
    raise ConfigurationError(
        f"host {host_name()}: {by} has the address {address or 'none'}, expected one that other "
        f"hosts can reach, such as {usable} of {name}: export {CHOSEN}={name} on it, or give its "
        "own name that address in /etc/hosts"
    )
