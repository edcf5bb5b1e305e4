"""Job files: TOML read into frozen pydantic models, with `--set section.key=value` on top.

A section is a `Section` subclass; a job is a `Section` of sections. Every complaint is one line that names the file
and the dotted key, and unknown keys come with a suggestion.
"""

import difflib
import hashlib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from pixart_data.errors import ConfigError


class Section(BaseModel):
    """A part of a job file: frozen, strictly typed, closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


T = TypeVar("T", bound=Section)


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def _absolute_if_local(model: str) -> str:
    """Hub ids (`owner/name`) stay; what is a folder here, or is spelt as a path, becomes absolute."""
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1 or os.path.isdir(model)
    return _absolute(model) if looks_local else model


LocalPath = Annotated[str, AfterValidator(_absolute)]
"""A path, made absolute when the job file is read: a job can then be sent to another machine on shared storage."""

ModelId = Annotated[str, AfterValidator(_absolute_if_local)]
"""A hub id such as `llava-hf/llava-1.5-7b-hf`, or a local folder that `from_pretrained` loads."""


def load(
    cls: type[T],
    path: Path | None,
    overrides: Sequence[str] = (),
    given: dict[str, Any] | None = None,
    flags: Mapping[str, str] | None = None,
) -> T:
    """Build a job from its file, the values a command line gave, and `--set` overrides, in that order.

    Args:
        path: The TOML job file; None starts from an empty one.
        overrides: Strings `section.key=value`; the value is read as TOML, and as a bare string if it is not TOML.
        given: A tree of values that replaces what the file says.
        flags: What to type for a key that has a flag of its own, for complaints; others are given with `--set`.

    Raises:
        ConfigError: With one line for each problem.
    """
    where = str(path) if path else "command line"
    tree = _merge(_read(path) if path else {}, given or {})
    for item in overrides:
        _apply(tree, item)
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {line}" for line in _complaints(cls, error, flags or {}))) from None


def resolved_toml(job: Section) -> str:
    """Render a job with every default filled in, as a job file that repeats the run."""
    import tomli_w

    return tomli_w.dumps(job.model_dump(exclude_none=True))


def digest(value: Any) -> str:
    """Return the sha256 of a JSON-able value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such job file; the shipped ones are listed by `pixart --help`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a job file: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply(tree: dict[str, Any], item: str) -> None:
    dotted, sign, text = item.partition("=")
    *parents, leaf = dotted.strip().split(".")
    if not sign or not leaf:
        raise ConfigError(f"--set {item}: expected section.key=value, e.g. --set cluster.num_workers=2")
    node = tree
    for name in parents:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {item}: {name} is a value, not a section")
        node = child
    try:
        node[leaf] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        node[leaf] = text


def _complaints(cls: type[Section], error: ValidationError, flags: Mapping[str, str]) -> Iterator[str]:
    problems = error.errors()
    unknown = [problem["loc"] for problem in problems if problem["type"] == "extra_forbidden"]
    meant = {place: _suggestion(cls, place) for place in unknown}
    for problem in problems:
        place = problem["loc"]
        dotted = ".".join(str(part) for part in place)
        if place in meant:
            known = ", ".join(_known_keys(cls, place[:-1]))
            yield f"{dotted}: unknown key; " + (
                f"did you mean '{meant[place]}'?" if meant[place] else f"known: {known}"
            )
        elif problem["type"] == "missing":
            if place not in {(*typed[:-1], name) for typed, name in meant.items()}:  # a typo is complained of once
                yield f"{dotted}: required, and missing; {_remedy(cls, place, flags)}"
        elif problem["type"] == "value_error":
            yield f"{dotted}: {problem['ctx']['error']}" if dotted else str(problem["ctx"]["error"])
        elif problem["type"] == "too_short":
            yield f"{dotted}: expected at least one, found none"
        elif problem["type"] == "list_type":
            yield f"{dotted}: expected a list, got {repr(problem['input'])[:80]}; write [{repr(problem['input'])[:80]}]"
        else:
            expected = problem["msg"].removeprefix("Input should be ").removeprefix("a valid ")
            yield f"{dotted}: expected {expected}, got {repr(problem.get('input'))[:80]}"


def _remedy(cls: type[Section], place: tuple[int | str, ...], flags: Mapping[str, str]) -> str:
    keys = _known_keys(cls, place)
    if keys:
        return f"add a section [{place[-1]}] to the job file, with {', '.join(keys[:3])} ..."
    dotted = ".".join(map(str, place))
    return f"add it to the job file or pass {flags.get(dotted, f'--set {dotted}=...')}"


def _suggestion(cls: type[Section], place: tuple[int | str, ...]) -> str | None:
    close = difflib.get_close_matches(str(place[-1]), _known_keys(cls, place[:-1]), n=1, cutoff=0.5)
    return close[0] if close else None


def _known_keys(cls: type[Section], place: Sequence[int | str]) -> list[str]:
    model: type[BaseModel] = cls
    for part in place:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)
