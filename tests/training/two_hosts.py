"""Two hosts on this machine: network namespaces on a veth link, an sshd in each, one disk.

Tests and benchmarks/scaling.py make them, so nothing of pytest is in here.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ADDRESSES", "INTERFACE", "Hosts", "HostsMissing", "two_hosts"]

PROGRAMS = ("ip", "ssh", "ssh-keygen", "pdsh")
SSHD = Path("/usr/sbin/sshd")
INTERFACE = "medvlm0"
ADDRESSES = ("10.213.7.1", "10.213.7.2")

SSHD_CONFIG = """\
Port 22
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
MaxStartups 50
"""
SSH_CONFIG = """\
Host *
  IdentityFile {folder}/key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


class HostsMissing(RuntimeError):
    """What two hosts need is not on this machine."""


@dataclass(frozen=True)
class Hosts:
    """Names of the namespaces, and what a process on the first needs to reach the second."""

    names: tuple[str, str]
    environment: dict[str, str]
    folder: Path

    def hostfile(self, *lines: str) -> str:
        path = self.folder / "hostfile"
        path.write_text("".join(f"{line}\n" for line in lines))
        return str(path)

    def on(self, host: int, command: list[str]) -> list[str]:
        return ["ip", "netns", "exec", self.names[host], *command]

    def limit(self, rate: str | None) -> None:
        """Let the link send at most ``rate`` (as ``tc`` writes it, such as 100mbit) each way; None: as it comes."""
        for name in self.names:
            # A burst holds what a full-speed link sends between two ticks of a 250 Hz kernel, and a segment of 64 KB.
            how = ["root", "tbf", "rate", rate, "burst", "512kb", "latency", "50ms"] if rate else ["root"]
            command = ["tc", "-n", name, "qdisc", "replace" if rate else "delete", "dev", INTERFACE, *how]
            subprocess.run(command, check=bool(rate), capture_output=True)

    def kill(self, host: int) -> None:
        """Everything that runs on a host dies at once, its ssh server too."""
        found = subprocess.run(["ip", "netns", "pids", self.names[host]], capture_output=True, text=True, check=True)
        for pid in found.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Make both hosts; take them away afterwards.

    Raises:
        HostsMissing: A program is not installed, or this is not root.
    """
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or not SSHD.exists() or os.geteuid() != 0:
        raise HostsMissing(f"two hosts need root and Debian's iproute2, openssh-server, pdsh; missing: {missing}")
    names = (f"medvlm-{os.getpid()}-a", f"medvlm-{os.getpid()}-b")
    keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f"]
    for key in ("host_key", "key"):
        subprocess.run([*keygen, str(folder / key)], check=True)
    (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
    # DeepSpeed's launcher and pdsh call `ssh` by name; nobody's own settings are touched.
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    (folder / "bin" / "ssh").chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)
    with ExitStack() as made:
        _link(made, names)
        for name, address in zip(names, ADDRESSES, strict=True):
            _serve(made, folder, name, address)
        path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        hosts = Hosts(names, {"PATH": path, "GLOO_SOCKET_IFNAME": INTERFACE}, folder)
        for address in ADDRESSES:
            _until_reached(hosts, address)
        yield hosts


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _link(made: ExitStack, names: tuple[str, str]) -> None:
    for name in names:
        _ip("netns", "add", name)
        made.callback(subprocess.run, ["ip", "netns", "delete", name], check=False)
    # Both ends have one name, each on its own host.
    first, second = names
    _ip("link", "add", INTERFACE, "netns", first, "type", "veth", "peer", "name", INTERFACE, "netns", second)
    for name, address in zip(names, ADDRESSES, strict=True):
        _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
        for interface in ("lo", INTERFACE):
            _ip("-n", name, "link", "set", interface, "up")


def _serve(made: ExitStack, folder: Path, name: str, address: str) -> None:
    configuration = folder / f"sshd-{address}"
    configuration.write_text(SSHD_CONFIG.format(folder=folder, address=address))
    command = ["ip", "netns", "exec", name, str(SSHD), "-D", "-q", "-f", str(configuration)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def end() -> None:
        process.terminate()
        process.wait(10)

    made.callback(end)


def _until_reached(hosts: Hosts, address: str) -> None:
    deadline = time.monotonic() + 30
    command = hosts.on(0, [str(hosts.folder / "bin" / "ssh"), address, "true"])
    while subprocess.run(command, capture_output=True, check=False).returncode:
        assert time.monotonic() < deadline, f"{address} does not answer"
        time.sleep(0.1)
