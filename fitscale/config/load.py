"""YAML files, merged left to right, then `key=value` overrides, into a checked `Config`. The only door to omegaconf.

A config may come from anybody, so what it says is what is read: no interpolation, through which a value would come from
the environment, and no more values than a config can need, written out or by YAML's aliases.
"""

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fitscale.config.checks import choice
from fitscale.config.errors import UserError, reading
from fitscale.config.schema import MODEL_CONFIGS, Config, ModelConfig

Schema = TypeVar("Schema")

MOST_BYTES = 1 << 18  # of a file
MOST_VALUES = 10_000  # of a file, those that aliases repeat counted each time
MOST_LEVELS = 32
_LONGEST_NAME = 200  # characters of a path or override in a message


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
    return _merge(_schema(MODEL_CONFIGS[family]), sources)  # type: ignore[arg-type] # classes can be hashed


@cache
def _schema(model: type[ModelConfig]) -> Any:
    """The schema of configs whose backbone has this config; a merge leaves it as it is."""
    schema = OmegaConf.structured(Config)
    OmegaConf.set_readonly(schema, False)
    schema.model = model
    OmegaConf.set_readonly(schema, True)
    return schema


def load_schema(schema: type[Schema], arguments: Sequence[str]) -> Schema:
    """`load_config` for any other frozen dataclass (a sweep, a cluster profile)."""
    return _merge(OmegaConf.structured(schema), _read_all(arguments))


def _read_all(arguments: Sequence[Any]) -> list[tuple[str, Any]]:
    """(what it is called, content) of each: sections and files first, then overrides."""
    return [(_named(argument), _read(argument, _named(argument))) for argument in sorted(arguments, key=_is_override)]


def _named(argument: Any) -> str:
    if isinstance(argument, dict):
        return "config"
    return argument if len(argument) <= _LONGEST_NAME else f"{argument[:_LONGEST_NAME]}..."


def _merge(schema: Any, sources: list[tuple[str, Any]]) -> Any:
    merged = deepcopy(schema)
    for argument, content in sources:
        with _told(argument):
            try:
                merged = OmegaConf.unsafe_merge(merged, content)  # without a copy of either
            except TypeError as error:  # a list where a section is due, or the other way round: no key is named
                raise UserError(f"{argument}: {next(_misplaced(merged, content), error)}") from error
    with _told():
        return OmegaConf.to_object(merged)


def _misplaced(schema: Any, content: Any, prefix: str = "") -> Iterator[str]:
    """What is wrong with lists in `content` that are sections in `schema`, and the other way round."""
    if OmegaConf.is_dict(schema) and OmegaConf.is_dict(content):
        for key in content:
            yield from _misplaced(schema.get(key), content.get(key), f"{prefix}.{key}".lstrip("."))
    elif OmegaConf.is_config(schema) and OmegaConf.is_config(content) and type(schema) is not type(content):
        yield f"{prefix}: must hold " + ("a list, [a, b]" if OmegaConf.is_list(schema) else "key: value pairs")


def to_yaml(config: Any) -> str:
    """The resolved config as YAML that `load_schema` reads back to an equal object."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _is_override(argument: Any) -> bool:
    return isinstance(argument, str) and "=" in argument and not argument.endswith((".yaml", ".yml"))


def _read(argument: Any, name: str) -> Any:
    if isinstance(argument, dict):
        return _parsed(name, json.dumps(argument, ensure_ascii=False).encode(errors="replace"))
    if not _is_override(argument):
        return _read_file(argument, name)
    key, _, value = argument.partition("=")
    if key.count(".") >= MOST_LEVELS:
        raise UserError(f"{name}: no key has more than {MOST_LEVELS} parts")
    with _told(name):
        _check(name, value)
        return OmegaConf.from_dotlist([argument])


def _read_file(argument: str, name: str) -> Any:
    path = Path(argument)
    with reading(name):
        if not path.is_file():
            raise UserError(f"{name}: no such config file (an override is written key=value)")
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise UserError(f"{name}: more than {MOST_BYTES} bytes, which no config needs")
    return _parsed(name, data)


def _parsed(argument: str, data: bytes) -> Any:
    with _told(argument):
        text = data.decode()
        _check(argument, text)
        content = OmegaConf.load(io.StringIO(text))
    if not OmegaConf.is_dict(content):
        raise UserError(f"{argument}: must hold key: value pairs")
    return content


def _check(argument: str, text: str) -> None:
    """Raises UserError for YAML that would be far more than it looks, or not what it says, before it is built."""
    counts = [0]  # values so far in each of the lists and sections that are open
    anchors: list[str | None] = [None]
    sizes: dict[str | None, int] = {}  # values of what has an anchor
    for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        size = 0
        if isinstance(event, yaml.CollectionStartEvent):
            counts.append(1)
            anchors.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            size = sizes[anchors.pop()] = counts.pop()
        elif isinstance(event, yaml.AliasEvent):
            size = sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            if "${" in event.value or event.value == "???":
                raise UserError(f"{argument}: {event.value}: values are written out, not as ${{...}} or ???")
        counts[-1] += size
        if counts[-1] > MOST_VALUES or len(counts) > MOST_LEVELS:
            raise UserError(f"{argument}: more than {MOST_VALUES} values, or {MOST_LEVELS} levels of them")


@contextmanager
def _told(argument: str = "") -> Iterator[None]:
    """Turn what yaml and omegaconf raise into a UserError about `argument`."""
    prefix = argument and f"{argument}: "
    try:
        yield
    except OmegaConfBaseException as error:
        raise UserError(f"{prefix}{_explain(error)}") from error
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # numbers of thousands of digits, too
        raise UserError(f"{prefix}not valid YAML ({error})") from error


def _explain(error: OmegaConfBaseException) -> str:
    """omegaconf's first line (which says "did you mean") with the key's full path."""
    first = str(error).splitlines()[0]
    key = getattr(error, "full_key", None)
    return f"{key}: {first}" if key else first
