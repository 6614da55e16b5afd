"""Checks of values; a mistake is a UserError with the key's full path and what would be valid.

A field of a config says where it is declared what is valid, and its section checks that on construction:

    class RunConfig(Section, path="run"):
        steps: int = number(400000, least=1)
        device: str = one_of("auto", "cpu", "cuda")

None and an empty list pass; of a list every entry is checked.
"""

from dataclasses import field, fields, replace
from typing import Any, ClassVar

from fitscale.config.errors import UserError


def choice(key: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise UserError(f"{key}: {value!r} is not one of {', '.join(valid)}")


def at_least(key: str, value: float, least: float) -> None:
    if not value >= least:
        raise UserError(f"{key}: {value} is too small, the least is {least}")


def number(default: Any, *, least: float | None = None, below: float | None = None, above: float | None = None) -> Any:
    """A number, or a list of them, of at least `least`, below `below` and above `above`."""
    return _field(default, {"least": least, "below": below, "above": above})


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
            value = getattr(self, one.name)
            for item in value if isinstance(value, list | tuple) else [value]:
                if one.metadata and item is not None:
                    _check(f"{self.path}.{one.name}".lstrip("."), item, **one.metadata)


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
) -> None:
    if choices:
        choice(key, value, choices)
    elif least is not None and below is not None and not least <= value < below:
        raise UserError(f"{key}: {value} is outside [{least}, {below})")
    elif least is not None:
        at_least(key, value, least)
    elif above is not None and not value > above:
        raise UserError(f"{key}: {value} must be above {above}")
