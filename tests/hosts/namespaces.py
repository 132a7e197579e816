"""Hosts on one machine: network namespaces, each with two interfaces, on two bridges.

`eth0` is the network of the cluster, `eth1` a second one, as for a storage or an RDMA network.
Addresses come from 198.18.0.0/15, which is kept for tests (RFC 2544).
"""

from __future__ import annotations

import ipaddress
import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


def missing_privilege() -> str:
    """Why namespaces cannot be made here; empty if they can."""
    name = f"pdprobe{os.getpid()}"
    try:
        made = _ip("netns", "add", name, check=False)
    except FileNotFoundError:
        return "network namespaces need iproute2 (`ip`)"
    if made.returncode == 0:
        made = _ip("-n", name, "link", "add", "eth0", "type", "bridge", check=False)
        _ip("netns", "del", name, check=False)
    said = made.stderr.strip()
    return f"network namespaces need CAP_NET_ADMIN and CAP_SYS_ADMIN: {said}" if said else ""


@dataclass(frozen=True)
class NamespaceHost:
    """A host: `address` on eth0, `second` on eth1; `gateway` is this process's address on eth0."""

    name: str
    link: str
    address: str
    second: str
    gateway: str

    @property
    def within(self) -> tuple[str, ...]:
        """Runs a command there."""
        return ("ip", "netns", "exec", self.name)

    def spawn(
        self, *command: str | Path, env: dict[str, str], log: Path
    ) -> subprocess.Popen[bytes]:
        """Starts a process there."""
        with log.open("ab") as out:
            return subprocess.Popen(
                [*self.within, *command],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def cut_off(self) -> None:
        """Nothing reaches it any more, as with a pulled cable."""
        for network in "ab":
            _ip("link", "set", self.link + network, "down")

    def reconnect(self) -> None:
        """Undoes `cut_off`."""
        for network in "ab":
            _ip("link", "set", self.link + network, "up")

    def listening(self) -> set[str]:
        """Every address:port on which a process of it takes TCP connections; IPv4 addresses as
        such, also where a socket for both families has them."""
        found = set()
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            done = subprocess.run(
                [*self.within, "cat", table], capture_output=True, text=True, check=True
            )
            for line in done.stdout.splitlines()[1:]:
                local, state = line.split()[1], line.split()[3]
                if state == "0A":
                    address, port = local.split(":")
                    found.add(f"{_spoken(address)}:{int(port, 16)}")
        return found

    def lose(self) -> None:
        """Kills all that runs there, as with a pulled plug."""
        deadline = time.monotonic() + 10
        while pids := _ip("netns", "pids", self.name, check=False).stdout.split():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            assert time.monotonic() < deadline, f"{self.name} still runs {pids}"
            time.sleep(0.05)


class Network:
    """Makes hosts, and removes all of them with `close`."""

    def __init__(self) -> None:
        self._mark = f"pd{os.getpid() % 10_000}"
        self._subnet = os.getpid() % 250
        self.hosts: list[NamespaceHost] = []
        for network, prefix in (("a", "198.18"), ("b", "198.19")):
            bridge = f"{self._mark}{network}"
            _ip("link", "add", bridge, "type", "bridge")
            _ip("addr", "add", f"{prefix}.{self._subnet}.254/24", "dev", bridge)
            _ip("link", "set", bridge, "up")

    def add(self) -> NamespaceHost:
        """A new host that reaches the others, and that this process reaches."""
        number = len(self.hosts) + 1
        name = f"{self._mark}h{number}"
        first, second = (f"{prefix}.{self._subnet}.{number}" for prefix in ("198.18", "198.19"))
        gateway = f"198.18.{self._subnet}.254"
        host = NamespaceHost(name, f"{name}-", first, second, gateway)
        _ip("netns", "add", name)
        self.hosts.append(host)
        for network, device, address in (("a", "eth0", first), ("b", "eth1", second)):
            link = f"{host.link}{network}"
            _ip("link", "add", link, "type", "veth", "peer", "name", device, "netns", name)
            _ip("link", "set", link, "master", f"{self._mark}{network}", "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            _ip("-n", name, "link", "set", device, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "route", "add", "default", "via", gateway)
        return host

    def close(self) -> None:
        """Kills what runs on the hosts, then removes them."""
        for host in self.hosts:
            host.lose()
            _ip("netns", "del", host.name, check=False)
        for network in "ab":
            _ip("link", "del", f"{self._mark}{network}", check=False)


def _spoken(address: str) -> str:
    """The kernel writes an address as words of four bytes in its own byte order."""
    words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
    spoken = ipaddress.ip_address(b"".join(words))
    return str(getattr(spoken, "ipv4_mapped", None) or spoken)


def _ip(*args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["ip", *args], capture_output=True, text=True)
    assert not check or done.returncode == 0, f"ip {' '.join(args)}: {done.stderr}"
    return done
