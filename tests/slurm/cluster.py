"""A real Slurm of two nodes on this machine, of a test session: nothing of an installed one is read or changed.

Debian's `slurmd` has `-N`, so several run on one host. Everything lies in one folder, the keys of munge too; only names
of the nodes are added to /etc/hosts, and removed again. Needs root, and the packages slurm-wlm and munge.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "sinfo", "scancel")
HOSTS = Path("/etc/hosts")
CONFIG = """\
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/sock
SlurmctldPort={port}
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
MinJobAge=3600
InactiveLimit=0
Waittime=0
SlurmdTimeout=10
MaxArraySize=2000
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""


def why_unavailable() -> str | None:
    """Return why no cluster can be started here, None if it can."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian packages slurm-wlm and munge)"
    return None if getpass.getuser() == "root" else "Slurm's daemons need root"


class Cluster:
    """Context of a running cluster.

    Args:
        root: a folder for everything of it; its path has to be short, for munge's socket.
        port: first of a few free ports.
        cpus: that each node promises, however many the machine has.
    """

    def __init__(self, root: Path, port: int, cpus: int = 8) -> None:
        self.root, self.port, self.cpus = root, port, cpus
        self.nodes = [f"vlm{port}n{number}" for number in (1, 2)]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.environment = {**inherited, "SLURM_CONF": str(root / "slurm.conf"), "PATH": _path()}

    def __enter__(self) -> Cluster:
        for folder in ("state", "log", "munge", *(f"spool.{node}" for node in self.nodes)):
            (self.root / folder).mkdir(parents=True)
        self.root.chmod(0o755)
        entries = [
            f"NodeName={node} NodeHostname={_host()} NodeAddr=127.0.0.1 Port={self.port + number} CPUs={self.cpus} "
            "RealMemory=8000 State=UNKNOWN"
            for number, node in enumerate(self.nodes, 1)
        ]
        config = CONFIG.format(
            name=f"vlm{self.port}", host=_host(), root=self.root, port=self.port, nodes="\n".join(entries)
        )
        (self.root / "slurm.conf").write_text(config)
        with HOSTS.open("a") as file:
            file.writelines(f"127.0.0.1 {node}\n" for node in self.nodes)
        try:
            self._start_munge()
            self._run("slurmctld", "-c")
            for node in self.nodes:
                self._run("slurmd", "-N", node)
            self._wait_for_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        subprocess.run(["scancel", "--user=root"], env=self.environment, check=False, timeout=20)
        end = time.monotonic() + 20
        while time.monotonic() < end and self._run("squeue", "-h", "-t", "running,completing", check=False):
            time.sleep(0.2)
        files = [*self.root.glob("slurmd.*.pid"), self.root / "slurmctld.pid", self.root / "munge" / "pid"]
        processes = [int(file.read_text()) for file in files if file.exists() and file.read_text().strip()]
        for process in processes:
            _send(process, signal.SIGTERM)
        end = time.monotonic() + 20
        while any(_send(process, 0) for process in processes):
            if time.monotonic() > end:
                for process in processes:
                    _send(process, signal.SIGKILL)
            time.sleep(0.05)
        lines = HOSTS.read_text().splitlines(keepends=True)
        HOSTS.write_text("".join(line for line in lines if line.split()[-1:] not in [[node] for node in self.nodes]))

    def submit(self, folder: Path, *arguments: str | Path, environment: dict[str, str] | None = None) -> str:
        """Submit a batch script from a folder with options of sbatch; returns the job's number."""
        command = ["sbatch", "--parsable", *map(str, arguments)]
        env = {**self.environment, **(environment or {})}
        return subprocess.run(
            command, cwd=folder, env=env, check=True, capture_output=True, text=True, timeout=60
        ).stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """Return what `scontrol show job` says of a job, by Slurm's names."""
        text = self._run("scontrol", "show", "job", "-o", number)
        return dict(field.partition("=")[::2] for field in text.split() if "=" in field)

    def wait_for_state(self, number: str, *states: str, seconds: float = 240.0) -> str:
        """Wait until a job is in one of the states, and return that."""
        end = time.monotonic() + seconds
        while (state := self.job(number)["JobState"]) not in states:
            assert time.monotonic() < end, f"job {number} is {state}, not {states}"
            time.sleep(0.2)
        return state

    def run_again_now(self, number: str) -> None:
        """Let a requeued job start, which Slurm would do after two minutes."""
        self.wait_for_state(number, "PENDING")
        time.sleep(2.5)  # earlier: "Job credential revoked"
        self._run("scontrol", "update", f"jobid={number}", "StartTime=now")

    def bring_back(self, node: str) -> None:
        """Let a node that was down take jobs again."""
        self._run("scontrol", "update", f"nodename={node}", "state=resume", check=False)  # it may be back already
        self._wait_for_nodes()

    def command(self, *command: str) -> str:
        """Run a command of Slurm and return what it prints."""
        return self._run(*command)

    def _start_munge(self) -> None:
        munge = self.root / "munge"
        (munge / "key").write_bytes(os.urandom(128))
        shutil.chown(munge, "munge", "munge")
        shutil.chown(munge / "key", "munge", "munge")
        (munge / "key").chmod(0o400)
        munge.chmod(0o711)  # clients must reach the socket
        places = {"socket": "sock", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={munge / name}" for option, name in places.items()]
        self._run("runuser", "-u", "munge", "--", shutil.which("munged", path=_path()) or "munged", "--force", *options)

    def _wait_for_nodes(self) -> None:
        end = time.monotonic() + 30
        while len(set(self._run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split())) < len(self.nodes):
            logs = "\n".join(path.read_text() for path in (self.root / "log").iterdir())
            assert time.monotonic() < end, f"Slurm did not start\n{logs}"
            time.sleep(0.05)

    def _run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env=self.environment, check=False, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{command} exited with {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout.strip()


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _host() -> str:
    return socket.gethostname().partition(".")[0]


def _send(process: int, number: int) -> bool:
    """Send a signal, or none with 0; returns whether the process lives."""
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return False
    return True
