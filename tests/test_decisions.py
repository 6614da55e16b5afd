"""docs/decisions.md: every entry has its line in the index, in the same order, and its links lead somewhere."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "decisions.md").read_text()


def anchor(heading: str) -> str:
    """The fragment that a heading has where Markdown is shown: lower case, hyphens for spaces, no punctuation."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_index_lists_every_entry_under_its_room():
    index, entries = TEXT.split("## Index\n")[1].split("\n## ", 1)
    listed = re.findall(r"^\*\*(.+)\*\*$|^- (\S+ \[.+\])\((.+)\)$", index, re.M)
    written = re.findall(r"^## (.+)$|^### (.+)$", "\n## " + entries, re.M)
    assert [(room, line.replace("[", "").replace("]", "")) for room, line, _ in listed] == written
    assert [link for _, _, link in listed if link] == [f"#{anchor(entry)}" for _, entry in written if entry]


def test_links_lead_to_headings():
    links = re.findall(r"\]\(([\w./]*)#([^)]+)\)", TEXT)
    assert len(links) > 40
    for file, fragment in links:
        headings = re.findall(r"^#+ (.+)$", (DOCS / (file or "decisions.md")).read_text(), re.M)
        assert fragment in map(anchor, headings), f"{file}#{fragment}"
