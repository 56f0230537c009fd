"""Which nodes a launcher, or the ranks that lost others, call bad. Most ends of a job are no node's fault.

Of 210 failures of jobs on Aurora 63 were answered with other nodes, 7 of these with success: the rest were bugs that came back
(saforem2/torchtitan, failover-restart-economics.md). So a node is only left out when something names it, and alone.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Collection, Sequence

_SHEPHERD = re.compile(r"^(\S+?):? shepherd died from signal 9\b")
"""PALS lost its process on the node. Signal 11 there is a fault of PMIx, and `rank N died from signal 11` or 15 names victims:
ezpz failover/patterns/aurora.py, AuroraBugTracking #146."""
_PEER = re.compile(r"Connection closed by peer \[?([0-9A-Fa-f.:]*[0-9A-Fa-f])\]?")
"""gloo's words for a peer that is gone."""


def named_hosts(lines: Sequence[str], hosts: Collection[str]) -> list[str]:
    """Nodes whose shepherd died, in the launcher's words."""
    short = {host.partition(".")[0]: host for host in hosts if not _is_address(host)} | {host: host for host in hosts}
    found = [match[1] for line in lines if (match := _SHEPHERD.match(line))]
    return list(dict.fromkeys(short[name] for name in found if name in short))


def lost_host(messages: Sequence[str], hosts: Collection[str], address_of: Callable[[str], str]) -> str:
    """The node of the peer that ranks have lost; empty when they name several: who loses one goes next, and is named."""
    named = {match[1] for message in messages if (match := _PEER.search(message))}
    if len(named) != 1:
        return ""
    found = [host for host in hosts if address_of(host) in named]
    return found[0] if len(found) == 1 else ""


def silent_host(silent: Collection[int], host_of: Callable[[int], str]) -> str:
    """The node of all ranks that gave no sign of life; empty when they are of several, which is a fault of no node."""
    found = {host_of(rank) for rank in silent}
    return found.pop() if len(found) == 1 else ""


def resolve(name: str) -> str:
    """Address of a host; empty without one."""
    try:
        return socket.gethostbyname(name)
    except OSError:
        return ""


def _is_address(host: str) -> bool:
    return bool(re.fullmatch(r"[0-9.]+", host))
