"""The console command `softpref`: every stage without KFP. Imports a stage only when it is run."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from softpref.errors import ConfigError, SoftprefError

Values = dict[str, Any]

_OF_THE_DISK = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status: 0, or 2 for an error that a person can mend."""
    parser = argparse.ArgumentParser(
        prog="softpref", description="Soft preference optimization, stage by stage."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="STAGE")
    for name, (summary, paths, _) in _STAGES.items():
        stage = commands.add_parser(
            name,
            help=summary,
            description=f"{summary} Any further --key value sets a parameter of the stage's configuration "
            "and wins over --config.",
        )
        for option, (required, text) in paths.items():
            stage.add_argument(f"--{option}", required=required, default="", help=text)
        stage.add_argument("--config", default="", help="YAML or JSON file with the stage's parameters")
        stage.add_argument(
            "--result",
            default="",
            help="JSON file to write: what is printed at the end, or the error (the first process's)",
        )
    sync = commands.add_parser("track-sync", help="Send what a tracking server missed.")
    sync.add_argument("folder", help="output folder of a stage, with its tracking.jsonl")
    sync.add_argument("--tracking-uri", default="", help="MLflow server (default: the run's own)")
    options, rest = parser.parse_known_args(arguments)
    if not _is_first_process():  # whose warnings are everybody's
        logging.getLogger("softpref").setLevel(logging.ERROR)
    try:
        if options.command == "track-sync":
            if rest:
                parser.error(f"unknown arguments: {' '.join(rest)}")
            from softpref.tracking import sync as deliver

            result = deliver(options.folder, options.tracking_uri or None)
            print(f"delivered {result.delivered} records to run {result.run_id}")
            return 0
        from softpref.config import read_mapping

        values = read_mapping(options.config) if options.config else {}
        _, paths, stage_function = _STAGES[options.command]
        folders = {_key(name): getattr(options, _key(name)) for name in paths}
        given = _pairs(rest)
        if "output_dir" in {**values, **given}:
            raise ConfigError("output_dir is not a parameter here: --output names the folder to write")
        result = stage_function(folders, values, given)
        if not _is_first_process():
            return 0
        print(json.dumps(result, indent=2, default=str, ensure_ascii=False))
        if options.result:
            _write_result(options.result, {"result": result})
        return 0
    except SoftprefError as error:
        return _refused(options, str(error))
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        return _refused(options, f"{error}; give a folder that can be written, on a disk with space")


def _refused(options: argparse.Namespace, message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    if getattr(options, "result", ""):
        _write_result(options.result, {"error": message})
    return 2


def _write_result(path: str, values: Values) -> None:
    """Write the file as a whole: of several processes that refuse alike, any may come last."""
    file = Path(path)
    part = file.with_name(f"{file.name}.{os.getpid()}")
    part.write_text(json.dumps(values, default=str, ensure_ascii=False), encoding="utf-8")
    part.replace(file)


def _is_first_process() -> bool:
    """Whether this is the first of a distributed run's processes, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _pairs(arguments: list[str]) -> dict[str, str]:
    """`--key value` and `--key=value` to a dictionary; a key alone is a switch."""
    pairs: dict[str, str] = {}
    key = ""
    for argument in arguments:
        if argument.startswith("--"):
            key, has_value, value = argument[2:].partition("=")
            key = key.replace("-", "_")
            pairs[key] = value if has_value else "true"
        elif key:
            pairs[key], key = argument, ""
        else:
            raise ConfigError(f"{argument!r} belongs to no parameter; write --key value")
    return pairs


def _data(folders: Values, values: Values, given: Values) -> Any:
    from softpref.config import build_config
    from softpref.data.config import DataConfig
    from softpref.data.stage import run

    stats = run(build_config(DataConfig, values, given), folders["output"])
    return {
        key: stats[key]
        for key in ("rows", "rejected", "left_out", "duplicates", "dataset_hash")
        if key in stats
    }


def _sft(folders: Values, values: Values, given: Values) -> Any:
    from softpref.config import build_config
    from softpref.sft.config import SFTConfig
    from softpref.sft.stage import run

    options = _where(folders)
    config = build_config(SFTConfig, values, given)
    return run(config, dataset_dir=folders["dataset"], output_dir=folders["output"], **options)


def _train(folders: Values, values: Values, given: Values) -> Any:
    from softpref.config import build_config
    from softpref.spo.config import SPOConfig
    from softpref.spo.stage import run

    return run(
        build_config(SPOConfig, values, given),
        dataset_dir=folders["dataset"],
        reference_dir=folders["reference"],
        output_dir=folders["output"],
        **_where(folders),
    )


def _where(folders: Values) -> Values:
    """Name, tracking and checkpoints of a training stage, as far as they were given."""
    return {key: folders[key] for key in map(_key, _TRAINING) if folders[key]}


def _key(option: str) -> str:
    return option.replace("-", "_")


def _evaluate(folders: Values, values: Values, given: Values) -> Any:
    from softpref.config import build_config
    from softpref.evaluation.config import EvaluationConfig
    from softpref.evaluation.stage import EVALUATION_FILE, run
    from softpref.lm.extrapolation import extrapolated_folders

    evaluation = run(
        build_config(EvaluationConfig, values, given),
        dataset_dir=folders["dataset"],
        reference_dir=folders["reference"],
        policy_dir=folders["policy"],
        output_dir=folders["output"],
    )
    result = {key: evaluation[key] for key in ("metrics", "exact")}
    for folder in extrapolated_folders(folders["output"]):
        one = json.loads((folder / EVALUATION_FILE).read_text(encoding="utf-8"))
        result[folder.name] = {key: one[key] for key in ("metrics", "exact")}
    return result


def _register(folders: Values, values: Values, given: Values) -> Any:
    from softpref.config import build_config
    from softpref.registry.config import RegistryConfig
    from softpref.registry.stage import run

    return run(
        build_config(RegistryConfig, values, given),
        folders["policy"],
        folders["evaluation"],
        folders["output"],
        folders["comparison"] or None,
    )


_DATASET = (True, "dataset folder of `softpref data`")
_OUTPUT = (True, "folder to write")
_TRAINING = {
    "name": (False, "name of the model and of its tracking run"),
    "experiment": (False, "MLflow experiment"),
    "parent-run-id": (False, "MLflow run under which the stage's run is put"),
    "tracking-uri": (False, "MLflow server (default: the environment's, or a local store)"),
    "checkpoint-dir": (False, "where checkpoints are kept while training (default: inside the output)"),
}
_STAGES: dict[str, tuple[str, dict[str, tuple[bool, str]], Callable[[Values, Values, Values], Any]]] = {
    "data": ("Turn preferences of any source into a checked dataset.", {"output": _OUTPUT}, _data),
    "sft": (
        "Train the reference model.",
        {"dataset": _DATASET, "output": _OUTPUT, **_TRAINING},
        _sft,
    ),
    "train": (
        "Align the reference to preferences.",
        {
            "dataset": _DATASET,
            "reference": (True, "model to start from: a folder, a URL of one, or models:/NAME@ALIAS"),
            "output": _OUTPUT,
            **_TRAINING,
        },
        _train,
    ),
    "evaluate": (
        "Measure a model on held-out prompts.",
        {
            "dataset": _DATASET,
            "reference": (True, "the reference: a model folder, a URL of one, or models:/NAME@ALIAS"),
            "policy": (True, "the model to measure, likewise"),
            "output": _OUTPUT,
        },
        _evaluate,
    ),
    "register": (
        "Put an evaluated model into the MLflow registry.",
        {
            "policy": (True, "model folder"),
            "evaluation": (True, "its evaluation folder"),
            "comparison": (False, "comparison folder of a sweep that chose it"),
            "output": _OUTPUT,
        },
        _register,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
