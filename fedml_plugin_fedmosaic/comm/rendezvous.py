"""Where the ranks that train one client together find each other."""

from __future__ import annotations

import socket

LOOPBACK = "127.0.0.1"


def free_port(address: str = LOOPBACK) -> int:
    """A TCP port that is free on this node now.

    Args:
        address: loopback, or anything else for a port that is free on all interfaces.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((LOOPBACK if address == LOOPBACK else "", 0))
        return int(probe.getsockname()[1])


def reachable_address(*, one_node: bool) -> str:
    """The name under which the other ranks of a group reach this process.

    Args:
        one_node: all of them are on this node, so that the loopback interface is enough.
    """
    return LOOPBACK if one_node else socket.getfqdn()
