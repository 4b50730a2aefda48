"""A Slurm of one's own: munged, slurmctld and two slurmd on this machine, in a folder and on ports of their own.

Debian's packages slurmctld, slurmd, slurm-client and munge are all that it needs; not systemd, no cgroup, no account.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from conftest import ROOT, free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])  # where Debian has the daemons
# Two machines of two cores and a card, which is only counted. cred_expire: a job that is queued again waits for the
# credentials of its last start to expire, by default two minutes. Steps are signalled process by process (linuxproc).
# A job that asks for no memory gets a tenth of a machine's.
CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
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
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerNode=100
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
KillWait=90
SchedulerParameters=sched_interval=2,bf_interval=1,sched_min_interval=100000,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000 Gres=gpu:1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000 Gres=gpu:1
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=90
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Why no Slurm can be started here; None where it can."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge"
    return None if os.geteuid() == 0 else "slurmd starts jobs as root only"


class Slurm:
    """Use it in a `with`, which ends the daemons and the jobs that they have started."""

    def __init__(self, folder: Path):
        """
        Args:
            folder: short, since the name of munge's socket has at most 107 bytes.
        """
        self.folder, self.daemons = folder, []
        self.env = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf"), "HF_HUB_OFFLINE": "1"}
        self.env["OMP_NUM_THREADS"] = (
            "1"  # as two processes have on two cores, so that sums are added in the same order
        )
        for name in ("state", "munge"):
            (folder / name).mkdir(mode=0o711)
        folder.chmod(0o755)
        key = folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        (folder / "gres.conf").write_text("NodeName=n[1-2] Name=gpu File=/dev/null\n")
        user = "root"
        values = {
            "host": socket.gethostname(),
            "folder": folder,
            "user": user,
            "ports": [free_port() for _ in range(3)],
        }
        (folder / "slurm.conf").write_text(CONFIG.format(**values))

    def __enter__(self) -> "Slurm":
        try:
            self._start_daemons()
        except BaseException:
            self._end_daemons()
            raise
        return self

    def _start_daemons(self) -> None:
        own = [f"--{what}={self.folder}/munge/{what.partition('-')[0]}" for what in ("socket", "key-file", "log-file")]
        own += [f"--{what}={self.folder}/munge/{what.partition('-')[0]}" for what in ("pid-file", "seed-file")]
        self._start("munged", "--foreground", "--force", "--num-threads=2", *own)
        _wait(lambda: (self.folder / "munge" / "socket").exists(), 60, "munged")
        self._start("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._start("slurmd", "-D", "-N", node)
        _wait(lambda: self.ask("sinfo", "-hNo", "%T", "-p", "low").split() == ["idle"] * 2, 60, "two idle machines")

    def __exit__(self, *_) -> None:
        jobs = self.ask("squeue", "-h", "-o", "%A").split()
        if jobs:
            self.ask("scancel", "--signal=KILL", "--full", *jobs)
            self.ask("scancel", *jobs)
            _wait(lambda: not self.ask("squeue", "-h"), 60, "the end of all jobs")
        self._end_daemons()

    def _end_daemons(self) -> None:
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _start(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}{len(self.daemons)}.out", "wb") as file:
            daemon = subprocess.Popen(command, cwd=self.folder, env=self.env, stdout=file, stderr=subprocess.STDOUT)
        self.daemons.append(daemon)

    def ask(self, *command) -> str:
        """What a command of Slurm's says; nothing where it fails, as it does while a daemon starts."""
        command = [*map(str, command)]
        return subprocess.run(command, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=60).stdout

    def submit(self, *arguments) -> "Job":
        """`sbatch ...`, from the checkout."""
        command = ["sbatch", "--parsable", *map(str, arguments)]
        process = subprocess.run(command, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=60)
        assert process.returncode == 0, process.stderr
        return Job(self, int(process.stdout))


class Job:
    """A job of it."""

    def __init__(self, slurm: Slurm, number: int):
        self.slurm, self.number = slurm, number

    def value(self, key: str) -> str:
        """One of what `scontrol show job` lists."""
        words = self.slurm.ask("scontrol", "show", "job", "--oneliner", self.number).split()
        return next((word.partition("=")[2] for word in words if word.startswith(f"{key}=")), "")

    def is_over(self) -> bool:
        return self.value("JobState") in ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL")

    def starts(self) -> int:
        """How often it has been started."""
        return int(self.value("Restarts")) + 1


def _wait(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} in {seconds:.0f} s"
        time.sleep(0.2)
