"""Two hosts, as network namespaces with addresses of their own on one machine."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from processes import run_command, run_ranks, unjoined
from tiny_runs import losses, make_source, write_config

ADDRESSES = ("10.213.77.1", "10.213.77.2")
STEPS = [
    "teacher.training.per_device_train_batch_size=5",
    "distill.training.per_device_train_batch_size=5",
]


@dataclass
class Host:
    """A network namespace and its only device."""

    name: str
    device: str

    def start(self, command: list[str]) -> subprocess.Popen:
        """Run a command on this host."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *command],
            env=unjoined() | {"GLOO_SOCKET_IFNAME": self.device},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Two hosts connected by a cable."""
    mark = f"mkd{os.getpid()}"
    made = [Host(f"{mark}{end}", f"{mark}{end}") for end in "ab"]
    try:
        for host in made:
            ip(f"netns add {host.name}")
        ip(f"link add {made[0].device} type veth peer name {made[1].device}")
        for host, address in zip(made, ADDRESSES):
            ip(f"link set {host.device} netns {host.name}")
            ip(f"-n {host.name} addr add {address}/24 dev {host.device}")
            ip(f"-n {host.name} link set {host.device} up")
            ip(f"-n {host.name} link set lo up")
        yield made
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        pytest.skip(f"no network namespaces here: {reason.strip()}")
    finally:
        for host in made:
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)


@pytest.mark.deep
def test_two_hosts_equal_two_processes_of_one(hosts, tmp_path):
    make_source(tmp_path / "source")
    here = write_config(tmp_path / "source", tmp_path, "here")
    run_ranks(2, run_command, "distill", here, "distill.domains=[hiking]", *STEPS)
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    config = write_config(tmp_path / "source", tmp_path, "apart")
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    running = []
    for rank, host in enumerate(hosts):
        launcher = [deepspeed, "--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(rank)]
        launcher += ["--include", "@".join(f"{address}:0" for address in ADDRESSES)]
        launcher += ["--master_addr", ADDRESSES[0], "--master_port", "29577"]
        run = ["--module", "metakd", "distill", str(config), "distill.domains=[hiking]", *STEPS]
        running.append(host.start(launcher + run))
    for process in running:
        told, _ = process.communicate(timeout=300)
        assert process.returncode == 0, told[-3000:]
    expected, seen = losses(tmp_path / "here"), losses(tmp_path / "apart")
    assert seen.keys() == expected.keys() and len(expected) == 2
    for stage, values in expected.items():
        torch.testing.assert_close(
            torch.tensor(seen[stage]), torch.tensor(values), rtol=0, atol=1e-6
        )
