"""Checks of single values; each raises UserError with the key's full path and what would be valid."""

from fitscale.config.errors import UserError


def choice(key: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise UserError(f"{key}: {value!r} is not one of {', '.join(valid)}")


def at_least(key: str, value: float, least: float) -> None:
    if not value >= least:
        raise UserError(f"{key}: {value} is too small, the least is {least}")


def between(key: str, value: float, low: float, high: float) -> None:
    if not low <= value < high:
        raise UserError(f"{key}: {value} is outside [{low}, {high})")
