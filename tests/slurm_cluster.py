"""A Slurm cluster of one node, from Debian's packages: nothing is installed, all lies in one folder."""

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import time

PACKAGES = [
    "slurmctld",
    "slurmd",
    "slurm-client",
    "slurm-wlm-basic-plugins",
    "libhwloc15",
    "libmunge2",
    "liblua5.4-0",
]
CONFIGURATION = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
PluginDir={folder}/root/usr/lib/x86_64-linux-gnu/slurm-wlm
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/daemon.pid
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_res
SelectTypeParameters=CR_Core
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class NoSlurm(Exception):
    """Why there can't be a cluster here."""


@contextlib.contextmanager
def cluster(folder, ports):
    """Runs one while the block lasts; gives the environment in which `srun` finds it.

    Raises:
        NoSlurm: The packages can't be had, or it does not start.
    """
    folder = pathlib.Path(folder)
    libraries = folder / "root/usr/lib/x86_64-linux-gnu"
    _fetch(folder)
    host = socket.gethostname()
    (folder / "spool").mkdir()
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, host=host, ports=ports))
    environment = {
        **os.environ,
        "SLURM_CONF": str(folder / "slurm.conf"),
        "LD_LIBRARY_PATH": f"{libraries}:{libraries}/slurm-wlm",
        "PATH": f"{folder}/root/usr/bin:{os.environ['PATH']}",
        "SLURM_OVERCOMMIT": "1",
    }
    programs = folder / "root/usr/sbin"
    commands = (
        [programs / "slurmctld-wlm", "-D"],
        [programs / "slurmd-wlm", "-D", "-d", programs / "slurmstepd-wlm"],
    )
    with contextlib.ExitStack() as stack:
        for command in commands:
            output = stack.enter_context(open(folder / f"{command[0].name}.log", "w"))
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        for _ in range(60):
            time.sleep(0.25)
            states = _output(["sinfo", "-h", "-o", "%T"], environment)
            if "idle" in states:
                break
        else:
            raise NoSlurm(f"the node did not come up: {states}")
        yield environment


def _fetch(folder):
    if os.geteuid() != 0:
        raise NoSlurm("slurmd wants to be root")
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise NoSlurm("no apt-get to fetch Slurm's packages with")
    fetched = subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, capture_output=True, text=True)
    if fetched.returncode != 0:
        raise NoSlurm(f"apt-get download: {fetched.stderr.strip()[-300:]}")
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, folder / "root"], check=True)


def _output(command, environment):
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr
