"""A SLURM of its own on the loopback address: munge, slurmctld and slurmd with one node."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from waiting import wait_for

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "squeue", "scontrol")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
KillWait=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=64000
PartitionName=normal Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """What is lacking to start SLURM here; empty when nothing."""
    lacking = [name for name in PROGRAMS if _program(name) is None]
    if lacking:
        return f"no {', '.join(lacking)} here (apt-get install slurm-wlm munge)"
    return "" if os.getuid() == 0 else "SLURM's daemons need root"


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def slurm(folder: Path) -> Iterator[Path]:
    """Start the daemons; the value is their slurm.conf."""
    folder.chmod(0o711)  # munge refuses a socket that others cannot reach
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    configuration = folder / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(
            host=socket.gethostname().split(".")[0],
            folder=folder,
            port=_free_port(),
            node_port=_free_port(),
        )
    )
    for name in ("state", "spool"):
        (folder / name).mkdir()
    munge = {
        "socket": "munge.socket",
        "key-file": "munge.key",
        "pid-file": "munged.pid",
        "log-file": "munged.log",
        "seed-file": "munge.seed",
    }
    options = [f"--{key}={folder / name}" for key, name in munge.items()]
    environment = {**os.environ, "SLURM_CONF": str(configuration)}
    names = ("munged", "slurmctld", "slurmd")
    try:
        for name, given in zip(names, (["--force", *options], [], []), strict=True):
            subprocess.run([_program(name), *given], env=environment, check=True, timeout=60)
        wait_for(lambda: node_state(environment) == "idle", "SLURM's node is not idle")
        yield configuration
    finally:
        # jobs first: slurmd's helpers outlive it
        subprocess.run(["scancel", "--full", "-p", "normal"], env=environment, timeout=60)
        for name in reversed(names):
            _end(folder / f"{name}.pid")


def node_state(environment: dict[str, str]) -> str:
    """Of the one node, e.g. idle, mixed, drained; empty while nobody answers."""
    found = subprocess.run(
        ["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True
    )
    return found.stdout.strip().rstrip("*")


def _end(pid_file: Path) -> None:
    if pid_file.is_file() and psutil.pid_exists(number := int(pid_file.read_text())):
        process = psutil.Process(number)
        process.terminate()
        try:
            process.wait(20)
        except psutil.TimeoutExpired:
            process.kill()
