# SPDX-License-Identifier: Apache-2.0
"""A bad cable: passes Ethernet frames on after a while, and loses some. Stands in for netem, which many kernels do not have.

``relay.py relay PORT NEW SECONDS LOSS`` makes the device NEW and carries frames between it and PORT until its input ends.
``relay.py checksum DEVICE`` makes a device compute checksums before it sends: a veth else leaves that to the other end.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import socket
import struct
import sys
import time
from collections import deque

_ETH_P_ALL = 3
_PACKET_OUTGOING = 4
_TUNSETIFF = 0x400454CA
_IFF_TAP_NO_PI = 0x0002 | 0x1000
_SIOCETHTOOL = 0x8946
_ETHTOOL_STXCSUM = 0x17
_LARGEST_FRAME = 65536


def compute_checksums(device: str) -> None:
    """Do not leave checksums, nor the cutting of large packets, to the other end of a veth."""
    import array

    command = array.array("I", [_ETHTOOL_STXCSUM, 0])
    request = struct.pack("16sP16x", device.encode(), command.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCETHTOOL, request)


def relay(port: str, new: str, seconds: float, loss: float) -> None:
    """Carry frames both ways; prints a dot when it begins."""
    cable = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    cable.bind((port, 0))
    tap = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", new.encode(), _IFF_TAP_NO_PI))
    os.write(1, b".")
    chance = random.Random(0)
    late: deque[tuple[float, int, bytes]] = deque()
    while True:
        patience = max(0.0, late[0][0] - time.monotonic()) if late else None
        ready, _, _ = select.select([cable.fileno(), tap, 0], [], [], patience)
        if 0 in ready:
            return
        for end in ready:
            if end == cable.fileno():
                frame, (_, _, kind, *_) = cable.recvfrom(_LARGEST_FRAME)
                if kind == _PACKET_OUTGOING:
                    continue
                to = tap
            else:
                frame, to = os.read(tap, _LARGEST_FRAME), cable.fileno()
            if chance.random() >= loss:
                late.append((time.monotonic() + seconds, to, frame))
        while late and late[0][0] <= time.monotonic():
            _, to, frame = late.popleft()
            try:
                os.write(to, frame)
            except OSError:
                # a device that is down; a frame more is lost
                continue


if __name__ == "__main__":
    if sys.argv[1] == "checksum":
        compute_checksums(sys.argv[2])
    else:
        relay(sys.argv[2], sys.argv[3], float(sys.argv[4]), float(sys.argv[5]))
