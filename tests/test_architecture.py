"""The import rule of docs/architecture.md, read from the source: who may import whom, and who may open which door."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ORDER = ["config", "run", ("data", "parallel", "flow"), "model", "plan", "train", "eval", "jobs", "doctor", "cli"]
BELOW = {
    "prepare": ["config", "run", "data"],
    "scaling": ["config", "run", "model.flops"],
    "__main__": ["cli"],
}
PARTS = {"scaling": ["rows", "fit", "report"]}  # of a room, in the order of its own import rule
DOORS = {
    "megatron": ["fitscale/parallel/"],
    "deepspeed": ["fitscale/parallel/zero.py", "tools/convert_checkpoint.py", "tools/bench_save.py"],
    "submitit": ["slurm/", "fitscale/jobs/"],
    "omegaconf": ["fitscale/config/load.py"],
}
BACKBONES = ("fit", "flag", "dimr")
WITHOUT_TORCH = [
    *("fitscale/config/", "fitscale/run/", "fitscale/plan/", "fitscale/scaling/", "fitscale/cli.py"),
    *(
        f"fitscale/model/{file}.py"
        for file in (
            "__init__",
            "backbone",
            "flops",
            *(f"{one}/{name}" for one in BACKBONES for name in ("config", "spec")),
        )
    ),
    "fitscale/model/common/rope_config.py",
    "fitscale/model/common/quantise_config.py",
]
SCRIPTS = ["slurm", "tools"]


def _may_know_rooms() -> dict[str, list[str]]:
    """Room -> the rooms that it may know: all that stand before it in `ORDER`, or what `BELOW` says."""
    found: dict[str, list[str]] = {}
    for rooms in ORDER:
        known = [*found]
        found |= dict.fromkeys([rooms] if isinstance(rooms, str) else rooms, known)
    found["cli"] = found["api"] = [*found["cli"], "prepare"]
    return found | BELOW


RULE = _may_know_rooms()


def imports(path: Path, root: Path) -> Iterator[str]:
    """Full dotted names that a file imports: at the top, in functions, for type checkers, and by constant strings."""
    package = path.relative_to(root).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = list(package[: len(package) - node.level]) if node.level else []
            module = ".".join(start + ([node.module] if node.module else []))
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _imports_a_constant(node):
            yield str(ast.literal_eval(node.args[0]))


def _imports_a_constant(node: ast.Call) -> bool:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in ("import_module", "__import__") and bool(node.args) and isinstance(node.args[0], ast.Constant)


def violations(root: Path) -> list[str]:
    """One line per import that breaks the rule, `file: import`, in every file under fitscale/, slurm/ and tools/."""
    files = sorted(path for folder in ("fitscale", *SCRIPTS) for path in (root / folder).rglob("*.py"))
    assert files, f"no source under {root}"
    siblings = {path.stem for path in files if path.relative_to(root).parts[0] in SCRIPTS}
    return [
        f"{path.relative_to(root)}: {name}"
        for path in files
        for name in imports(path, root)
        if _breaks(path.relative_to(root), name, siblings)
    ]


def _breaks(path: Path, name: str, siblings: set[str]) -> bool:
    top = name.split(".")[0]
    if top in SCRIPTS or (path.parts[0] in SCRIPTS and top in siblings):
        return True
    if top in DOORS and not path.as_posix().startswith(tuple(DOORS[top])):
        return True
    if top == "torch" and path.as_posix().startswith(tuple(WITHOUT_TORCH)):
        return True
    return top == "fitscale" and path.parts[0] == "fitscale" and not _may_know(path, name)


def _may_know(path: Path, name: str) -> bool:
    owner = path.with_suffix("").parts[1]
    target = name.removeprefix("fitscale").removeprefix(".")
    if owner == "__init__":
        return target == "model"  # registers the backbones
    if not target:
        return True
    parts = PARTS.get(owner, [])
    own, other = path.parts[2:3], target.split(".")[1:2]
    if own and other and target.split(".")[0] == owner and {*own, *other} <= {*parts}:
        return parts.index(other[0]) <= parts.index(own[0])
    return any(target == known or target.startswith(f"{known}.") for known in [owner, *RULE[owner]])


def test_import_rule_holds():
    assert violations(ROOT) == []


def test_every_package_has_a_rule():
    found = {
        path.with_suffix("").name for path in (ROOT / "fitscale").iterdir() if path.suffix == ".py" or path.is_dir()
    }
    assert found - {"__pycache__", "__init__"} == set(RULE)


def waits(path: Path) -> list[str]:
    """Copies `.to(device)` of a file, `.to(x.device)` too: the host waits in each for all that the device has to do."""
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    copies = (call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in ("to", "cuda"))
    return [
        f"{path.name}:{call.lineno}" for call in copies if "device" in ast.unparse(call) or call.func.attr == "cuda"
    ]


def test_what_a_step_gives_the_device_goes_by_send(tmp_path):
    """Of a pack's computation nothing waits; `flow/transfer.py` knows how."""
    files = [ROOT / "fitscale/train/step.py", *(ROOT / "fitscale/flow").glob("*.py")]
    files += (ROOT / "fitscale/model").rglob("*.py")
    assert [place for path in files if path.name != "transfer.py" for place in waits(path)] == []
    (tmp_path / "a.py").write_text("x = y.to(z.device, t)\n")
    assert waits(tmp_path / "a.py") == ["a.py:1"]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("fitscale/config/a.py", "from fitscale.data import batch_plan"),
        ("fitscale/data/a.py", "import fitscale.model.flops"),
        ("fitscale/flow/a.py", "def f():\n    from fitscale.parallel.groups import Topology"),
        ("fitscale/parallel/a.py", "from ..data import batch_plan"),
        ("fitscale/model/a.py", "from fitscale import train"),
        ("fitscale/train/a.py", "if TYPE_CHECKING:\n    from fitscale.eval.generate import generate"),
        ("fitscale/eval/a.py", "import fitscale.cli"),
        ("fitscale/eval/a.py", "from fitscale.scaling import laws"),
        ("fitscale/run/a.py", "from fitscale.data import index"),
        ("fitscale/plan/a.py", "from fitscale.train import trainer"),
        ("fitscale/plan/a.py", "import torch"),
        ("fitscale/train/a.py", "from fitscale.jobs import launch"),
        ("fitscale/train/a.py", "import submitit"),
        ("fitscale/data/a.py", "from fitscale.prepare import sources"),
        ("fitscale/prepare/a.py", "from fitscale.train import trainer"),
        ("fitscale/scaling/a.py", "from fitscale.jobs import ladder"),
        ("fitscale/scaling/a.py", "from fitscale.model import fit"),
        ("fitscale/scaling/a.py", "import fitscale.model"),
        ("fitscale/scaling/a.py", "import torch"),
        ("fitscale/scaling/rows/a.py", "from fitscale.scaling.fit import laws"),
        ("fitscale/scaling/fit/a.py", "from fitscale.scaling.report.content import number"),
        ("fitscale/model/a.py", "from megatron.core import parallel_state"),
        ("fitscale/train/a.py", "import importlib\nimportlib.import_module('deepspeed.runtime')"),
        ("fitscale/eval/a.py", "import submitit"),
        ("fitscale/cli.py", "from omegaconf import OmegaConf"),
        ("fitscale/eval/a.py", "from tools import make_shards"),
        ("tools/a.py", "import omegaconf"),
        ("tools/a.py", "import b"),
        ("fitscale/__init__.py", "from fitscale.config import load"),
    ],
)
def test_a_planted_violation_is_caught(tmp_path, file, line):
    for name, text in {"tools/b.py": "", file: line}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert [found.split(":")[0] for found in violations(tmp_path)] == [file]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("fitscale/scaling/a.py", "from fitscale.model import flops"),
        ("fitscale/scaling/a.py", "from fitscale.model.flops import parameters"),
        (
            "fitscale/scaling/report/a.py",
            "from fitscale.scaling.rows import table\nfrom fitscale.scaling.fit import laws",
        ),
        ("fitscale/model/a.py", "from .rope import rope_tables\nfrom ..parallel import layers"),
        ("fitscale/parallel/zero.py", "import deepspeed"),
        ("fitscale/parallel/groups.py", "from megatron.core import parallel_state"),
        ("fitscale/jobs/job.py", "import submitit"),
        ("slurm/a.py", "import submitit\nfrom fitscale.eval import commands"),
    ],
)
def test_what_the_rule_allows_passes(tmp_path, file, line):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(line + "\n")
    assert violations(tmp_path) == []
