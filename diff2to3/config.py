"""One YAML a run, over a typed schema: a dataclass gives the keys, types and defaults, the file names what
differs.

Unknown keys, wrong types and missing values are errors that name the file, the key and the nearest known one.
A schema checks its own values in ``__post_init__`` with a ValueError, which is reported the same way.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from diff2to3.errors import InputError
from diff2to3.files import read_text, write_atomic

__all__ = ["MISSING", "config_from_dict", "config_to_dict", "load_config", "save_config"]

T = TypeVar("T")


def load_config(schema: type[T], yaml_path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """The schema's defaults, then the file, then ``key.sub=value`` overrides, as an instance of ``schema``.

    Args:
        schema: a dataclass; fields without a value are ``MISSING``.
        yaml_path: the file, or None for the defaults alone.
        overrides: values are read as YAML: ``lr=1e-4``, ``sets=[a, b]``, ``name=null``.

    Raises:
        InputError: no such file, not YAML, an unknown key, a wrong type or value, or a required key not
            given.
    """
    config = OmegaConf.structured(schema)
    if yaml_path is not None:
        config = _merge(schema, config, _read(Path(yaml_path)), str(yaml_path))
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip():
            raise InputError(f"{override!r}: expected key=value")
        try:
            parsed = OmegaConf.from_dotlist([override])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise InputError(f"{override!r}: {_one_line(error)}") from error
        config = _merge(schema, config, parsed, repr(override))
    return _instantiate(schema, config, str(yaml_path or "configuration"))


def config_from_dict(schema: type[T], values: dict[str, Any], origin: str = "configuration") -> T:
    """An instance of ``schema`` from plain values, checked as :func:`load_config` does; ``origin`` names
    them."""
    config = _merge(schema, OmegaConf.structured(schema), OmegaConf.create(values), origin)
    return _instantiate(schema, config, origin)


def config_to_dict(config: Any) -> dict[str, Any]:
    """The plain values of a schema instance: dicts, lists, numbers, strings, booleans and None."""
    if not dataclasses.is_dataclass(config):
        raise ValueError(f"config: expected a dataclass instance, got {type(config).__name__}")
    values = _plain(OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True))
    assert isinstance(values, dict)
    return values


def save_config(config: Any, path: str | Path) -> None:
    """Write every value of a schema instance as YAML that :func:`load_config` reads back to the same
    instance."""
    text = yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True, width=100)
    write_atomic(Path(path), text)


def _plain(value: Any) -> Any:
    """Tuples, which a file cannot tell from lists, as lists."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _read(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(io.StringIO(read_text(path)))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{path}: not valid YAML: {_one_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise InputError(f"{path}: expected keys with values at the top level")
    return loaded


def _merge(schema: type, config: Any, values: Any, origin: str) -> Any:
    try:
        return OmegaConf.merge(config, values)
    except ConfigKeyError as error:
        key = str(error.full_key or error.key)
        raise InputError(f"{origin}: unknown key {key!r}{_hint(key, error.object_type)}") from error
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        field = getattr(error, "full_key", None)
        where = f"{origin}: {field}" if field and field not in origin else origin
        raise InputError(f"{where}: {_one_line(error)}") from error


def _instantiate(schema: type[T], config: Any, origin: str) -> T:
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        names = ", ".join(missing)
        raise InputError(f"{origin}: no value for {names}; set it in the file or with {missing[0]}=VALUE")
    try:
        made = OmegaConf.to_object(config)
    except (OmegaConfBaseException, ValueError) as error:
        raise InputError(f"{origin}: {_one_line(error)}") from error
    assert isinstance(made, schema)
    return made


def _hint(key: str, owner: Any) -> str:
    """The nearest field of the dataclass that lacks ``key``, or all of them when none is near."""
    if not (isinstance(owner, type) and dataclasses.is_dataclass(owner)):
        return ""
    known = [field.name for field in dataclasses.fields(owner)]
    near = difflib.get_close_matches(key.rsplit(".", 1)[-1], known, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def _one_line(error: Exception) -> str:
    message = str(getattr(error, "msg", None) or error)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        message = f"line {error.problem_mark.line + 1}: {error.problem}"
    lines = [line.strip() for line in str(message).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
