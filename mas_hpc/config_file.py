"""From a YAML 1.2 file and overrides to a RunConfig, with one clear line per mistake; and the reference of all knobs."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mas_hpc.config import RunConfig, Section
from mas_hpc.errors import ConfigError

ROWS_OF = {"rm": "preferences", "dpo": "preferences", "prm": "steps"}
"""Kind of data that `data.path` alone stands for, by method; gsm8k for the others."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML 1.2 file, apply `a.b=value` overrides, validate. Raises ConfigError naming key, value and remedy."""
    file = Path(path)
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.yaml")], n=3)
        raise ConfigError(f"{file}: no such file; expected a YAML configuration" + (f", perhaps {near}" if near else ""))
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not text in UTF-8 ({error.reason} at byte {error.start}); expected YAML") from None
    raw = _parse_yaml(text, str(file)) or {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: expected a mapping of sections, found {type(raw).__name__}")
    for override in sorted(overrides, key=lambda override: not override.partition("=")[0].endswith(".kind")):
        _apply(raw, override)  # a kind first, whatever the order: it clears its section
    _choose_data(raw, keep_warm_start=any(override.startswith("warm_start") for override in overrides))
    return validate(raw)


def validate(raw: dict[str, Any]) -> RunConfig:
    """Build the typed config from plain data. Raises ConfigError with one line per problem."""
    try:
        return RunConfig.model_validate(_tuples(raw))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(problem) for problem in error.errors())) from None


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _apply(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"{override!r}: expected an override of the form section.key=value")
    *sections, leaf = key.split(".")
    for section in sections:
        child = raw.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{override!r}: {section} is a value, not a section")
        raw = child
    value = _parse_yaml(text, override)
    if leaf == "kind" and raw.get("kind", value) != value:
        raw.clear()  # another variant has other keys
    raw[leaf] = value


def _choose_data(raw: dict[str, Any], *, keep_warm_start: bool) -> None:
    """data.path alone means the rows that the method learns from, instead of the file's generator and its warm start."""
    data, method = raw.get("data"), raw.get("method")
    if not isinstance(data, dict) or "path" not in data or data.get("kind", "ring") not in ("ring", "addition"):
        return
    kind = str(method.get("kind")) if isinstance(method, dict) else ""
    rest = {key: value for key, value in data.items() if key not in ("kind", "num_digits", "modulus")}  # the generators' own
    raw["data"] = {"kind": ROWS_OF.get(kind, "gsm8k"), **rest}
    if not keep_warm_start:
        raw.pop("warm_start", None)


def _tuples(value: Any) -> Any:
    """YAML lists become the tuples that strict frozen sections hold; whole numbers stay whole."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _explain(problem: Any) -> str:
    kinds = {_kind(section) for field in RunConfig.model_fields.values() for section in _sections(field.annotation)}
    path = [str(part) for part in problem["loc"] if part not in kinds]
    where = ".".join(path)
    if problem["type"] == "extra_forbidden":
        names = sorted(_fields_at(problem["loc"][:-1]))
        near = difflib.get_close_matches(path[-1], names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {names}"
        return f"{where}: unknown key; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if not where:
        return message
    if problem["type"] == "missing":
        return f"{where}: required, and absent; add {where}=..."
    if isinstance(problem["input"], dict) and problem["type"] == "value_error":
        return f"{where}.{message}"  # about keys of the section, which the message names
    return f"{where}={problem['input']!r}: {message}"


def _fields_at(location: Sequence[Any]) -> set[str]:
    """Names of the keys that the section at `location` takes: field names, list indices and kinds lead to it."""
    annotation: Any = RunConfig
    for part in location:
        sections = {_kind(section): section for section in _sections(annotation)}
        if part in sections:
            annotation = sections[part]
        elif not isinstance(part, int):
            annotation = annotation.model_fields[part].annotation
    return {field for section in _sections(annotation) for field in section.model_fields}


def _kind(section: type[Section]) -> Any:
    field = section.model_fields.get("kind")
    return field.default if field else None


def _sections(annotation: Any) -> list[type[Section]]:
    """The section classes inside an annotation such as A | B | None, Annotated or tuple[A, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def _meaning(section: type[Section], name: str) -> str:
    """The line under the field, or under the one that it overrides."""
    bases = (base for base in section.__mro__ if issubclass(base, Section) and name in base.model_fields)
    return next((text for base in bases if (text := base.model_fields[name].description)), "")


def knobs() -> list[tuple[str, str, str, str]]:
    """All leaf knobs as (key, type, default, meaning), in the order of this file."""
    rows = []

    def walk(section: type[Section], prefix: str, variant: str) -> None:
        for name, field in section.model_fields.items():
            inner = _sections(field.annotation)
            kind = _type_name(field.annotation)
            if inner and not str(field.annotation).startswith("tuple"):
                for child in inner:
                    walk(child, f"{prefix}{name}.", f" ({_kind(child)})" if len(inner) > 1 else "")
                continue
            default = "required" if field.is_required() else repr(field.default)
            rows.append((f"{prefix}{name}{variant}", kind, default, _meaning(section, name)))
            for child in inner:
                walk(child, f"{prefix}{name}[].", "")

    walk(RunConfig, "", "")
    return rows
