"""What the processes of a service have opened: ports that listen, and files that they write."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterable
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any

import psutil

ALL, LOOPBACK, NODE = "all", "127.0.0.1", "the node's address"
_ROW = re.compile(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", re.MULTILINE)


def ray_processes(application: str) -> list[psutil.Process]:
    """All processes of the Ray that this process has started, but for Serve's replicas of other applications."""
    found = []
    for child in psutil.Process().children():
        if any("/ray/" in word for word in child.cmdline()):
            found += [child, *child.children(recursive=True)]
    return [process for process in found if not _is_of_another(process, application)]


def _is_of_another(process: psutil.Process, application: str) -> bool:
    name = "".join(_look(process.cmdline)[:1])
    return name.startswith("ray::ServeReplica:") and not name.startswith(f"ray::ServeReplica:{application}:")


def kind(process: psutil.Process) -> str:
    """The name of what it is: of a Ray actor its class, of a Serve replica its deployment, of Python its program."""
    words = _look(process.cmdline) or [""]
    if actor := re.match(r"ray::(?:ServeReplica:[^:]+:)?(\w+)", words[0]):
        return actor[1]
    scripts = [Path(word).stem for word in words if word.endswith(".py")]
    name = scripts[0] if scripts and "python" in words[0] else Path(words[0]).name
    return "IDLE" if name == "default_worker" else name  # it has not taken its title yet


def scope(address: str) -> str:
    """Who can reach a socket that listens there."""
    ip = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if ip.is_unspecified:
        return ALL
    return LOOPBACK if ip.is_loopback else NODE


def listening(processes: Iterable[psutil.Process]) -> set[tuple[str, str]]:
    """Kind and scope of each TCP port that listens, and of each UDP port."""
    return {
        (kind(process), scope(one.laddr.ip))
        for process in processes
        for one in _look(process.net_connections, "inet")
        if one.laddr and (one.status == psutil.CONN_LISTEN or one.type == socket.SOCK_DGRAM)
    }


def written(processes: Iterable[psutil.Process]) -> set[str]:
    """Paths of files that are open for writing, and of Unix sockets."""
    found: set[str] = set()
    for process in processes:
        found |= {file.path for file in _look(process.open_files) if file.mode != "r"}
        found |= {one.laddr for one in _look(process.net_connections, "unix") if one.laddr}
    return found


def told(page: Path) -> set[tuple[str, str]]:
    """Kind and scope of each port that the table on this page lists. What stands in brackets is of other set-ups."""
    table = page.read_text(encoding="utf-8").partition("\n### Ports\n")[2].partition("\n### ")[0]
    found = set()
    for processes, _, address, _ in _ROW.findall(table):
        here = address.partition(" (")[0].replace("this host", LOOPBACK)
        names = re.findall(r"`([^`]+)`", processes)
        found |= {(name, known) for name in names for known in (ALL, LOOPBACK, NODE) if known in here}
    return found


def _look(ask: Callable[..., list[Any]], *arguments: str) -> list[Any]:
    """What `ask` answers; nothing for a process that has ended."""
    try:
        return ask(*arguments)
    except psutil.NoSuchProcess:
        return []
