"""YAML files, merged left to right, then `key=value` overrides, into a checked `Config`. The only door to omegaconf.

A config may come from anybody, so what it says is what is read: no interpolation, through which a value would come from
the environment, and no more values than a config can need, written out or by YAML's aliases.
"""

import io
import json
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

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
    return load_schema(Config, arguments)


def load_schema(schema: type[Schema], arguments: Sequence[str | dict[str, Any]]) -> Schema:
    """`load_config` for any frozen dataclass (a sweep, a cluster profile)."""
    files = tuple((_named(one), _text(one)) for one in arguments if not _is_override(one))
    overrides = [(_named(one), _override(str(one))) for one in arguments if _is_override(one)]
    merged = pickle.loads(_merged(schema, _family(overrides), files))  # type: ignore[arg-type] # classes can be hashed
    for name, content in overrides:
        merged = _merge(merged, name, content)
    with _told():
        return cast(Schema, OmegaConf.to_object(merged))


@lru_cache(maxsize=16)
def _merged(schema: type, family: str | None, files: tuple[tuple[str, str], ...]) -> bytes:
    """`schema` with these files and sections, (what it is called, text) of each, merged into it.

    `family`: of the model, if an override names it.

    Pickled: to copy it so takes a sixth of a deep copy's time. Kept, because the cells of a sweep share their files.
    """
    contents = [(name, _parsed(name, text)) for name, text in files]
    merged = pickle.loads(_schema(schema, (family or _family(contents)) if schema is Config else None))
    for name, content in contents:
        merged = _merge(merged, name, content)
    return pickle.dumps(merged)


@cache
def _schema(schema: type, family: str | None) -> bytes:
    """The empty config of a `schema`, pickled; of runs, with the model of this family (None = the default one)."""
    empty = OmegaConf.structured(schema)
    if schema is Config:
        OmegaConf.set_readonly(empty, False)
        empty.model = MODEL_CONFIGS[family or ModelConfig.family]
        OmegaConf.set_readonly(empty, True)
    return pickle.dumps(empty)


def _family(contents: Sequence[tuple[str, Any]]) -> Any:
    """The family that these name last, which there is; None if none does."""
    models = [content.get("model") for _, content in contents]
    families = [model.family for model in models if OmegaConf.is_dict(model) and "family" in model]
    for family in families[-1:]:
        choice("model.family", family, tuple(MODEL_CONFIGS))
    return families[-1] if families else None


def _named(argument: Any) -> str:
    if isinstance(argument, dict):
        return "config"
    return argument if len(argument) <= _LONGEST_NAME else f"{argument[:_LONGEST_NAME]}..."


def _merge(merged: Any, argument: str, content: Any) -> Any:
    """`merged` with `content`, which is called `argument`, merged into it; neither is of use afterwards."""
    with _told(argument):
        try:
            return OmegaConf.unsafe_merge(merged, content)  # without a copy of either
        except TypeError as error:  # a list where a section is due, or the other way round: no key is named
            raise UserError(f"{argument}: {next(_misplaced(merged, content), error)}") from error


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


def _override(argument: str) -> Any:
    name, (key, _, value) = _named(argument), argument.partition("=")
    if key.count(".") >= MOST_LEVELS:
        raise UserError(f"{name}: no key has more than {MOST_LEVELS} parts")
    with _told(name):
        _check(name, value)
        return OmegaConf.from_dotlist([argument])


def _text(argument: str | dict[str, Any]) -> str:
    """The YAML of a file, or of sections."""
    if isinstance(argument, dict):
        return json.dumps(argument, ensure_ascii=False).encode(errors="replace").decode()
    name, path = _named(argument), Path(argument)
    with reading(name):
        if not path.is_file():
            raise UserError(f"{name}: no such config file (an override is written key=value)")
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise UserError(f"{name}: more than {MOST_BYTES} bytes, which no config needs")
    with _told(name):
        return data.decode()


def _parsed(argument: str, text: str) -> Any:
    with _told(argument):
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
