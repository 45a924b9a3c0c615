"""Two machines and a switch on this host, as namespaces: each has its own network, processes, host name and mounts.

    with Machines() as site:
        site.run("n1", ["ssh", "n2", "hostname"])     # as a user who is not root
        site.unplug("n2")                              # pulls its cable

The switch is called `head`, the machines `n1` and `n2`; both run an sshd. They share the file system, as a cluster does, and
nothing of this host's network changes. The end of `with` ends every process in them, whatever it is, and removes their folder;
so does the end of the process that made them, since each machine lives only as long as the pipe that its first process reads.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic, sleep
from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]
NODES = ("n1", "n2")
ADDRESSES = {"head": "10.77.0.254", "n1": "10.77.0.1", "n2": "10.77.0.2"}
USER, UID = "astronomer", 20_077

SSHD = """
ListenAddress {address}
HostKey {folder}/host_key
PidFile none
AuthorizedKeysFile {folder}/home/.ssh/id_ed25519.pub
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
StrictModes no
"""

FIRST_PROCESS = """
set -e
hostname {name}
for file in hosts passwd group; do mount --bind {folder}/$file /etc/$file; done
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mkdir /run/sshd
{opened}
ip link set lo up
echo up
while read -r _; do :; done
[ {name} != head ] || rm -rf --one-file-system {folder}
"""


def missing() -> str | None:
    """Why machines cannot be made here; None where they can."""
    if os.geteuid() != 0:
        return "namespaces, sshd and Slurm's daemons need root"
    for program, package in {
        "ip": "iproute2",
        "nsenter": "util-linux",
        "sshd": "openssh-server",
        "pdsh": "pdsh",
    }.items():
        if shutil.which(program, path=search_path()) is None:
            return f"no {program} here (apt-get install {package})"
    tried = subprocess.run(["unshare", "-n", "-p", "-m", "-u", "--fork", "true"], capture_output=True, text=True)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


def search_path() -> str:
    """PATH with this Python's commands first, and with those of an administrator."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def until(true: Callable[[], object], seconds: float) -> bool:
    """Whether something becomes true within so many seconds."""
    end = monotonic() + seconds
    while not (found := true()) and monotonic() < end:
        sleep(0.05)
    return bool(found)


class Machines:
    """The switch and the two machines.

    Attributes:
        folder: A temporary folder that all share; gone at the end.
        home: The user's home in it, where the user may write.
        environment: What the user's commands see; nothing of this process's environment enters besides PATH.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="armillary-machines-"))
        self.home = self.folder / "home"
        self.environment = {"PATH": search_path(), "HOME": str(self.home), "USER": USER, "LOGNAME": USER, "LANG": "C.UTF-8",
                            "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
                            "DS_ACCELERATOR": "cpu"}  # fmt: skip
        self._first: dict[str, subprocess.Popen[str]] = {}
        self._inside: dict[str, int] = {}

    def __enter__(self) -> Machines:
        try:
            self._write_files()
            for name in ADDRESSES:
                self._boot(name)
            self._cable()
            for name in NODES:
                self.daemon(name, ["sshd", "-e", "-f", str(self.folder / f"sshd-{name}.conf")])
            for name in NODES:
                reached = until(
                    lambda to=name: self.run("n1", ["ssh", "-o", "BatchMode=yes", to, "true"]).returncode == 0, 10
                )
                assert reached, self.run("n1", ["ssh", "-v", name, "true"]).stderr
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, machine: str, command: Sequence[str | Path], timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run the user's command in a machine, in the repository's folder, to its end."""
        return subprocess.run(self._enter(machine, command), cwd=ROOT, env=self.environment, capture_output=True,
                              text=True, timeout=timeout, stdin=subprocess.DEVNULL)  # fmt: skip

    def start(self, machine: str, command: Sequence[str | Path], log: Path) -> subprocess.Popen[bytes]:
        """Start the user's command in a machine; what it says goes to a file."""
        with open(log, "wb") as output:
            return subprocess.Popen(self._enter(machine, command), cwd=ROOT, env=self.environment, stdout=output,
                                    stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)  # fmt: skip

    def daemon(self, machine: str, command: Sequence[str]) -> None:
        """Run root's command in a machine; one that goes into the background stays there.

        Raises:
            RuntimeError: It failed.
        """
        log = self.folder / f"{Path(command[0]).name}-{machine}.log"  # not a pipe, which a daemon would hold open
        environment = self.environment | {"HOME": "/", "USER": "root", "LOGNAME": "root"}
        program = shutil.which(command[0], path=search_path()) or command[0]  # sshd wants its whole path
        with open(log, "ab") as output:
            ended = subprocess.run([*self._into(machine), program, *command[1:]], env=environment, stdout=output,
                                   stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=30)  # fmt: skip
        if ended.returncode:
            raise RuntimeError(f"{command[0]} in {machine}: exit code {ended.returncode}\n{log.read_text()[-2000:]}")

    def unplug(self, node: str) -> None:
        """Pull a machine's cable."""
        self._ip("head", "link", "set", node, "down")

    def plug(self, node: str) -> None:
        """Put it back."""
        self._ip("head", "link", "set", node, "up")

    def pids(self, machine: str, text: str) -> list[int]:
        """Processes of a machine whose command line contains a text, by their numbers in the machine, oldest first."""
        return [int(pid) for pid in self.run(machine, ["pgrep", "-f", "--", text]).stdout.split()]

    def signal(self, machine: str, name: str, pid: int) -> None:
        """Send the user's signal (`TERM`, `KILL`) to a process of a machine."""
        self.run(machine, ["kill", f"-{name}", str(pid)]).check_returncode()

    def close(self) -> None:
        """End the machines, with everything in them, and remove the folder."""
        for process in self._first.values():
            with contextlib.suppress(OSError):
                process.stdin.close()
        for process in self._first.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()  # its machine goes with it
                process.wait()
            process.stdout.close()
        self._first.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_files(self) -> None:
        """Names, the user, keys."""
        folder, ssh = self.folder, self.home / ".ssh"
        folder.chmod(0o755)
        ssh.mkdir(parents=True, mode=0o700)
        for key in (folder / "host_key", ssh / "id_ed25519"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        public = (folder / "host_key.pub").read_text()
        (ssh / "known_hosts").write_text("".join(f"{node},{ADDRESSES[node]} {public}" for node in NODES))
        for path in (self.home, ssh, *ssh.iterdir()):
            os.chown(path, UID, UID)
        names = "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + names)
        (folder / "passwd").write_text(
            f"{Path('/etc/passwd').read_text()}{USER}:x:{UID}:{UID}::{self.home}:/bin/bash\n"
        )
        (folder / "group").write_text(f"{Path('/etc/group').read_text()}{USER}:x:{UID}:\n")
        for node in NODES:
            (folder / f"sshd-{node}.conf").write_text(SSHD.format(address=ADDRESSES[node], folder=folder))

    def _boot(self, name: str) -> None:
        script = FIRST_PROCESS.format(name=name, folder=self.folder, opened="\n".join(_opened(self.folder)))
        command = ["unshare", "-n", "-p", "-m", "-u", "--fork", "--kill-child", "--mount-proc", "bash", "-c", script]
        first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                 env={"PATH": search_path()})  # fmt: skip
        self._first[name] = first
        said = first.stdout.readline()
        if said != "up\n":
            raise RuntimeError(f"machine {name}: {said}{first.stdout.read()}")
        self._inside[name] = int(Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text())

    def _cable(self) -> None:
        self._ip("head", "link", "add", "switch", "type", "bridge")
        self._ip("head", "link", "set", "switch", "up")
        self._ip("head", "addr", "add", f"{ADDRESSES['head']}/24", "dev", "switch")
        for node in NODES:
            self._ip(
                "head", "link", "add", node, "type", "veth", "peer", "name", "eth0", "netns", str(self._inside[node])
            )
            self._ip("head", "link", "set", node, "master", "switch", "up")
            self._ip(node, "addr", "add", f"{ADDRESSES[node]}/24", "dev", "eth0")
            self._ip(node, "link", "set", "eth0", "up")

    def _ip(self, machine: str, *arguments: str) -> None:
        """`ip` of this host in a machine's network: numbers of processes are those that this host sees."""
        command = ["nsenter", "-t", str(self._inside[machine]), "-n", "ip", *arguments]
        subprocess.run(command, check=True, env={"PATH": search_path()})

    def _into(self, machine: str) -> list[str]:
        return ["nsenter", "-t", str(self._inside[machine]), "-m", "-n", "-p", "-u"]

    def _enter(self, machine: str, command: Sequence[str | Path]) -> list[str]:
        return [*self._into(machine), "-S", str(UID), "-G", str(UID), f"--wd={ROOT}", "--", *map(str, command)]


def _opened(folder: Path) -> list[str]:
    """Mounts that let the user reach Python and this repository where they lie below a folder closed to others, as /root is.

    In place of such a folder a machine has an empty one, with what is needed in its place.
    """
    needed = {Path(sys.base_prefix), Path(sys.prefix), Path(os.path.realpath(sys.base_prefix)), ROOT, folder}
    closed: dict[Path, list[Path]] = {}
    for path in sorted(needed):
        top = next((p for p in [*reversed(path.parents), path] if not p.stat().st_mode & 0o001), None)
        if top is not None:
            closed.setdefault(top, []).append(path)
    lines = []
    for top, paths in closed.items():
        kept = {f"/run/kept/{i}": shlex.quote(str(path)) for i, path in enumerate(paths)}
        lines += [f"mkdir -p {hold} && mount --bind {path} {hold}" for hold, path in kept.items()]
        lines.append(f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(top))}")
        lines += [f"mkdir -p {path} && mount --bind {hold} {path} && umount {hold}" for hold, path in kept.items()]
    return lines
