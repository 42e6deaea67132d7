"""Which network interface leads to the other machines.

gloo binds to whatever this machine's name stands for, unless GLOO_SOCKET_IFNAME names an interface.
Between machines that can be an address that the others cannot reach (Debian's 127.0.1.1, a second
network), on one machine a look-up that fails.
"""

from __future__ import annotations

import array
import contextlib
import ipaddress
import os
import socket
import struct
from collections.abc import Iterable

_SIOCGIFCONF = 0x8912  # Linux: the IPv4 addresses of all interfaces, secondary ones too
_IFREQ_BYTES = 40  # an entry of its answer: name [16], family [2], port [2], address [4], unused


def choose_gloo_interface(host: str, port: int, seen: Iterable[str]) -> None:
    """Sets GLOO_SOCKET_IFNAME, unless the user has, to the interface on the way to host:port.

    Args:
        host: where the ranks meet.
        seen: what `route` says to each rank about host. To host itself its name may be 127.0.1.1;
            where the others reach it then decides.

    Leaves it to gloo where nothing is found (other systems than Linux, an address behind a
    translation).
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    own = "127.0.0.1" if host.startswith("127.") else route(host, port)[1]
    if is_loopback(own):
        own = next((address for address in seen if not is_loopback(address)), own)
    # lo may be missing, or have another name (macOS): then gloo looks by itself.
    name = interface_with(own) or ("lo" if is_loopback(own) else "")
    if name in (known for _, known in socket.if_nameindex()):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def route(host: str, port: int) -> tuple[str, str]:
    """What host stands for here, and this machine's own address on the way to it; ("", "") if
    unknown.

    Sends nothing.
    """
    with contextlib.suppress(OSError):
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(address[0]), probe.getsockname()[0]
    return "", ""


def is_loopback(address: str) -> bool:
    """Also for "": an address that leads nowhere."""
    return not address or address.startswith("127.") or address == "::1"


def interface_with(address: str) -> str:
    """The name of the interface that holds an IPv4 or IPv6 address.

    "" if none does, and on other systems than Linux.
    """
    with contextlib.suppress(OSError, ValueError, ImportError):
        wanted = ipaddress.ip_address(address.partition("%")[0]).packed
        if len(wanted) == 4:
            return next((name for name, held in _ipv4() if held == wanted), "")
        with open("/proc/net/if_inet6", encoding="ascii") as file:
            for line in file:
                held, *_, name = line.split()
                if bytes.fromhex(held) == wanted:
                    return name
    return ""


def _ipv4() -> list[tuple[str, bytes]]:
    import fcntl

    buffer = array.array("B", bytes(1024 * _IFREQ_BYTES))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        request = struct.pack("iP", len(buffer), buffer.buffer_info()[0])
        size = struct.unpack("iP", fcntl.ioctl(asked, _SIOCGIFCONF, request))[0]
    entries = (buffer[i : i + _IFREQ_BYTES].tobytes() for i in range(0, size, _IFREQ_BYTES))
    return [(entry[:16].split(b"\0")[0].decode(), entry[20:24]) for entry in entries]
