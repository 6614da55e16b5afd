"""YAML files, merged left to right, then `key=value` overrides, into a checked `Config`. The only door to omegaconf."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fitscale.config.checks import choice
from fitscale.config.errors import UserError
from fitscale.config.schema import MODEL_CONFIGS, Config, ModelConfig

Schema = TypeVar("Schema")


def load_config(arguments: Sequence[str | dict[str, Any]]) -> Config:
    """Merge `arguments` in their order: sections as a dict, paths of YAML files, and dotted `key=value` overrides.

    Raises:
        UserError: a file is missing or no YAML, a key is unknown, a value has the wrong type or cannot be right.
    """
    sources = _read_all(arguments)
    models = [content.get("model") for _, content in sources]
    families = [model.family for model in models if OmegaConf.is_dict(model) and "family" in model]
    family = families[-1] if families else ModelConfig.family
    choice("model.family", family, tuple(MODEL_CONFIGS))
    schema = OmegaConf.structured(Config)
    OmegaConf.set_readonly(schema, False)
    schema.model = MODEL_CONFIGS[family]
    OmegaConf.set_readonly(schema, True)
    return _merge(schema, sources)


def load_schema(schema: type[Schema], arguments: Sequence[str]) -> Schema:
    """`load_config` for any other frozen dataclass (a sweep, a cluster profile)."""
    return _merge(OmegaConf.structured(schema), _read_all(arguments))


def _read_all(arguments: Sequence[Any]) -> list[tuple[str, Any]]:
    """(what it is called, content) of each: sections and files first, then overrides."""
    return [
        (argument if isinstance(argument, str) else "config", _read(argument))
        for argument in sorted(arguments, key=_is_override)
    ]


def _merge(merged: Any, sources: list[tuple[str, Any]]) -> Any:
    for argument, content in sources:
        try:
            merged = OmegaConf.merge(merged, content)
        except OmegaConfBaseException as error:
            raise UserError(f"{argument}: {_explain(error)}") from error
    try:
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(_explain(error)) from error


def to_yaml(config: Any) -> str:
    """The resolved config as YAML that `load_schema` reads back to an equal object."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _is_override(argument: Any) -> bool:
    return isinstance(argument, str) and "=" in argument and not argument.endswith((".yaml", ".yml"))


def _read(argument: Any) -> Any:
    if isinstance(argument, dict):
        return OmegaConf.create(argument)
    if not _is_override(argument):
        return _read_file(argument)
    try:
        return OmegaConf.from_dotlist([argument])
    except YAMLError as error:
        raise UserError(f"{argument}: the value is not valid YAML ({error})") from error


def _read_file(argument: str) -> Any:
    path = Path(argument)
    if not path.is_file():
        raise UserError(f"{argument}: no such config file (an override is written key=value)")
    try:
        content = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{argument}: not valid YAML ({error})") from error
    if not OmegaConf.is_dict(content):
        raise UserError(f"{argument}: must hold key: value pairs")
    return content


def _explain(error: OmegaConfBaseException) -> str:
    """omegaconf's first line (which says "did you mean") with the key's full path."""
    first = str(error).splitlines()[0]
    key = getattr(error, "full_key", None)
    return f"{key}: {first}" if key else first
