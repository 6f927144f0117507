"""The console command `softpref`: the pipelines, and every stage without KFP. Imports only what it runs."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from softpref import __version__
from softpref.config import build_config, closest, convert, holding, read_mapping
from softpref.disk import disk_trouble, write_whole
from softpref.errors import ConfigError, SoftprefError
from softpref.interruption import Interrupted, interruptible
from softpref.options import CONFIGURATIONS, HIDDEN, REQUIRED, Option, instead, read_options
from softpref.preflight.early import check_early

if TYPE_CHECKING:
    from softpref.data.config import DataConfig
    from softpref.evaluation.config import BenchmarkConfig, EvaluationConfig
    from softpref.records.evaluation import Evaluation
    from softpref.registry.config import RegistryConfig
    from softpref.reward_model.config import RewardModelConfig
    from softpref.sft.config import SFTConfig
    from softpref.spo.config import SPOConfig

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

Folders = dict[str, str]


class Place(NamedTuple):
    """An option outside the stage's configuration: a folder, or where something is kept."""

    text: str
    required: bool = False


class Stage(NamedTuple):
    """A subcommand: its purpose, its places, and the function that runs it with a configuration."""

    summary: str
    places: Mapping[str, Place]
    run: Callable[[Folders, Any], object]


_WHERE = "default: the environment's, or a local store"


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status: 0, or 2 for an error that the user can fix."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every terminal can show all characters
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in _PIPELINES:
        return _pipeline(*arguments)
    arguments = _joined(arguments)
    parser, commands = _parser(arguments)
    options, rest = parser.parse_known_args(arguments)
    if not _is_first_process():  # the first one warns for all
        logging.getLogger("softpref").setLevel(logging.ERROR)
    try:
        if own := _OTHERS.get(options.command):
            if rest:
                name = rest[0].partition("=")[0].removeprefix("--")
                near = closest(name, vars(options).keys() - {"command"})
                commands.choices[options.command].error(f"unknown arguments: {' '.join(rest)}{near}")
            return own(options)
        stage = _STAGES[options.command]
        folders, values = _settle(options, rest)
        if missing := [name for name, place in stage.places.items() if place.required and not folders[name]]:
            commands.choices[options.command].error(f"it needs {', '.join(f'--{one}' for one in missing)}")
        module, name = CONFIGURATIONS[options.command]
        config = getattr(importlib.import_module(module), name)
        with interruptible():
            result = stage.run(folders, build_config(config, values))
        if not _is_first_process():
            return 0
        print(json.dumps(result, indent=2, default=str, ensure_ascii=False))
        if options.result:
            _write_result(options.result, {"result": result})
        return 0
    except KeyboardInterrupt as error:
        if _is_first_process():
            training = options.command in ("sft", "train", "judge")
            goes_on = "; the same command goes on from its newest checkpoint" if training else ""
            print(f"error: softpref {options.command} was interrupted{goes_on}", file=sys.stderr)
        return error.status if isinstance(error, Interrupted) else 130
    except SoftprefError as error:
        return _refused(options, str(error))
    except Exception as error:
        if said := disk_trouble(error, [os.getcwd()]):
            return _refused(options, said)
        raise


def _parser(arguments: list[str]) -> tuple[argparse.ArgumentParser, Commands]:
    """The parser, and its commands; only the stages that `arguments` name get all their options."""
    parser = argparse.ArgumentParser(
        prog="softpref",
        description="Soft preference optimization: the pipelines, and their stages one by one.",
        epilog="softpref COMMAND --help lists every option of a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"softpref {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, summary) in _PIPELINES.items():
        commands.add_parser(name, help=summary, add_help=False)
    for name, stage in _STAGES.items():
        _add_stage(commands, name, stage, listed=name in arguments)
    compare = commands.add_parser(
        "compare", help="Compare evaluated models and choose one.", allow_abbrev=False
    )
    compare.add_argument(
        "evaluations",
        nargs="+",
        help="folders of `softpref evaluate`, one per model, or runs:/ID, models:/NAME/VERSION, "
        "models:/NAME@ALIAS, or models:/NAME for all versions",
    )
    compare.add_argument("--output", required=True, help="folder to write: the report, its data and figures")
    compare.add_argument(
        "--selection_rule", default="expected_reward", help="what ranks models: expected_reward or win_rate"
    )
    for name, text in (
        ("max_kl", "models further than this from the reference, in nats, are not chosen"),
        ("min_win_rate", "the low end of a chosen model's win rate must be above this"),
    ):
        compare.add_argument(f"--{name}", type=float, help=f"{text} (default: no limit)")
    compare.add_argument("--tracking_uri", default="", help=f"MLflow server of runs and models ({_WHERE})")
    sync = commands.add_parser(
        "track-sync",
        help="Send what a tracking server missed.",
        description="Send what a tracking server missed, nothing twice. A stage waits only seconds for a "
        "server that does not answer, 5 at its start and 8 at its end; SOFTPREF_TRACKING_WAIT sets both.",
        allow_abbrev=False,
    )
    sync.add_argument("folder", help="output folder of a stage, with its tracking.jsonl")
    sync.add_argument("--tracking_uri", default="", help="MLflow server (default: the run's own)")
    commands.add_parser(
        "completion",
        help="Print a completion script for bash and zsh.",
        description='eval "$(softpref completion)" in ~/.bashrc, or in ~/.zshrc after '
        "`autoload -U bashcompinit && bashcompinit`.",
        allow_abbrev=False,
    )
    return parser, commands


def _pipeline(command: str, *arguments: str) -> int:
    """Run a pipeline's command line; for `compile`, of the pipeline named first, by default the sweep."""
    from softpref.pipelines import graph
    from softpref.pipelines.command import main

    rest = [*arguments]
    if command == "compile":
        what = rest.pop(0) if rest and not rest[0].startswith("-") else "sweep"
        if what not in _COMPILED:
            known = closest(what, _COMPILED)
            print(f"error: compile takes sweep, run or components, got {what!r}{known}", file=sys.stderr)
            return 2
        command, task = ("sweep", what) if what == "components" else (what, "compile")
        rest = [task, *rest]
    return main(getattr(graph, _PIPELINES[command][0]), rest, f"softpref {command}")


def _compare(options: argparse.Namespace) -> int:
    from softpref.evaluation.compare import outcome_lines, run
    from softpref.evaluation.tables import format_table
    from softpref.fitness import Limits
    from softpref.records.evaluation import REPORT_FILE

    comparison = run(
        options.evaluations,
        options.output,
        options.selection_rule,
        options.max_kl,
        limits=None if options.min_win_rate is None else Limits(options.min_win_rate),
        required=False,
        tracking_uri=options.tracking_uri or None,
    )
    report = f"report:   {Path(options.output, REPORT_FILE)}"
    print("\n".join([format_table(comparison.members), "", *outcome_lines(comparison), report]))
    return 0


def _track_sync(options: argparse.Namespace) -> int:
    from softpref.tracking import sync

    result = sync(options.folder, options.tracking_uri or None)
    print(f"delivered {result.delivered} records to run {result.run_id}")
    return 0


def _completion(_: argparse.Namespace) -> int:
    """Print a bash script with all present commands and options."""
    from softpref.pipelines import graph
    from softpref.pipelines.command import COMMANDS, parser_of

    parsers = {**_parser([*_STAGES])[1].choices}
    parsers |= {name: parser_of(getattr(graph, place)) for name, (place, _) in _PIPELINES.items()}
    first = {"sweep": COMMANDS, "run": COMMANDS, "compile": _COMPILED}  # words that are no options
    words = {name: [*first.get(name, ()), *one._option_string_actions] for name, one in parsers.items()}
    cases = [f"{name}) words='{' '.join(those)}' ;;" for name, those in words.items()]
    lines = "\n    ".join([*cases, f"*) words='{' '.join(parsers)} --help --version' ;;"])
    print(_COMPLETION.format(cases=lines))
    return 0


_COMPLETION = """\
_softpref() {{
  local words command=${{COMP_WORDS[1]}}
  [ "$COMP_CWORD" -gt 1 ] || command=
  case "$command" in
    {cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _softpref softpref"""


def _joined(arguments: list[str]) -> list[str]:
    """`--a-b value` as `--a_b=value`: an option has one spelling, and a value may begin with a minus."""
    joined: list[str] = []
    for argument in arguments:
        last = joined[-1] if joined else ""
        if argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
            joined.append(f"--{key.replace('-', '_')}{equals}{value}")
        elif re.fullmatch("--(?!help$|version$)[^=]*", last) and argument != "-h":
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _add_stage(commands: Commands, name: str, stage: Stage, *, listed: bool) -> None:
    """A stage's subcommand; with all its options, which takes a moment to read, if `listed`."""
    required = " ".join(f"--{one} {one.upper()}" for one, place in stage.places.items() if place.required)
    parser = commands.add_parser(
        name,
        help=stage.summary,
        usage=f"softpref {name} {required} [--config FILE] [--OPTION VALUE ...]",
        description=f"{stage.summary} --a-b and --a_b are the same option, a_b in a file; values of type "
        "dict or list are JSON; options given here win over --config.",
        allow_abbrev=False,
    )
    places = parser.add_argument_group("places")
    for key, place in stage.places.items():
        places.add_argument(f"--{key}", default="", help=place.text)
    for key, text in (
        ("config", "YAML or JSON file with any of the options"),
        ("result", "JSON file to write: what is printed at the end, or the error (of the first process)"),
    ):
        places.add_argument(f"--{key}", metavar="FILE", default="", help=text)
    own = parser.add_argument_group("options of the stage")
    inherited = parser.add_argument_group("options of transformers.TrainingArguments")
    for option in read_options(*CONFIGURATIONS[name]).values() if listed else ():
        if option.name not in HIDDEN:
            switch = "bool" in option.kind or option.name == "fsdp"  # may stand without a value
            (inherited if option.inherited else own).add_argument(
                f"--{option.name}",
                metavar=option.kind,
                default=argparse.SUPPRESS,
                help=_help(option),
                nargs="?" if switch else None,
                const="true" if switch else None,
            )


def _help(option: Option) -> str:
    """The text of an option, and its default."""
    default = "required"
    if option.default is not REQUIRED:
        default = f"default: {json.dumps(option.default, ensure_ascii=False)}"
    return f"{option.text} ({default})".replace("%", "%%")


def _settle(options: argparse.Namespace, rest: list[str]) -> tuple[Folders, dict[str, Any]]:
    """Folders and parameters of a stage, from its file and its arguments, each known and of the right type.

    Checks all that can be checked without the stage's libraries, in a fraction of a second.
    """
    for argument in rest:
        if not argument.startswith("--"):
            raise ConfigError(f"{argument!r} belongs to no option; write --OPTION VALUE")
    stage = _STAGES[options.command]
    known = read_options(*CONFIGURATIONS[options.command])
    unknown = dict(argument[2:].partition("=")[::2] for argument in rest)
    given = {name: value for name, value in vars(options).items() if name in known}
    values = {**(read_mapping(options.config) if options.config else {}), **given, **unknown}
    folders = {name: getattr(options, name) or str(values.get(name) or "") for name in stage.places}
    values = {name: value for name, value in values.items() if name not in folders}
    for name in values:
        if name not in known or name == "output_dir":
            where = _whereabouts(name, options.command)
            raise ConfigError(f"softpref {options.command} has no option {name!r}{where}")
    convert(f"softpref {options.command}: ", values, {one.name: one.hint for one in known.values()})
    check_early(options.command, values)
    return folders, values


def _whereabouts(name: str, command: str) -> str:
    """Which stages have an option that this one lacks, or which option may be meant."""
    known = {one: read_options(*place) for one, place in CONFIGURATIONS.items()}
    having = [f"softpref {one}" for one in _STAGES if name in {*_STAGES[one].places, *known[one]}]
    options = [option for option in known[command].values() if option.name not in HIDDEN]
    own = [*_STAGES[command].places, "config", *(one.name for one in options if not one.inherited)]
    inherited = [one.name for one in options if one.inherited]
    exact = ""
    if having and not holding(name, [*own, *inherited]):
        exact = f"; {', '.join(having)} {'has' if len(having) == 1 else 'have'} it"
    return instead(name, exact, own, inherited, lambda one: [repr(one)])


def _refused(options: argparse.Namespace, message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    if getattr(options, "result", ""):
        with contextlib.suppress(OSError):  # which may be what the message is about
            _write_result(options.result, {"error": message})
    return 2


def _write_result(path: str, values: Mapping[str, object]) -> None:
    """Write the file in one step: several processes may report the same error at once."""
    write_whole(path, json.dumps(values, default=str, ensure_ascii=False))


def _is_first_process() -> bool:
    """Whether this is the first of a distributed run's processes, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _data(folders: Folders, config: DataConfig) -> object:
    from softpref.data.stage import run

    stats: Mapping[str, object] = run(config, folders["output"])
    shown = ("rows", "rejected", "left_out", "duplicates", "dataset_hash")
    return {key: stats[key] for key in shown if key in stats}


def _sft(folders: Folders, config: SFTConfig) -> object:
    from softpref.sft.stage import run

    return run(config, **_training(folders))


def _train(folders: Folders, config: SPOConfig) -> object:
    from softpref.spo.stage import run

    return run(config, **_training(folders))


def _judge(folders: Folders, config: RewardModelConfig) -> object:
    from softpref.reward_model.stage import run

    return run(config, **_training(folders))


def _training(folders: Folders) -> dict[str, str]:
    """Arguments of a training stage: its folders, and the name, tracking and checkpoints that were given."""
    given = {key: value for key, value in folders.items() if value}
    return {f"{key}_dir" if key not in _TRAINING else key: value for key, value in given.items()}


def _evaluate(folders: Folders, config: EvaluationConfig) -> object:
    from softpref.evaluation.stage import run
    from softpref.lm.extrapolation import extrapolated_folders
    from softpref.records.evaluation import Evaluation
    from softpref.records.model import earlier_folders

    evaluation = run(config, **{f"{key}_dir": value for key, value in folders.items()})
    within = [*earlier_folders(folders["output"]), *extrapolated_folders(folders["output"])]
    return _figures(evaluation) | {one.name: _figures(Evaluation.read(one)) for one in within}


def _figures(evaluation: Evaluation) -> dict[str, object]:
    return {key: value for key, value in evaluation.as_dict().items() if key in ("metrics", "exact")}


def _benchmark(folders: Folders, config: BenchmarkConfig) -> object:
    from softpref.evaluation.benchmark import run

    return run(config, **{f"{key}_dir": value for key, value in folders.items()})


def _register(folders: Folders, config: RegistryConfig) -> object:
    from softpref.registry.stage import run

    decision = run(
        config, folders["policy"], folders["evaluation"], folders["output"], folders["comparison"] or None
    )
    return vars(decision)


_DATASET = Place("dataset folder of `softpref data`", required=True)
_OUTPUT = Place("folder to write", required=True)
_TRAINING = {
    "name": Place("name of the model and of its tracking run"),
    "experiment": Place("MLflow experiment"),
    "parent_run_id": Place("MLflow run that becomes the parent of the stage's run"),
    "tracking_uri": Place(f"MLflow server ({_WHERE})"),
    "checkpoint_dir": Place("folder for checkpoints during training (default: inside the output)"),
}
_STAGES = {
    "data": Stage("Turn preferences of any source into a checked dataset.", {"output": _OUTPUT}, _data),
    "sft": Stage("Train the reference model.", {"dataset": _DATASET, "output": _OUTPUT, **_TRAINING}, _sft),
    "train": Stage(
        "Align the reference to preferences.",
        {
            "dataset": _DATASET,
            "reference": Place("model to start from: a folder, a URL of one, or models:/NAME@ALIAS", True),
            "output": _OUTPUT,
            **_TRAINING,
        },
        _train,
    ),
    "judge": Stage(
        "Train a judge on preferences that the policy never sees.",
        {"dataset": _DATASET, "output": _OUTPUT, **_TRAINING},
        _judge,
    ),
    "evaluate": Stage(
        "Measure a model on held-out prompts.",
        {
            "dataset": _DATASET,
            "reference": Place("the reference: a model folder, a URL of one, or models:/NAME@ALIAS", True),
            "policy": Place("the model to measure, given in the same ways", True),
            "output": _OUTPUT,
        },
        _evaluate,
    ),
    "register": Stage(
        "Put an evaluated model into the MLflow registry.",
        {
            "policy": Place("model folder", True),
            "evaluation": Place("its evaluation folder", True),
            "comparison": Place("comparison folder of a sweep that chose it"),
            "output": _OUTPUT,
        },
        _register,
    ),
    "benchmark": Stage(
        "Answer a public benchmark for its leaderboard.",
        {
            "policy": Place("the model: a folder, a URL of one, models:/NAME@ALIAS, or a Hub id", True),
            "reference": Place("its reference, for RewardBench (default: the reward is log π alone)"),
            "output": _OUTPUT,
        },
        _benchmark,
    ),
}

_OTHERS = {"compare": _compare, "track-sync": _track_sync, "completion": _completion}
_COMPILED = ("sweep", "run", "components")
_PIPELINES = {
    "sweep": ("spo_sweep", "Train, evaluate and compare models of several softness values."),
    "run": ("spo_pipeline", "Train and evaluate a model of one softness value."),
    "compile": ("spo_sweep", "Write a pipeline's package for Kubeflow Pipelines."),
}


if __name__ == "__main__":
    sys.exit(main())
