"""The demo's sizes as a sweep on a private two-node Slurm, disturbed on the way: what `make slurm-demo` runs.

1. Shards and classifier, if the demo has not made them.
2. A two-node cluster on this machine (slurm/local/start.sh).
3. The sweep, submitted once; what to type to look at it meanwhile.
4. While the largest size trains, a job of a higher partition takes both nodes; when it trains again, node2 crashes.
5. The status table until every cell is finished; then how every start of the largest ended.
6. The law of the validation loss and its report, made from the run directories. The cluster is stopped.

The law is not that of the Frechet distance: within these 800 steps the distance falls off a cliff when a size learns
to draw strokes, at another step in every size, which is no power of compute (errors of 50 to 200 %).

    python slurm/demo.py
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from fitscale.config.errors import UserError
from fitscale.config.files import read_jsonl
from fitscale.config.program import exit_code
from fitscale.run.layout import RunDir

SWEEP, PROFILE = "configs/sweep/digits_slurm.yaml", "configs/cluster/demo.yaml"
OUT = Path("demo/slurm")
DATA = {
    Path("demo/shards/index.json"): "tools/make_shards.py digits demo/shards",
    Path("demo/classifier.pt"): "tools/train_digits_classifier.py demo/classifier.pt",
}
LARGEST = RunDir(OUT / "sweep" / "l")
PREEMPT = "--partition=high --nodes=2 --exclusive --time=1 --output=/dev/null"
POLL_S, SHOW_S = 1.0, 20.0
LOOK = """
Look at it from another terminal, in this folder:
    export SLURM_CONF={conf} PATH=$PATH:/usr/sbin:/sbin
    squeue; sinfo
    python slurm/status.py {sweep} --watch
    tail -F {log}"""
REFUSED = 2  # fit_scaling: the points follow no law; the report says why


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    return exit_code(run_demo)


def run_demo() -> None:
    """All of it; the cluster is stopped however it ends."""
    began = time.perf_counter()
    for product, command in DATA.items():
        if not product.exists():
            python(command)
    cluster = (OUT / "cluster").resolve()
    boot(cluster)
    try:
        python(f"slurm/sweep.py {SWEEP} --cluster {PROFILE}")
        print(LOOK.format(conf=os.environ["SLURM_CONF"], sweep=OUT / "sweep", log=LARGEST.log), flush=True)
        disturb(cluster)
        watch()
    finally:
        subprocess.run(["slurm/local/stop.sh", cluster], check=False)
    for row in read_jsonl(LARGEST.attempts):
        print(f"size l, attempt {row['attempt']}, {row['event']} at step {row['step']}: {why(row)}")
    python(f"tools/collect_runs.py {OUT}/sweep -o {OUT}/runs.csv")
    python(f"tools/fit_scaling.py {OUT}/runs.csv --metric validation_loss --law power -o {OUT}/report", REFUSED)
    products = {
        "report": "report/report.html",
        "curves": "report/curves.png",
        "table": "runs.csv",
        "log of l": "sweep/l/log.txt",
    }
    print("\n" + "\n".join(f"{name:<10}{OUT}/{path}" for name, path in products.items()))
    print(f"{'time':<10}{time.perf_counter() - began:.0f} s")


def why(row: dict) -> str:  # type: ignore[type-arg]
    if row["event"] == "end":
        return str(row["reason"])
    if row["attempt"] == 1:
        return f"job {row['job']}, the first"
    ended = {"killed": "was killed"}.get(row["previous_ended"], f"ended: {row['previous_ended']}")
    return f"job {row['job']}, the one before {ended}, {row['lost_steps']} steps lost"


def boot(folder: Path) -> None:
    """Start the cluster, and have this process's Slurm commands go to it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    result = run("slurm/local/start.sh", str(folder), capture=True)
    exports = [line.removeprefix("export ") for line in result.splitlines() if line.startswith("export ")]
    os.environ.update(line.split("=", 1) for line in exports)
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def disturb(cluster: Path) -> None:
    """Preempt the largest cell once it trains, and crash one of its nodes once it trains again."""
    if not trains_on():
        return
    print("\n==> a job of a higher partition takes both nodes", flush=True)
    run("sbatch", *PREEMPT.split(), "--wrap=sleep 1")
    if not trains_on():
        return
    print("\n==> node2 crashes, and comes back", flush=True)
    run("slurm/local/stop.sh", str(cluster), "node2")
    run("slurm/local/start.sh", str(cluster), capture=True)


def trains_on() -> bool:
    """Wait until the largest cell has taken steps since it last started; False if it ends before."""
    starts, shown = len(start_rows()), 0.0
    while True:
        rows = start_rows()
        steps = read_jsonl(LARGEST.metrics)
        if len(rows) > starts and steps and steps[-1]["step"] > rows[-1]["step"] + 20:
            return True
        if not run("squeue", "--noheader", "--format", "%i", capture=True).split():
            return False
        shown = show(shown)
        time.sleep(POLL_S)


def start_rows() -> list[dict]:  # type: ignore[type-arg]
    return [row for row in read_jsonl(LARGEST.attempts) if row["event"] == "start"]


def watch() -> None:
    """Show the status table until no job is left.

    Raises:
        UserError: a cell has failed.
    """
    shown = 0.0
    while run("squeue", "--noheader", "--format", "%i", capture=True).split():
        shown = show(shown)
        time.sleep(POLL_S)
    if subprocess.run([sys.executable, "slurm/status.py", OUT / "sweep"], check=False).returncode:
        raise UserError(f"slurm-demo: not every cell of {OUT}/sweep is finished; run it again, it goes on")


def show(last: float) -> float:
    """The status table, if it was last shown `SHOW_S` ago; returns when it was shown last."""
    if time.monotonic() < last + SHOW_S:
        return last
    print(flush=True)
    subprocess.run([sys.executable, "slurm/status.py", OUT / "sweep"], check=False)
    return time.monotonic()


def python(command: str, *allowed: int) -> None:
    """Run a program of this project; `allowed`: exit codes besides 0 that are no failure."""
    print(f"\n$ python {command}", flush=True)
    run(sys.executable, *command.split(), allowed=allowed)


def run(*command: str, capture: bool = False, allowed: tuple[int, ...] = ()) -> str:
    """Run a command, and return its output if that is captured.

    Raises:
        UserError: it failed.
    """
    result = subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True, check=False)
    if result.returncode and result.returncode not in allowed:
        raise UserError(f"slurm-demo: `{' '.join(command)}` ended with exit code {result.returncode}")
    return result.stdout or ""


if __name__ == "__main__":
    sys.exit(main())
