"""The reference of all job files, made from the classes that read them: `python -m jobs.reference > docs/jobs.md`."""

import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Union

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from jobs.cli import COMMANDS, resolve

_HEAD = """# Job files

Every command takes a TOML job file. `--set section.key=value` overrides a key, `--dry-run` validates the file, counts
the work and prints the plan, `-v` says more. Unknown keys, wrong types and values out of range are one line each:

```
$ pixart train train.toml
pixart train: train.toml: optim.lrr: unknown key; did you mean 'lr'?
```

Paths are relative to where the command is run. The job with every default filled in is written beside its results, as
`job.toml` (`config.toml` for training); it is itself a job file that repeats the run. Start from
[jobs/files](../jobs/files). This page is made from the code by `python -m jobs.reference`.
"""


def reference() -> str:
    """Return the page."""
    lines = [_HEAD]
    for name, command in COMMANDS.items():
        lines += [f"\n## pixart {name}\n", f"{command.help.capitalize()}.\n"]
        lines += _tables(resolve(command.config, command.extra), "")
    return "\n".join(lines) + "\n"


def _tables(section: type[BaseModel], prefix: str) -> Iterator[str]:
    """Yield the table of a section's own keys, then those of the sections in it."""
    nested = []
    rows = []
    for key, field in section.model_fields.items():
        inner = _section(field.annotation)
        if inner is not None:
            is_list = typing.get_origin(field.annotation) is list
            nested.append((inner, f"{prefix}{key}", "[[{}]]" if is_list else "[{}]"))
        else:
            rows.append(f"| `{prefix}{key}` | {_type(field)} | {_default(field)} | {_text(field.description)} |")
    if rows:
        yield from ["| key | type | default | |", "|---|---|---|---|", *rows, ""]
    for inner, name, brackets in nested:
        doc = (inner.__doc__ or "").strip().splitlines()[0]
        yield f"**`{brackets.format(name)}`** {doc}\n"
        yield from _tables(inner, f"{name}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    candidates = [annotation, *typing.get_args(annotation)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _type(field: FieldInfo) -> str:
    annotation = field.annotation
    if typing.get_origin(annotation) in (Union, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is Literal:
        return " ".join(f"`{value}`" for value in typing.get_args(annotation))
    if typing.get_origin(annotation) is list:
        return "list"
    if typing.get_origin(annotation) is dict:
        return "table"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
        getattr(annotation, "__name__", ""), "text"
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default in (None, [], {}):
        return ""
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def _text(description: str | None) -> str:
    return " ".join((description or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    import sys

    sys.stdout.write(reference())
