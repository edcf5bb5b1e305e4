"""The `pixart` command: one word for each stage, a job file, and the same three options everywhere.

Nothing heavy is imported here: a command's module is imported when the command is chosen, so that `pixart --help` and
a mistyped job file answer at once.
"""

import argparse
import difflib
import importlib
import logging
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jobs import ranks
from jobs.arguments import ARGUMENTS, FLAGS, GIVEN, job_arguments, job_given
from jobs.shape import WATCHED, submit_parser, watch_parser
from pixart_data.config import Section, load
from pixart_data.errors import ConfigError, PixArtError
from pixart_data.logs import is_json, talk

log = logging.getLogger(__name__)

PACKAGES = ("jobs", "pipelines", "pixart_data", "pixart_model")
JOB_FILES = Path(__file__).parent / "files"


@dataclass(frozen=True)
class Command:
    """A subcommand: its help, the class of its job file, the function that does it, and the extra it needs.

    `config` and `function` are `module:name`, imported when the command is chosen.
    """

    help: str
    config: str
    function: str
    extra: str = "data"
    example: str = "cluster.num_workers=2"


COMMANDS = {
    "fetch": Command(
        "download images from lists of URLs",
        "pipelines.config:Fetch",
        "jobs.stages:fetch",
        example="downloads.concurrency=64",
    ),
    "filter": Command(
        "reject duplicates and images below your standards",
        "pipelines.config:Filter",
        "jobs.stages:filter",
        example="filters.min_side_px=256",
    ),
    "caption": Command("describe images with an image-text model", "pipelines.config:Caption", "jobs.stages:caption"),
    "stats": Command("measure the noun density of captions", "pipelines.config:Stats", "jobs.stages:stats"),
    "extract": Command("turn images and captions into features", "pipelines.config:Extract", "jobs.stages:extract"),
    "train": Command(
        "train the transformer on features", "pixart_model.config:Train", "jobs.train:train", "train", "optim.lr=1e-4"
    ),
    "sample": Command(
        "draw prompts with a checkpoint", "pixart_model.config:Sample", "jobs.sample:sample", "sample", "guidance=3.0"
    ),
    "convert": Command(
        "write weights in another layout, such as diffusers'",
        "jobs.config:Convert",
        "jobs.convert:convert",
        "train",
        "interpolation_scale=1.0",
    ),
    "inspect": Command(
        "show what a dataset, table or checkpoint holds",
        "jobs.config:Inspect",
        "jobs.inspect:inspect",
        example="num_samples=10",
    ),
    "verify": Command(
        "re-read every byte and name what is damaged", "jobs.config:Verify", "jobs.verify:verify", example="path=DIR"
    ),
    "buckets": Command(
        "propose a table of buckets for the sizes of your images",
        "jobs.config:Buckets",
        "jobs.buckets:buckets",
        example="resolution_px=512",
    ),
    "compact": Command(
        "gather small shards into large ones, in random order",
        "pipelines.config:Compact",
        "jobs.compact:compact",
        example="shard_bytes=1073741824",
    ),
    "diff": Command("compare two datasets", "jobs.config:Diff", "jobs.diff:diff", example="num_samples=10"),
    "merge": Command("join datasets into one", "jobs.config:Merge", "jobs.merge:merge", example="output=DIR"),
    "split": Command(
        "split a dataset into parts, by share or by query",
        "jobs.config:Split",
        "jobs.split:split",
        example="output=DIR",
    ),
    "import": Command(
        "turn features that other tools wrote into a dataset",
        "pipelines.config:Import",
        "jobs.interchange:import_features",
    ),
    "export": Command(
        "write a dataset in the layout of another tool",
        "jobs.config:Export",
        "jobs.interchange:export_features",
        example="image_set=256px",
    ),
    "retry": Command(
        "do rejected rows of a finished run again",
        "jobs.config:Retry",
        "jobs.retry:retry",
        example='reasons=["timed_out"]',
    ),
    "status": Command(
        "show how far a run is, while it goes on or after it",
        "jobs.config:Status",
        "jobs.status:status",
        example="as_json=true",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 settings, 3 data, 4 machine; 1, with a traceback, a bug."""
    outer, args = parse(sys.argv[1:] if argv is None else argv)
    name = "submit" if outer else args.command
    try:
        if args.command == "submit":
            raise ConfigError("expected one command to submit, e.g. pixart submit caption job.toml")
        talk(PACKAGES, name, args.verbose, args.log_json, ranks.rank())
        if outer and args.command in WATCHED:
            return int(resolve("jobs.submit:attend", "data")(args.command, args.id, outer))
        job = read_job(args)
        if outer:
            return int(resolve("jobs.submit:submit", "data")(args.command, job, outer, _told(args)))
        _show_token()
        resolve(COMMANDS[name].function, COMMANDS[name].extra)(job, dry_run=args.dry_run)
    except PixArtError as error:
        if ranks.is_ours_to_say(str(error)):
            for line in str(error).splitlines():
                _complain(name, line, error.exit_code)
        return error.exit_code
    except BrokenPipeError:  # `pixart inspect ... | head` has seen enough; keep Python from complaining at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        _let_go_of_ray()
        if ranks.is_first():
            _complain(name, "stopped; run the same command again to go on where it was", 130)
        return 130
    return 0


def _show_token() -> None:
    """Let a running cluster see the token that is here: a command's module imports Ray, and then it is too late."""
    if os.environ.get("RAY_ADDRESS"):
        resolve("jobs.submit:show_token", "data")()


def _told(args: argparse.Namespace) -> str:
    """Return the flags about logs, to be passed on to where a job runs."""
    return (" -v" if args.verbose else "") + (" --log-json" if args.log_json else "")


def parse(words: Sequence[str]) -> tuple[argparse.Namespace | None, argparse.Namespace]:
    """Read a command line: what `submit` takes, which may stand anywhere on it (None without submit), and the rest."""
    outer, rest = None, list(words)
    if rest[:1] == ["submit"] and rest[1:2] not in ([], ["-h"], ["--help"]):
        outer, rest = submit_parser().parse_known_args(rest[1:])
    _suggest(rest)
    args, unknown = (watch_parser() if outer and rest[:1] and rest[0] in WATCHED else parser()).parse_known_args(rest)
    if unknown:
        args.usage.error(f"unrecognized: {' '.join(unknown)}; keys of the job file are set with --set KEY=VALUE")
    return outer, args


def _suggest(words: Sequence[str]) -> None:
    """Leave with the command that was probably meant, where the first word is nearly one; argparse only lists them."""
    known = [*COMMANDS, "submit", *WATCHED]
    close = difflib.get_close_matches(words[0], known, n=1) if words and words[0] not in known else []
    if close:
        parser().error(f"no command {words[0]}; did you mean {close[0]}?")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(
        prog="pixart",
        description="From piles of images to a trained PixArt text-to-image transformer.",
        epilog=f"Job files to start from: {JOB_FILES}",
    )
    top.add_argument("--version", action="version", version=f"pixart {version('pixart-toolkit')}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help, description=command.help, allow_abbrev=False)
        ARGUMENTS.get(name, job_arguments)(sub)
        sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=f"e.g. {command.example}")
        sub.add_argument("--dry-run", action="store_true", help="validate, count the work, print the plan, and stop")
        sub.add_argument("-v", "--verbose", action="store_true", help="say more")
        sub.add_argument("--log-json", action="store_true", help="log one JSON object a line to stderr")
        sub.set_defaults(usage=sub)
    commands.add_parser("submit", parents=[submit_parser()], help="run any of these on a cluster", add_help=False)
    return top


def read_job(args: argparse.Namespace) -> Section:
    """Build a command's job from its file, what was typed by hand, and `--set`.

    Raises:
        ConfigError: With one line for each problem; of what a flag gave, the line names the flag.
    """
    _require_job_file(args)
    cls: type[Section] = resolve(COMMANDS[args.command].config, COMMANDS[args.command].extra)
    path, given = GIVEN.get(args.command, job_given)(args)
    flags = FLAGS.get(args.command, {})
    try:
        return load(cls, path, args.set, given, flags)
    except ConfigError as error:
        text = str(error)
        for key in given.keys() & flags.keys():
            text = text.replace(f"{path or 'command line'}: {key}: ", f"{flags[key].split()[0]}: {key}: ")
        raise ConfigError(text) from None


def _require_job_file(args: argparse.Namespace) -> None:
    """Refuse a command that takes nothing but a job file and was given none, or the directory of a run."""
    if "job" not in args:
        return
    command = f"pixart {args.command}"
    if args.job is None and not args.set:
        raise ConfigError(f"expected a job file, found none; type {command} JOB.toml; to start from: {JOB_FILES}")
    if args.job is not None and args.job.is_dir():
        inside = args.job / ("config.toml" if args.command == "train" else "job.toml")
        advice = f"type {command} {shlex.quote(str(inside))}" if inside.is_file() else f"to start from: {JOB_FILES}"
        kind = "the directory of a run" if inside.is_file() else "a directory"
        raise ConfigError(f"{args.job}: expected a job file, found {kind}; {advice}")


def resolve(name: str, extra: str) -> Any:
    """Import `module:attribute`.

    Raises:
        ConfigError: If a package that the command needs is not installed, naming the extra to install.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in PACKAGES:
            raise
        raise ConfigError(f"package {package} is not installed; pip install 'pixart-toolkit[{extra}]'") from error


def _complain(name: str, line: str, exit_code: int) -> None:
    if is_json():
        log.error("%s", line, extra={"fields": {"exit_code": exit_code}})
    else:
        mark = "" if ranks.is_first() else f"[rank {ranks.rank()}] "
        print(f"{mark}pixart {name}: {line}", file=sys.stderr)


def _let_go_of_ray() -> None:
    """Leave Ray in order, and out of reach of a second Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def entry() -> None:
    """Run the command and exit as it says; what Ray does at exit is not to be interrupted."""
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


if __name__ == "__main__":
    entry()
