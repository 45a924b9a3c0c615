"""A real Slurm on the machines of `machines.py`: munge and the controller on `head`, a compute node on each of the others.

Two partitions, as where jobs are preempted: `urgent` takes the nodes of `main`, whose jobs have a minute to leave and go back
into the queue. Everything ends with the machines.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from machines import NODES, Machines, search_path, until

__all__ = ["Slurm", "missing"]

CPUS = 2
CONF = """
ClusterName=armillary
SlurmctldHost=head
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
MinJobAge=600
NodeName=n[1-2] CPUs={cpus} RealMemory=1000
PartitionName=main Nodes=n[1-2] Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why there can be no Slurm here; None where there can."""
    for program, package in {"munged": "munge", "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm"}.items():
        if shutil.which(program, path=search_path()) is None:
            return f"no {program} here (apt-get install {package})"
    return None


class Slurm:
    """Its daemons, started when this is made; the user's commands are given in the machine `n1`."""

    def __init__(self, machines: Machines) -> None:
        self.machines = machines
        folder = machines.folder / "slurm"
        folder.mkdir()
        folder.chmod(0o755)
        conf = folder / "slurm.conf"
        conf.write_text(CONF.format(folder=folder, cpus=CPUS))
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        machines.environment["SLURM_CONF"] = str(conf)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        machines.daemon(
            "head", ["munged", "--force", *(f"--{option}={folder}/munge.{end}" for option, end in files.items())]
        )
        machines.daemon("head", ["slurmctld", "-c"])
        for node in NODES:
            machines.daemon(node, ["slurmd", "-N", node])
        ready = until(lambda: self("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N").split() == [*NODES], 20)
        logs = "".join(path.read_text()[-1000:] for path in folder.glob("slurm*.log"))
        assert ready, f"the nodes did not come up\n{logs}"

    def __call__(self, *command: str | Path, timeout: float = 60) -> str:
        """What the user's command says."""
        done = self.machines.run("n1", command, timeout)
        assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """State of a job, as `RUNNING`, and of one that Slurm has forgotten nothing."""
        return self("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")

    def submit(self, script: Path, output: Path, options: Sequence[str], arguments: Sequence[str]) -> str:
        """Submit a batch script; returns the job's number."""
        return self("sbatch", "--parsable", "-o", output, *options, script, *arguments)
