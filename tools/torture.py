"""Disturb real training runs and conversions for a stated time, and tell what held.

    python tools/torture.py --minutes 30
    python tools/torture.py --minutes 0      one try of each kind, of those that need one process

Every try is a real command (torchrun and gloo where it has two ranks) on handwritten digits, disturbed at random:

    kill       SIGKILL of the launcher or of a rank, up to three times, anywhere between start and end
    signal     SIGINT or SIGTERM, once or twice
    limit      no file may grow beyond some bytes: as a quota, while checkpoints, metrics or attempts are written
    disk       the run directory's disk is full (a small tmpfs; needs the right to mount one)
    damage     bits, bytes, lengths, NaNs, contents of one file of a run directory, which then goes on
    shards     the same of one file of a shard set, which is then trained on
    double     two starts of one run at nearly the same time
    evaluate   evaluations of a run while it trains
    convert    a conversion of images whose workers are killed, doubled, or both

What has to hold: a run that is started again until it ends has the weights and metrics of the undisturbed one, byte for
byte; a conversion its shards; damage is told in one line, with exit code 2, or did no harm. The table says how often it
was tried, survived (went on to its end), ended bit-identical, and was noticed. What did not hold keeps its folder,
and beside it what its commands said, and makes the exit code 1.
"""

import argparse
import contextlib
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

from fitscale.config.checks import at_least
from fitscale.config.program import aligned, exit_code

ROOT = Path(__file__).parents[1]
STEPS, SAVE_EVERY = 40, 5
HANG_S = 900.0  # after which a process counts as hanging, however busy the machine
GRACE_S = 90.0  # after the stated time, in which a try may still end
TINY = f"""model.name=tiny model.depth=2 model.hidden_size=48 model.num_heads=2 model.num_classes=10 model.patch_size=1
 model.in_channels=1 data.latent.kind=pixels data.latent.factor=1 data.latent.scaling=1.0 data.num_workers=0
 batch.global_batch_size=16 batch.pack_tokens=2048 optim.lr=1e-3 optim.ema_decays=[0.9] parallel.precision=fp32
 run.device=cpu run.steps={STEPS} checkpoint.every_steps={SAVE_EVERY} evaluation.points=2 evaluation.first_step=20
 evaluation.validation_images=16 data.holdout_fraction=0.1""".split()
LAYOUTS = {
    "1 rank": (1, []),
    "2, ZeRO-1": (2, ["parallel.zero_stage=1"]),
    "2, ZeRO-3": (2, ["parallel.zero_stage=3"]),
    "2, TP": (2, ["parallel.tensor_parallel_size=2"]),
}
SURVIVED, NOTICED, FAILED = ("survived", "bit-identical"), ("noticed",), ("DID NOT HOLD",)  # columns of the table
GARBAGE = (b"", b"[]\n", b"{}\n", b"null\n", b'{"step": "x"}\n', b"\xff\xfe\x00", b"[" * 100_000)


class OutOfTimeError(Exception):
    """The stated time is over: the try does not count."""


class DidNotHoldError(Exception):
    """What happened that must not."""


class OtherEndError(DidNotHoldError):
    """It went on to its end, which is not the undisturbed one."""


class Started:
    """A command; what it prints is kept, and every process of it ends with `end`, whoever's child it has become."""

    of_try: ClassVar[list["Started"]] = []  # all that the present try has started

    def __init__(self, command: list[str], most_bytes: int | None = None) -> None:
        self.of_try.append(self)
        self.command = command
        self.mark = f"TORTURED={uuid.uuid4().hex}"  # in the environment of all its processes
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        added = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **dict([self.mark.split("=")])}
        limits = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (most_bytes, most_bytes)) if most_bytes else None
        self.process = subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | added,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=limits,
        )
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self.lines.extend, args=[self.process.stdout], daemon=True)
        self.reader.start()

    def living(self) -> list[int]:
        """Its processes: the launcher and its ranks."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if self.mark.encode() in path.read_bytes():
                    found.append(int(path.parent.name))
        return sorted(found)

    def kill(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill what is left of it, and have all that it said."""
        for pid in self.living():
            self.kill(pid)
        self.process.wait()
        self.reader.join(10)

    @property
    def text(self) -> str:
        return "".join(self.lines)


@dataclass
class Bench:
    """Where tries are made: folders, chance, the clock, and the undisturbed results."""

    folder: Path
    chance: random.Random
    deadline: float  # by time.monotonic
    calm: dict[str, tuple[str, str]] = field(default_factory=dict)  # layout -> hashes of weights and metrics
    start_s: float = 5.0  # from a command to a run's first step

    def command(self, run: Path, layout: str, *overrides: str, shards: Path | None = None) -> list[str]:
        """`fitscale train`, under torchrun where the layout has two ranks."""
        ranks, keys = LAYOUTS[layout]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        config = [*TINY, *keys, f"data.shards={shards or self.folder / 'digits'}", f"run.dir={run}", *overrides]
        return [*launcher, "-m", "fitscale", "train", *config]

    def ended(self, started: Started) -> int:
        """Its exit code, once it has ended by itself."""
        limit = time.monotonic() + HANG_S
        try:
            while started.process.poll() is None:
                self.sleep(0.05)
                if time.monotonic() > limit:
                    raise DidNotHoldError(f"hangs: no end in {HANG_S:.0f} s")
            return started.process.returncode
        finally:
            started.end()

    def run(self, command: list[str]) -> Started:
        started = Started(command)
        self.ended(started)
        return started

    def sleep(self, seconds: float) -> None:
        if time.monotonic() > self.deadline + GRACE_S:
            raise OutOfTimeError
        time.sleep(seconds)

    def moment(self, started: Started, run: Path) -> None:
        """Wait for a random moment of a run: of its start, or some time after a random step; or for its end."""
        if self.chance.random() < 0.25:
            return self.sleep(self.chance.uniform(0, self.start_s))
        before = time.time()
        step = self.chance.randrange(STEPS)
        metrics = run / "metrics.jsonl"
        while started.process.poll() is None:
            with contextlib.suppress(OSError):
                if metrics.stat().st_mtime > before and metrics.read_bytes().count(b"\n") >= step:
                    break
            self.sleep(0.005)
        self.sleep(self.chance.uniform(0, 0.1))

    def require_end(self, run: Path, layout: str) -> None:
        """One more start has to take the run to its end, with the weights and metrics of the undisturbed one."""
        started = self.run(self.command(run, layout))
        if started.process.returncode:
            raise DidNotHoldError(f"does not go on (exit code {started.process.returncode}): {last(started)}")
        for what, ours, calm in zip(("weights", "metrics"), results(run), self.calm[layout], strict=True):
            if ours != calm:
                raise OtherEndError(f"ended with other {what}")


def last(started: Started) -> str:
    """The last line that it said, of an error if there is one."""
    lines = [line.strip() for line in started.lines if line.strip()]
    errors = [line for line in lines if "rror" in line]
    return (errors or lines or ["without a word"])[-1][:300]


def results(run: Path) -> tuple[str, str]:
    """Hashes of the last checkpoint's weights and optimizer state, and of the metrics."""
    files = sorted((run / "checkpoints" / f"step-{STEPS:08d}").rglob("*.safetensors"))
    return digest(files, run), digest([run / "metrics.jsonl"], run)


def digest(files: list[Path], folder: Path) -> str:
    found = hashlib.sha256()
    for file in files:
        found.update(str(file.relative_to(folder)).encode())
        found.update(file.read_bytes() if file.is_file() else b"missing")
    return found.hexdigest()


def kill(bench: Bench, layout: str, run: Path) -> str:
    times = bench.chance.randint(1, 3)
    for _ in range(times):
        started = Started(bench.command(run, layout))
        try:
            bench.moment(started, run)
            if living := started.living():
                started.kill(bench.chance.choice(living))
            bench.ended(started)
        finally:
            started.end()
    bench.require_end(run, layout)
    return f"killed {times} times"


def send(bench: Bench, layout: str, run: Path) -> str:
    started, sent = Started(bench.command(run, layout)), []
    try:
        bench.moment(started, run)
        for _ in range(bench.chance.randint(1, 2)):
            if started.process.poll() is None:
                sent.append(bench.chance.choice([signal.SIGINT, signal.SIGTERM]))
                started.process.send_signal(sent[-1])
                bench.sleep(bench.chance.uniform(0, 0.2))
        code = bench.ended(started)
    finally:
        started.end()
    bench.require_end(run, layout)
    return f"{', '.join(one.name for one in sent) or 'nothing'}: exit code {code}"


def limit(bench: Bench, layout: str, run: Path) -> str:
    most_bytes = int(10 ** bench.chance.uniform(2.5, 5.5))
    started = Started(bench.command(run, layout), most_bytes)
    code = bench.ended(started)
    require_plain(started, layout)
    bench.require_end(run, layout)
    return f"files up to {most_bytes:,} bytes: exit code {code}"


def disk(bench: Bench, layout: str, run: Path) -> str:
    size = int(10 ** bench.chance.uniform(4.5, 6.5))
    run.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", run], check=True)
    try:
        started = Started(bench.command(run, layout))
        code = bench.ended(started)
        require_plain(started, layout)
        subprocess.run(["mount", "-o", "remount,size=100m", run], check=True)
        bench.require_end(run, layout)
    finally:
        subprocess.run(["umount", "-l", run], check=False)
    return f"{size:,} bytes: exit code {code}"


def require_plain(started: Started, layout: str) -> None:
    """An end in one line: torchrun adds a traceback of its own, so of one rank alone."""
    if layout == "1 rank" and "Traceback" in started.text:
        raise DidNotHoldError(f"a traceback: {last(started)}")


def damage(bench: Bench, layout: str, run: Path) -> str:
    """A copy of a run that is half way, one of whose files changes."""
    half = bench.folder / "half"
    if not half.exists():
        bench.run(bench.command(half, layout, f"run.steps={STEPS // 2}"))
    shutil.copytree(half, run)
    files = [path for path in run.rglob("*") if path.is_file() and path.name != ".lock"]
    return after_damage(bench, layout, run, hurt(bench.chance, bench.chance.choice(sorted(files)), run))


def shards(bench: Bench, layout: str, run: Path) -> str:
    copy = shutil.copytree(bench.folder / "digits", run.with_name(run.name + "-shards"))
    files = sorted(path for path in copy.iterdir() if path.name != "dataset.json")
    told = hurt(bench.chance, bench.chance.choice(files), copy)
    return after_damage(bench, layout, run, told, shards=copy)


def after_damage(bench: Bench, layout: str, run: Path, told: str, shards: Path | None = None) -> str:
    """Train on: the damage is told with exit code 2 and in one line, or the end is the undisturbed one."""
    started = bench.run(bench.command(run, layout, shards=shards))
    code = started.process.returncode
    require_plain(started, layout)
    if code not in (0, 2):
        raise DidNotHoldError(f"{told}: exit code {code}: {last(started)}")
    if code == 0 and results(run)[0] != bench.calm[layout][0]:
        raise OtherEndError(f"{told}: went unnoticed, and ended with other weights")
    return f"{told}: {'harmless' if code == 0 else 'noticed'}"


def hurt(chance: random.Random, path: Path, folder: Path) -> str:
    """Change the file in a random way; returns which, for a person."""
    content = bytearray(path.read_bytes())
    ways = ["bits", "cut", "zeros", "garbage", "gone"] + ["nan"] * 3 * (path.suffix == ".safetensors")
    way = chance.choice(ways if content else ["garbage"])
    place = chance.randrange(len(content)) if content else 0
    if way == "bits":
        for _ in range(chance.choice([1, 50])):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    elif way == "cut":
        del content[place:]
    elif way == "zeros":
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    elif way == "garbage":
        content[:] = chance.choice(GARBAGE)
    elif way == "nan":  # of a float32 in the data behind the header
        header = 8 + int.from_bytes(content[:8], "little")
        place = header + 4 * chance.randrange((len(content) - header) // 4)
        content[place : place + 4] = b"\x00\x00\xc0\x7f"
    path.unlink() if way == "gone" else path.write_bytes(content)
    return f"{path.relative_to(folder)} ({way})"


def double(bench: Bench, layout: str, run: Path) -> str:
    first = Started(bench.command(run, layout))
    try:
        bench.sleep(bench.chance.uniform(0, 1.5 * bench.start_s))
        second = Started(bench.command(run, layout))
        codes = [bench.ended(one) for one in (first, second)]
    finally:
        first.end()
    require_plain(second, layout)
    bench.require_end(run, layout)
    return f"exit codes {codes[0]} and {codes[1]}"


def evaluate(bench: Bench, layout: str, run: Path) -> str:
    started, codes = Started(bench.command(run, layout)), []
    try:
        bench.moment(started, run)
        while started.process.poll() is None and len(codes) < 3:
            one = bench.run(["-m", "fitscale", "evaluate", str(run)])
            require_plain(one, "1 rank")
            codes.append(one.process.returncode)
        bench.ended(started)
    finally:
        started.end()
    bench.require_end(run, layout)
    return f"{len(codes)} evaluations while it trained: exit codes {', '.join(map(str, codes)) or '-'}"


def convert(bench: Bench, layout: str, run: Path) -> str:
    command = [str(ROOT / "tools/make_shards.py"), "images", str(bench.folder / "images"), str(run)]
    command += ["--encoder", "pixels", "--side", "32", "--images-per-shard", "8"]
    calm, killed, doubled = bench.folder / "converted", bench.chance.randint(0, 2), bench.chance.random() < 0.5
    if not calm.exists():
        bench.run([*command[:3], str(calm), *command[4:]])
    shares = [["--worker", str(one), "--workers", "2"] for one in range(2)]
    for kills in range(killed + 1):
        workers = [Started([*command, *share]) for share in shares * (1 + doubled)]
        try:
            if kills < killed:
                bench.sleep(bench.chance.uniform(0, bench.start_s))
                bench.chance.choice(workers).process.kill()
            for worker in workers:
                code = bench.ended(worker)
                if code not in (0, 2, -signal.SIGKILL) or "Traceback" in worker.text:
                    raise DidNotHoldError(f"a worker ends with exit code {code}: {last(worker)}")
        finally:
            for worker in workers:
                worker.end()
    bench.run(command)  # by one worker: whatever is missing
    contents = [digest(sorted(one.glob("*.tar")) + sorted(one.glob("*.np*")), one) for one in (calm, run)]
    if contents[0] != contents[1] or not (run / "index.json").is_file():
        raise OtherEndError("the shards are not those of an undisturbed conversion")
    return f"{killed} kills of {'two starts each of ' * doubled}2 workers"


ALL, ONE = tuple(LAYOUTS), ("1 rank",)
KINDS: dict[str, tuple[Callable[[Bench, str, Path], str], tuple[str, ...]]] = {
    "kill": (kill, ALL),
    "signal": (send, ALL),
    "limit": (limit, ALL),
    "disk": (disk, ONE),
    "damage": (damage, ONE),
    "shards": (shards, ONE),
    "double": (double, ONE),
    "evaluate": (evaluate, ONE),
    "convert": (convert, ("2 workers",)),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="how long; 0 = one try of each one-process kind")
    parser.add_argument("--seed", type=int, default=0, help="of what is tried; moments are the machine's (default: 0)")
    parser.add_argument("--dir", type=Path, help="folder for the tries (default: a new one among temporary files)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    options = parser.parse_args(argv)
    return exit_code(lambda: torture(options))


def torture(options: argparse.Namespace) -> int:
    """Try until the time is over, print the table; 1 if something did not hold."""
    at_least("--minutes", options.minutes, 0)
    began = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the table, and no process left
    folder = Path(tempfile.mkdtemp(prefix="torture-")) if options.dir is None else options.dir.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    deadline = began + 60 * options.minutes if options.minutes else float("inf")
    bench = Bench(folder, random.Random(options.seed), deadline)
    print(f"seed {options.seed}, in {folder}", flush=True)
    tried: Counter[tuple[str, str, str]] = Counter()
    with contextlib.suppress(OutOfTimeError, KeyboardInterrupt):
        prepare(bench)
        for number, (kind, layout) in enumerate(todo(options), 1):
            if time.monotonic() > deadline:
                break
            place = folder / f"{number:04d}-{kind}"
            verdict, told = attempt(bench, kind, layout, place)
            tried.update((kind, layout, one) for one in ("tries", *verdict))
            minutes, seconds = divmod(int(time.monotonic() - began), 60)
            print(
                f"{minutes:3d}:{seconds:02d}  {number:4d}  {kind:<9}{layout:<10} {', '.join(verdict)}: {told}",
                flush=True,
            )
    rows = sorted({key[:2] for key in tried}, key=lambda row: [*KINDS].index(row[0]))
    columns = ("tries", *SURVIVED, *NOTICED, *FAILED)
    cells = [[f"{kind}, {layout}", *(str(tried[kind, layout, one]) for one in columns)] for kind, layout in rows]
    print(f"\n{aligned([['disturbance', *columns], *cells])}")
    failed = sum(count for key, count in tried.items() if key[2] == columns[-1])
    if failed:
        print(f"{failed} did not hold; their folders are in {folder}")
        return 1
    print("everything held: what survived ended bit-identical to the undisturbed" if tried else "nothing was tried")
    if options.dir is None:
        shutil.rmtree(folder)
    return 0 if tried else 1


def attempt(bench: Bench, kind: str, layout: str, place: Path) -> tuple[tuple[str, ...], str]:
    """One try: the columns of the table that it counts in, and what was done; its folder stays if it did not hold."""
    Started.of_try.clear()
    try:
        if layout in LAYOUTS and layout not in bench.calm:
            undisturbed(bench, layout)
        told = KINDS[kind][0](bench, layout, place)
    except DidNotHoldError as error:
        said = (f"$ {' '.join(one.command)}\n{one.text}[exit code {one.process.poll()}]\n" for one in Started.of_try)
        place.with_name(f"{place.name}.txt").write_text("\n".join(said))
        return (*SURVIVED[: isinstance(error, OtherEndError)], *FAILED), f"{error} [{place}]"
    for path in place.parent.glob(f"{place.name}*"):  # with its copy of the shards
        shutil.rmtree(path)
    return (NOTICED if told.endswith(NOTICED) else SURVIVED), told


def prepare(bench: Bench) -> None:
    """Shards of digits, and images to convert."""
    import numpy as np
    from PIL import Image

    if not (bench.folder / "digits").exists():
        bench.run([str(ROOT / "tools/make_shards.py"), "digits", str(bench.folder / "digits")])
    (bench.folder / "images").mkdir(exist_ok=True)
    noise = np.random.default_rng(0)
    for number in range(48):
        pixels = noise.integers(0, 256, (*noise.integers(32, 64, 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(bench.folder / "images" / f"{number}.png")


def undisturbed(bench: Bench, layout: str) -> None:
    """The results to compare with, and how long a start takes here."""
    began, run = time.monotonic(), bench.folder / f"calm-{layout.replace(', ', '-').replace(' ', '-')}"
    started = bench.run(bench.command(run, layout))
    if started.process.returncode:
        raise DidNotHoldError(f"does not even run undisturbed: {last(started)}")
    bench.start_s = max(1.0, time.monotonic() - began - 2)
    bench.calm[layout] = results(run)


def todo(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Kinds and layouts in turn, those of one process more often; without end unless --minutes is 0."""
    kinds = [kind for kind in options.kinds if kind != "disk" or may_mount()]
    cheap = [(kind, KINDS[kind][1][0]) for kind in kinds]
    yield from cheap
    while options.minutes:
        yield from ((kind, layout) for kind in kinds for layout in KINDS[kind][1][1:])
        yield from cheap * 2


def may_mount() -> bool:
    with tempfile.TemporaryDirectory() as place:
        command = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", place]
        may = shutil.which("mount") is not None and not subprocess.run(command, capture_output=True).returncode
        if may:
            subprocess.run(["umount", place], check=False)
        return may


if __name__ == "__main__":
    sys.exit(main())
