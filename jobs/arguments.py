"""What each command takes on its command line besides the options that all have, and what that says of its job."""

import argparse
import os
import re
import shlex
from pathlib import Path
from typing import Any

from pixart_data.errors import ConfigError

Given = tuple[Path | None, dict[str, Any]]

_NO_NAME = re.compile(r"[\s<>!()'\"]")  # what stands before the first = of a query, and in no name of a part


def job_arguments(sub: argparse.ArgumentParser) -> None:
    """Take a job file."""
    sub.add_argument("job", nargs="?", type=Path, help="job file (TOML)")


def job_given(args: argparse.Namespace) -> Given:
    """Return the job file."""
    return args.job, {}


def _caption_arguments(sub: argparse.ArgumentParser) -> None:
    job_arguments(sub)
    sub.add_argument(
        "--retry-failed-gate",
        action="store_true",
        help="judge the captions, ask again for those that fail, mark the rest",
    )


def _caption_given(args: argparse.Namespace) -> Given:
    return args.job, {"gate": {}} if args.retry_failed_gate else {}


def _stats_arguments(sub: argparse.ArgumentParser) -> None:
    sub.epilog = "Example: pixart stats LLaVA=captions/ web=alt_texts.txt all='data/*.parquet' --out report/"
    sub.add_argument(
        "paths",
        nargs="*",
        help="a job file; or sets of captions, each as PATH or NAME=PATH: a Parquet or JSONL table (.parquet, .jsonl), "
        "a caption a line (.txt), a folder of these, or a quoted pattern such as 'data/*.parquet'",
    )
    sub.add_argument("--column", metavar="NAME", help="the column of tables given by hand (default: caption)")
    sub.add_argument("--out", help="folder for the report of tables given by hand (default: report)")
    sub.add_argument("--approximate", action="store_true", help="count without NLTK's data, by TextBlob's lexicon")
    sub.add_argument("--download-nltk", action="store_true", help="fetch NLTK's data first; without paths, only that")
    sub.add_argument("--tokenizer", metavar="MODEL", help="measure lengths too, with the tokenizer of this T5")


def _stats_given(args: argparse.Namespace) -> Given:
    flags: dict[str, Any] = {name: True for name in ("approximate", "download_nltk") if getattr(args, name)}
    flags |= {"tokenizer": args.tokenizer} if args.tokenizer else {}
    if len(args.paths) == 1 and args.paths[0].endswith(".toml"):
        if args.column:
            raise ConfigError(
                "--column: expected it with tables given by hand, found a job file; set `column` of its sets there"
            )
        return Path(args.paths[0]), {**flags, **_out(args)}
    sets = []
    for text in args.paths:
        name, sign, path = text.partition("=")
        named = sign and not Path(text).exists()  # `date=3/x.parquet` is a path, not a name
        given = {"name": name, "path": path} if named else {"name": _set_name(text), "path": text}
        sets.append({**given, "column": args.column or "caption"})
    return None, {"sets": sets, "output": args.out or "report", **flags}


def _set_name(path: str) -> str:
    """Return what a set is called that was given no name: as its file, its folder, or the folder before a pattern."""
    place = path if "://" in path else os.path.abspath(path)
    while any(sign in os.path.basename(place) for sign in "*?["):
        place = os.path.dirname(place)
    stem, suffix = os.path.splitext(os.path.basename(place.rstrip("/")))
    return stem if suffix in (".parquet", ".jsonl", ".txt") else f"{stem}{suffix}" or "captions"


def _path_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("path", help="a job file, or what to look at")


def _inspect_arguments(sub: argparse.ArgumentParser) -> None:
    _path_arguments(sub)
    sub.add_argument("--html", metavar="FILE", help="write a page with pictures, of a dataset")


def _inspect_given(args: argparse.Namespace) -> Given:
    path, given = _path_given(args)
    return path, {**given, **({"html": args.html} if args.html else {})}


def _verify_arguments(sub: argparse.ArgumentParser) -> None:
    _path_arguments(sub)
    sub.add_argument("--fast", action="store_true", help="read sizes and indexes only, not every byte")
    sub.add_argument("--recompute", type=int, metavar="K", help="compute K samples again and compare")


def _verify_given(args: argparse.Namespace) -> Given:
    path, given = _path_given(args)
    recompute = {} if args.recompute is None else {"recompute": args.recompute}
    return path, {**given, **({"fast": True} if args.fast else {}), **recompute}


def _buckets_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("paths", nargs="+", help="a job file; or datasets, captions, tables with sizes, or images")


def _buckets_given(args: argparse.Namespace) -> Given:
    if len(args.paths) == 1 and args.paths[0].endswith(".toml"):
        return Path(args.paths[0]), {}
    return None, {"paths": args.paths}


def _compact_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("path", help="a job file, or the dataset")
    sub.add_argument("--out", help="folder of the compacted dataset")


def _compact_given(args: argparse.Namespace) -> Given:
    path, given = _path_given(args)
    return path, {**given, **_out(args)}


def _diff_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("left", help="a dataset or a feature set")
    sub.add_argument("right", help="the one to compare it with")


def _diff_given(args: argparse.Namespace) -> Given:
    return None, {"left": args.left, "right": args.right}


def _merge_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("paths", nargs="+", help="a job file, or datasets")
    sub.add_argument("--out", help="folder of the joint dataset")


def _merge_given(args: argparse.Namespace) -> Given:
    path, given = _buckets_given(args)
    return path, {**given, **_out(args)}


def _split_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("path", help="a job file, or the dataset")
    sub.add_argument("--out", help="folder of the parts, which are datasets")
    sub.add_argument("--share", action="append", default=[], metavar="NAME=SHARE", help="a random part; repeat it")
    sub.add_argument("--where", action="append", default=[], metavar="NAME=QUERY", help="a part by query; repeat it")


def _split_given(args: argparse.Namespace) -> Given:
    path, given = _path_given(args)
    parts = {"share": _named("--share", "SHARE", args.share), "where": _named("--where", "QUERY", args.where)}
    return path, {**given, **_out(args), **{name: part for name, part in parts.items() if part}}


def _named(flag: str, value: str, texts: list[str]) -> dict[str, str]:
    """Read `NAME=VALUE`, each name once.

    Raises:
        ConfigError: If one is of another form, or two have one name: the first would be lost.
    """
    named: dict[str, str] = {}
    for text in texts:
        name, _, what = text.partition("=")
        if value == "QUERY" and (_NO_NAME.search(name) or what.startswith("=")):
            advice = f"write e.g. {flag} {shlex.quote(f'part={text}')}"
            raise ConfigError(f"{flag} {text}: expected NAME=QUERY, found a query without the name of a part; {advice}")
        if not name or not what:
            example = "val=0.01" if value == "SHARE" else "'large=original_width_px >= 1024'"
            found = "no value" if name else "no name"
            raise ConfigError(f"{flag} {text}: expected NAME={value}, found {found}; write e.g. {flag} {example}")
        if name in named:
            raise ConfigError(
                f"{flag} {text}: expected each name once, found {name}={named[name]} before; rename or omit one"
            )
        named[name] = what
    return named


def _import_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("path", help="a job file, or the folder that the other tool wrote")
    sub.add_argument("--from", dest="layout", help="whose layout it has: reference, mds or diffusers")
    sub.add_argument("--out", help="folder of the dataset")


def _export_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("path", help="a job file, or the dataset")
    sub.add_argument("--to", dest="layout", help="whose layout to write: reference or mds")
    sub.add_argument("--out", help="folder to write to")


def _convert_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "path",
        help="a job file, or the weights: a checkpoint, a run, a .pth, .pt or .safetensors, a "
        "folder or hub id of diffusers",
    )
    sub.add_argument("--to", dest="layout", help="what to write: diffusers, pth, safetensors or pipeline")
    sub.add_argument("--out", help="folder to write to")
    sub.add_argument("--no-ema", action="store_true", help="take the weights, not their moving average")


def _convert_given(args: argparse.Namespace) -> Given:
    path, given = _interchange_given(args)
    return path, {**given, **({"use_ema": False} if args.no_ema else {})}


def _interchange_given(args: argparse.Namespace) -> Given:
    path, given = _path_given(args)
    return path, {**given, **({"layout": args.layout} if args.layout else {}), **_out(args)}


def _out(args: argparse.Namespace) -> dict[str, Any]:
    return {"output": args.out} if args.out else {}


def _path_given(args: argparse.Namespace) -> Given:
    return (Path(args.path), {}) if args.path.endswith(".toml") else (None, {"path": args.path})


def _status_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("path", help="an output directory, here or on an object store, or the job file that names it")
    sub.add_argument("--json", action="store_true", help="print one JSON object")


def _status_given(args: argparse.Namespace) -> Given:
    return None, {"path": args.path, **({"as_json": True} if args.json else {})}


def _retry_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("path", help="the output directory of fetch, caption, extract or import")
    sub.add_argument("--reason", action="append", default=[], help="only rows rejected for it; may be repeated")


def _retry_given(args: argparse.Namespace) -> Given:
    return None, {"path": args.path, **({"reasons": args.reason} if args.reason else {})}


def _sample_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("checkpoint", help="a job file, a checkpoint, or a run for its last checkpoint")
    sub.add_argument("--prompt", action="append", default=[], help="what to draw; may be repeated")
    sub.add_argument("--out", help="folder for the images (default: samples)")


def _sample_given(args: argparse.Namespace) -> Given:
    prompts = {"prompts": args.prompt} if args.prompt else {}
    output = {"output": args.out} if args.out else {}
    if args.checkpoint.endswith(".toml"):
        return Path(args.checkpoint), {**prompts, **output}
    return None, {"checkpoint": args.checkpoint, "output": "samples", **prompts, **output}


ARGUMENTS = {
    "caption": _caption_arguments,
    "stats": _stats_arguments,
    "inspect": _inspect_arguments,
    "verify": _verify_arguments,
    "buckets": _buckets_arguments,
    "compact": _compact_arguments,
    "diff": _diff_arguments,
    "merge": _merge_arguments,
    "split": _split_arguments,
    "import": _import_arguments,
    "export": _export_arguments,
    "convert": _convert_arguments,
    "status": _status_arguments,
    "retry": _retry_arguments,
    "sample": _sample_arguments,
}
GIVEN = {
    "caption": _caption_given,
    "stats": _stats_given,
    "inspect": _inspect_given,
    "verify": _verify_given,
    "buckets": _buckets_given,
    "compact": _compact_given,
    "diff": _diff_given,
    "merge": _merge_given,
    "split": _split_given,
    "import": _interchange_given,
    "export": _interchange_given,
    "convert": _convert_given,
    "status": _status_given,
    "retry": _retry_given,
    "sample": _sample_given,
}

FLAGS = {
    "stats": {"output": "--out FOLDER"},
    "compact": {"output": "--out FOLDER"},
    "merge": {"output": "--out FOLDER"},
    "split": {"output": "--out FOLDER"},
    "import": {"layout": "--from reference, mds or diffusers", "output": "--out FOLDER"},
    "export": {"layout": "--to reference or mds", "output": "--out FOLDER"},
    "convert": {"layout": "--to diffusers, pth, safetensors or pipeline", "output": "--out FOLDER"},
    "sample": {"prompts": "--prompt TEXT", "output": "--out FOLDER"},
}
"""What to type for a key that has a flag, said where it is missing."""
