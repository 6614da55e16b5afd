"""slurm/submit.py where there is no Slurm: what it shows, what it refuses, and the same job on this machine."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fitscale.config.files import read_jsonl
from fitscale.config.load import load_config, load_schema
from fitscale.jobs.profile import ClusterConfig
from fitscale.run.claim import claim
from fitscale.run.layout import RunDir
from tests.tiny import OVERRIDES

ROOT = Path(__file__).parents[1]
DEMO = ("--cluster", "configs/cluster/demo.yaml")


def submit(run: Path, shards: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    where = (f"run.dir={run}", f"data.shards={shards}")
    return subprocess.run(
        [sys.executable, "slurm/submit.py", *OVERRIDES, *where, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/nowhere"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def demo():
    """slurm/demo.py as a module."""
    spec = importlib.util.spec_from_file_location("slurm_demo", ROOT / "slurm" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_dry_run_shows_layout_and_script_and_writes_nothing(tmp_path, digits_shards):
    result = submit(tmp_path / "run", digits_shards, *DEMO, "--nodes", "2", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "2 nodes x 2 tasks = 4 ranks: dp 4 x tp 1, ZeRO 1; 4 images a rank and step" in result.stdout
    for line in ("--nodes=2", "--ntasks-per-node=2", "--signal=USR2@30", "--partition=main", "--requeue"):
        assert f"#SBATCH {line}\n" in result.stdout
    assert "export GLOO_SOCKET_IFNAME=lo\n" in result.stdout
    assert (
        "tiny (fitv2), 47,333 parameters" in result.stdout
        and "4 x cpu" in result.stdout
        and "GPU-hours" in result.stdout
    )
    chain = result.stdout[result.stdout.rindex("job ") :].splitlines()
    assert chain[1].split()[:2] == ["train", "400000"] and chain[-1].startswith("1 jobs, ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("profile", sorted((ROOT / "configs" / "cluster").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_of_a_profile_names_the_interface_of_gloo(profile):
    """Without, gloo takes that of the host's name, which on a compute node is often one that no other node reaches."""
    assert load_schema(ClusterConfig, [str(profile)]).environment.get("GLOO_SOCKET_IFNAME")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"event": "start", "attempt": 1, "previous_ended": None, "lost_steps": 0}, "job 7, the first"),
        (
            {"event": "start", "attempt": 2, "previous_ended": "killed", "lost_steps": 3},
            "job 7, the one before was killed, 3 steps lost",
        ),
        (
            {"event": "start", "attempt": 3, "previous_ended": "SIGUSR2", "lost_steps": 0},
            "job 7, the one before ended: SIGUSR2, 0 steps lost",
        ),
        ({"event": "end", "attempt": 3, "reason": "finished"}, "finished"),
    ],
)
def test_the_demo_says_why_each_start_ended(row, told):
    assert demo().why({"job": "7", **row}) == told


def test_the_demo_says_how_to_look_at_it(monkeypatch, tmp_path, capsys):
    """Before anything is waited for."""
    program, commands = demo(), []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_CONF", "here/slurm.conf")
    monkeypatch.setattr(program, "python", lambda command, *codes: commands.append(command))
    monkeypatch.setattr(program, "boot", lambda folder: None)
    monkeypatch.setattr(program, "disturb", lambda cluster: sys.exit(9))
    monkeypatch.setattr(program.subprocess, "run", lambda *command, **options: commands.append("stop"))
    with pytest.raises(SystemExit):
        program.run_demo()
    told = capsys.readouterr().out
    assert "slurm/sweep.py" in commands[-2] and commands[-1] == "stop"
    for line in ("export SLURM_CONF=here/slurm.conf ", "squeue", "python slurm/status.py demo/slurm/sweep --watch"):
        assert line in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*DEMO,), "no sbatch on PATH"),
        ((*DEMO, "--nodes", "3"), "--nodes: 3, but profile demo has 1 to 2"),
        (
            ("--cluster", "configs/cluster/h100.yaml", "--tasks-per-node", "16"),
            "--tasks-per-node: 16, but a node of profile h100 has 8 GPUs",
        ),
        (
            (*DEMO, "--tasks-per-node", "3", "model.hidden_size=48", "parallel.tensor_parallel_size=2"),
            "parallel.tensor_parallel_size: 2 does not divide 3 devices, 3 on a node, within which it must stay; "
            "valid: 1, 3",
        ),
        ((*DEMO, "--nodes", "2", "batch.global_batch_size=3"), "--nodes: 2 x 2 tasks are 4 data-parallel ranks for 3"),
        (("--cluster", "nowhere.yaml"), "nowhere.yaml: no such config file"),
        ((*DEMO, "data.shards=nowhere"), "nowhere/index.json: no such index"),
        ((*DEMO, "model.in_channels=4"), "model.in_channels: the config says 4, the shards in"),
        (
            (*DEMO, "evaluation.points=1", "evaluation.features=setup.cfg"),
            "evaluation.reference: needed with evaluation.features",
        ),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_written(tmp_path, digits_shards, arguments, message):
    result = submit(tmp_path / "run", digits_shards, *arguments)
    assert result.returncode == 2 and result.stderr.startswith(f"error: {message}"), result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_directory_of_another_config_is_refused(tmp_path, digits_shards):
    claim(load_config([*OVERRIDES, f"run.dir={tmp_path / 'run'}"]))
    result = submit(tmp_path / "run", digits_shards, *DEMO, "optim.lr=0.5")
    assert result.returncode == 2 and "optim.lr: 0.001 there, 0.5 here" in result.stderr


def test_a_full_disk_is_said(tmp_path, digits_shards):
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=8", "tmpfs", tmp_path / "disk"]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        (tmp_path / "disk" / "ballast").write_bytes(bytes(4096))
        result = submit(tmp_path / "disk" / "run", digits_shards, "--cluster", "local")
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)
    assert result.returncode == 2, result.stderr
    assert result.stderr == f"error: run.dir: {tmp_path}/disk/run: cannot be written (No space left on device)\n"


def test_local_runs_the_same_job_on_this_machine(tmp_path, digits_shards):
    run = RunDir(tmp_path / "run")
    result = submit(run.path, digits_shards, "--cluster", "local", "--tasks-per-node", "2", "run.steps=3")
    assert result.returncode == 0, result.stdout + result.stderr
    assert run.checkpoints()[-1].step == 3
    assert [row.get("reason") for row in read_jsonl(run.attempts)] == [None, "reached step 3"]
    again = submit(run.path, digits_shards, "--cluster", "local", "--tasks-per-node", "2", "run.steps=3")
    assert again.returncode == 0 and "finished before" in again.stdout
