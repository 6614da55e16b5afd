"""Checks of values; a mistake is a UserError with the key's full path and what would be valid.

A field of a config says where it is declared what is valid, and its section checks that on construction:

    class RunConfig(Section, path="run"):
        steps: int = number(400000, least=1)
        device: str = one_of("auto", "cpu", "cuda")

None and an empty list pass; of a list every entry is checked. Whatever is declared, a section holds no text with
control characters (a line break would be a line of its own in a batch script), no text longer than a path can be, and
no number that is not finite or that 64 bits do not hold.
"""

import unicodedata
from dataclasses import field, fields, replace
from typing import Any, ClassVar

from fitscale.config.errors import UserError

MOST_CHARACTERS = 4096  # of a text: Linux's longest path
_YAML_WORDS = {"True": "on", "False": "off"}
_BREAKING = ("Cc", "Cs", "Zl", "Zp")  # control characters, halves of pairs, line and paragraph separators


def choice(key: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise UserError(f"{key}: {value!r} is not one of {', '.join(valid)}")


def at_least(key: str, value: float, least: float) -> None:
    if not value >= least:
        raise UserError(f"{key}: {value} is too small, the least is {least}")


def check_plain(key: str, value: Any) -> None:
    """Raises UserError for a text or number, at any depth of lists and dicts, that no section may hold."""
    if isinstance(value, list | tuple):
        for item in value:
            check_plain(key, item)
    elif isinstance(value, dict):
        for name, item in value.items():
            check_plain(key, name)
            check_plain(f"{key}.{name}", item)
    elif isinstance(value, str):
        if any(unicodedata.category(character) in _BREAKING for character in value):
            raise UserError(f"{key}: {value!r} holds a line break or another control character")
        if len(value) > MOST_CHARACTERS:
            raise UserError(f"{key}: {len(value):,} characters; valid: at most {MOST_CHARACTERS:,}")
    elif isinstance(value, int | float) and not -(2**63) <= value < 2**63:  # not a number is neither
        raise UserError(f"{key}: must be a number from -2^63 to 2^63")


def number(
    default: Any,
    *,
    least: float | None = None,
    below: float | None = None,
    above: float | None = None,
    most: float = 10**12,
) -> Any:
    """A number, or a list of them, of at least `least`, below `below`, above `above` and at most `most`."""
    return _field(default, {"least": least, "below": below, "above": above, "most": most})


def one_of(default: str | None, *others: str) -> Any:
    """One of these words; a default of None means that there is a rule instead."""
    return _field(default, {"choices": others if default is None else (default, *others)})


class Section:
    """Base of a frozen dataclass whose fields are checked; `path` is where it stands in the config."""

    path: ClassVar[str]

    def __init_subclass__(cls, path: str = "", **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if path or not hasattr(cls, "path"):
            cls.path = path

    def __post_init__(self) -> None:
        for one in fields(self):  # type: ignore[arg-type]
            self._read_back(one.name, one.metadata.get("choices", ()))
            key, value = f"{self.path}.{one.name}".lstrip("."), getattr(self, one.name)
            check_plain(key, value)
            for item in value if isinstance(value, list | tuple) else [value]:
                if isinstance(value, list | tuple) and not isinstance(item, str | int | float):
                    raise UserError(f"{key}: {item!r} is no word or number; valid: a list of them")
                if one.metadata and item is not None:
                    _check(key, item, **one.metadata)

    def _read_back(self, name: str, choices: tuple[str, ...]) -> None:
        """Where the words on and off are valid: YAML reads them as true and false."""
        word = _YAML_WORDS.get(getattr(self, name)) if isinstance(getattr(self, name), str) else None
        if word in choices:
            object.__setattr__(self, name, word)


def given(section: Any, **chosen: Any) -> Any:
    """`section` with what is chosen in its place; None is not."""
    return replace(section, **{key: value for key, value in chosen.items() if value is not None})


def _field(default: Any, rule: dict[str, Any]) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=rule)
    return field(default=default, metadata=rule)


def _check(
    key: str,
    value: Any,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    below: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> None:
    if choices:
        choice(key, value, choices)
    elif least is not None and below is not None and not least <= value < below:
        raise UserError(f"{key}: {value} is outside [{least}, {below})")
    elif least is not None:
        at_least(key, value, least)
    elif above is not None and not value > above:
        raise UserError(f"{key}: {value} must be above {above}")
    if most is not None and value > most:
        raise UserError(f"{key}: {value} is too large, the most is {most:,}")
