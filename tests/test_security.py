"""docs/security.md names tests that exist, and all on shards; the README says what of foreign files is a program."""

import re
from collections import Counter

import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "security.md").read_text()
README = (ROOT / "README.md").read_text()
UNTRUSTED_SHARDS = ROOT / "tests" / "test_untrusted_shards.py"


def defined(*files: str) -> set[str]:
    """The names of the test functions in these files below tests/; of all files if none is given."""
    paths = [ROOT / "tests" / file for file in files] or list((ROOT / "tests").rglob("test_*.py"))
    return {name for path in paths for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}


def test_every_test_that_the_page_names_is_there():
    named = set(re.findall(r"test_\w+(?!\.py)\b", TEXT)) - {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(named) > 30 and not named - defined()
    files = set(re.findall(r"test_\w+\.py", TEXT))
    assert files and not files - {path.name for path in (ROOT / "tests").rglob("test_*.py")}


def test_every_part_of_a_name_that_the_page_gives_is_of_one_test_on_shards():
    """Its section on shards gives the telling part of a test's name, without test_."""
    section = TEXT.split("## Shards and indexes\n")[1].split("\n## ")[0]
    parts = re.findall(r"`([a-z_0-9]{8,})`", section.split("brackets.\n")[1])
    names = defined(UNTRUSTED_SHARDS.name)
    found = Counter({part: sum(part in name for name in names) for part in parts if "_" in part})
    assert len(found) > 15 and not [part for part, count in found.items() if count == 0]
    tested = {name for part in found for name in names if part in name}
    assert tested >= names - {"test_whatever_is_changed_there_is_an_answer_or_one_line"}, (
        "a test that nobody is told of"
    )


@pytest.mark.parametrize(
    "told",
    [
        "A TorchScript network is a program",
        "evaluation.trusted=[SHA256]",
        "sha256sum",
        "stabilityai/sd-vae-ft-ema",
        "inception-2015-12-05.pt",
        "VIRTUAL_imagenet256_labeled.npz",
        "data.latent.vae=",
        "apptainer build fitscale.sif slurm/fitscale.def",
    ],
)
def test_the_readme_says_what_runs_and_where_foreign_files_come_from(told):
    assert told in README
