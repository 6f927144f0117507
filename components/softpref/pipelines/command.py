"""The command line of the pipelines: compiles one, or runs it here, in containers, or on a cluster."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softpref import __version__
from softpref.config import closest, convert, parse_overrides
from softpref.data.config import EMBEDDED
from softpref.disk import disk_trouble
from softpref.errors import ConfigError, SoftprefError
from softpref.options import CONFIGURATIONS, HIDDEN, Option, instead, read_options
from softpref.pipelines import graph
from softpref.pipelines.local import require_gpus, run_here, task_server
from softpref.pipelines.packages import compile_components, compile_package, packages_folder
from softpref.pipelines.profiles import CLUSTERS, read_profile
from softpref.pipelines.recipes import RECIPES, element_type, inputs, names_in, pipeline_parameters, typed
from softpref.pipelines.submission import add_client_options, submit, ui_address
from softpref.preflight.parameters import PLANNED, STAGES, TABLE
from softpref.preflight.stage import ARTIFACT_SCHEME, Member, check, further_sources, plan

if TYPE_CHECKING:
    from kfp.dsl.graph_component import GraphComponent

COMMANDS = ("run", "compile", "components")


def main(pipeline: GraphComponent, arguments: list[str], name: str = "") -> int:
    """Run the command line of one pipeline; returns the exit status.

    Args:
        name: of the command; by default the script's, such as spo_sweep.py.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every terminal can show all characters
    output = "runs"
    try:
        options = _parse(pipeline, arguments, name)
        output = options.output or output
        if options.command == "components":
            return _components(options)
        given = {name: getattr(options, name) for name in inputs(pipeline)}
        if options.command == "compile" or options.runner == "cluster":
            return _for_cluster(pipeline, given, options)
        parameters = pipeline_parameters(pipeline, options.recipe, given)
        if options.runner == "local":
            require_gpus(parameters["gpus"])
        members = check(parameters)  # before anything is imported that takes seconds
        with task_server(parameters) if options.runner == "local" else contextlib.nullcontext() as tasks:
            print(_planned(pipeline, options, plan(parameters, checked=members)))
            return run_here(pipeline, parameters, options, tasks)
    except SoftprefError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted before anything ran", file=sys.stderr)
        return 130
    except Exception as error:
        if said := disk_trouble(error, [output]):
            print(f"error: {said}", file=sys.stderr)
            return 2
        raise


def _for_cluster(pipeline: GraphComponent, given: dict[str, Any], options: argparse.Namespace) -> int:
    """Compile a package for a cluster, or submit a run to it."""
    profile = read_profile(options.cluster)
    if options.no_cache:  # KFP's client can switch the cache off only for a package that is not uploaded
        stages = {name: dataclasses.replace(one, cache=False) for name, one in profile.stages.items()}
        profile = dataclasses.replace(profile, stages=stages)
    if not profile.kfp_ui and (ui := options.ui_host or options.endpoint):
        profile = dataclasses.replace(profile, kfp_ui=ui_address(ui))
    fixed = profile.fixed_gpus
    if fixed is not None and given.pop("gpus") not in (None, str(fixed), str(fixed or "")):
        raise ConfigError(f"the cluster profile {options.cluster} gives every run {fixed} GPUs")
    shape = {name: parameter.annotation for name, parameter in inputs(pipeline).items()}
    for name, value in profile.parameters.items():
        if name in shape:
            typed(name, value, shape[name])
    if profile.trainjob and profile.trainjob.gpus_per_node is not None and given.get("gpus") is not None:
        raise ConfigError(
            f"gpus is given, and the cluster profile {options.cluster} gives a node "
            f"{profile.trainjob.gpus_per_node} GPUs (trainjob.gpus_per_node); leave one of the two out"
        )
    form = graph.pipeline(pipeline.name, profile)
    parameters = pipeline_parameters(form, options.recipe, given)
    if parameters.get("gpus") == "0":
        parameters["gpus"] = ""  # KFP would write a limit of 0 into the pod
    for name in ("source", "base_model"):
        if parameters[name] not in ("", *EMBEDDED):
            _refuse_local(name, parameters[name])
    checked = _filled(parameters) if options.command == "compile" else parameters
    members = check(checked, here=False)  # before anything is imported that takes seconds
    plan(checked, here=False, checked=members)
    for further in further_sources(parameters["data_overrides"]):
        _refuse_local(further.name, further.place)
    if options.command == "compile":
        suffix = "" if options.cluster == "default" else f"-{profile.name}"
        path = Path(options.output or packages_folder() / f"{_name(pipeline)}{suffix}.yaml")
        print(compile_package(pipeline, path, profile, parameters))
        return 0
    print(_planned(pipeline, options, members))
    # the form shows the recipe; other values given belong to the run, except those that shape the graph
    shown = pipeline_parameters(form, options.recipe, {})
    if parameters["source"].startswith(ARTIFACT_SCHEME):
        shown["source"] = parameters["source"]
    with tempfile.TemporaryDirectory() as folder:
        package = compile_package(pipeline, Path(folder) / f"{_name(pipeline)}.yaml", profile, shown)
        models = [member.name for member in members]
        return submit(pipeline.name, package, parameters, profile, options, models)


def _filled(parameters: dict[str, Any]) -> dict[str, Any]:
    """A form whose source and base model are left empty, filled in so that the rest can be checked."""
    left = [name for name in ("source", "base_model") if not parameters[name]]
    if "model_config" in parameters["sft_overrides"]:  # a model from nothing
        left = [name for name in left if name != "base_model"]
    return {**parameters, **dict.fromkeys(left, "owner/name")}


def _refuse_local(name: str, value: str) -> None:
    if os.path.exists(os.path.expanduser(value)):  # unlike Path.exists, takes a URL too long for a path
        raise ConfigError(
            f"{name} {value} is on this machine, and no step of the cluster sees it: give a Hub id, a "
            "URL (s3://, gs://, https:// …), or a path of a volume that the profile mounts"
        )


def _components(options: argparse.Namespace) -> int:
    """Write the stages' component files for a cluster."""
    profile = read_profile(options.cluster)
    suffix = "" if options.cluster == "default" else f"-{profile.name}"
    folder = Path(options.output or packages_folder() / f"components{suffix}")
    print("\n".join(map(str, compile_components(folder, profile))))
    return 0


def _planned(pipeline: GraphComponent, options: argparse.Namespace, members: Iterable[Member]) -> str:
    return f"{_name(pipeline)}, recipe {options.recipe}: {', '.join(member.name for member in members)}"


# ---------------------------------------------------------------------- the command line


def parser_of(pipeline: GraphComponent, name: str = "", recipe: str | None = None) -> argparse.ArgumentParser:
    """The parser of a pipeline's command line; `--help` shows the defaults of `recipe`."""
    name = name or f"{_name(pipeline)}.py"
    defaults = pipeline_parameters(pipeline, recipe, {}) if recipe else {}
    parser = argparse.ArgumentParser(
        prog=name,
        usage=f"{name} [{'|'.join(COMMANDS)}] [--recipe NAME] [--OPTION VALUE ...]",
        description=pipeline.component_spec.description,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"softpref {__version__}")
    parser.add_argument(
        "command",
        nargs="?",
        metavar=f"{{{','.join(COMMANDS)}}}",
        default="run",
        help="run (default); compile: write a package for the KFP UI, whose form shows the parameters; "
        "components: write every stage as a file for kfp.components.load_component_from_file",
    )
    parser.add_argument(
        "--recipe",
        default="embedded",
        help=f"{', '.join(names_in(RECIPES))}, or a YAML file of parameters, written a_b (default: embedded)",
    )
    parser.add_argument(
        "--output",
        help="folder for the results (default: a new one, runs/RECIPE-TIME); a run that was begun there goes "
        "on; with compile, the package to write; with components, the folder to write",
    )
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help="do every step anew, also those whose results are in --output or, on a cluster, in KFP's cache",
    )
    parser.add_argument(
        "--runner",
        choices=("local", "docker", "cluster"),
        default="local",
        help="where stages run: processes here (default), containers here, or Kubeflow Pipelines",
    )
    cluster = parser.add_argument_group(_CLUSTER)
    cluster.add_argument(
        "--cluster",
        default="default",
        help=f"profile: {', '.join(names_in(CLUSTERS))}, or a YAML file (default: default)",
    )
    add_client_options(cluster)
    group = parser.add_argument_group("pipeline parameters (they win over those of --recipe)")
    for name, parameter in inputs(pipeline).items():
        kind, many = element_type(parameter.annotation)
        default = defaults.get(name, parameter.default)
        shown = json.dumps(default, ensure_ascii=False)
        where = f"default: {shown}" if default == parameter.default else f"recipe {recipe}: {shown}"
        group.add_argument(
            f"--{_dashed(name)}",
            dest=name,
            type=_argument_type(name, kind, many),
            nargs="*" if many else None,
            metavar="JSON" if kind is dict else kind.__name__.upper(),
            help=f"{TABLE[name].text} ({where})".replace("%", "%%"),
        )
    return parser


_CLUSTER = "compile, components, and --runner cluster"


def _parse(pipeline: GraphComponent, arguments: list[str], name: str = "") -> argparse.Namespace:
    recipe = None
    if {"-h", "--help"} & {*arguments}:
        chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        chosen.add_argument("--recipe", default="embedded")
        recipe = chosen.parse_known_args(arguments)[0].recipe
    parser = parser_of(pipeline, name, recipe)
    arguments = [re.sub("^--[^=]+", lambda option: _dashed(option[0]), argument) for argument in arguments]
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(_unknown(arguments[arguments.index(unknown[0]) :], vars(options).keys() - {"command"}))
    if options.command not in COMMANDS:
        parser.error(f"there is no command {options.command!r}: it is run, compile or components")
    to_cluster = options.command != "run" or options.runner == "cluster"
    (cluster,) = [group for group in parser._action_groups if group.title == _CLUSTER]
    for action in cluster._group_actions:
        if not to_cluster and getattr(options, action.dest) != action.default:
            parser.error(
                f"{action.option_strings[0]} is for --runner cluster, and this run is {options.runner}"
            )
    if options.command == "components":
        for name in ("recipe", *inputs(pipeline)):
            if getattr(options, name) != parser.get_default(name):
                parser.error(f"--{_dashed(name)} is for pipelines; components have all their inputs")
    if options.command == "run" and options.runner == "cluster" and options.output:
        parser.error("--output is for runs on this machine; a cluster's results are in MLflow and in KFP")
    return options


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _unknown(arguments: list[str], known: Collection[str]) -> str:
    """What to write instead of the first argument, which is unknown."""
    option, equals, value = arguments[0].partition("=")
    if not option.startswith("--"):
        return f"{option!r} belongs to no option"
    if not equals:
        value = next((one for one in arguments[1:2] if not one.startswith("--")), "true")
    with contextlib.suppress(ValueError):
        value = json.loads(value)
    stage, _, name = option[2:].replace("-", "_").rpartition(".")
    stages = {one: read_options(*place) for one, place in CONFIGURATIONS.items() if one in STAGES}
    stages["compare"] = stages["register"]  # the chosen model must pass the gate of registration
    if stage and stage not in stages:
        return f"{option} is unknown: there is no stage {stage!r}{closest(stage, stages)}"
    meant = [stage] if stage else [*stages]
    options = [other for one in meant for other in stages[one].values()]

    def written(name: str) -> list[str]:
        """As the pipeline's parameter, else in the overrides of each stage that has it."""
        if not stage and name in known:
            return [f"--{_dashed(name)}"]
        found = []
        for one in meant:
            parameters = [other.name for other in TABLE.values() if other.key(one) == name]
            if one == "train":
                parameters += PLANNED.get(name, [])
            if not parameters and name in stages[one] and name not in HIDDEN:
                overrides = next(key for key in TABLE if key.endswith("_overrides") and TABLE[key].key(one))
                given = {name: _fitting(value, stages[one][name])}
                found.append(f"--{_dashed(overrides)} {shlex.quote(json.dumps(given, ensure_ascii=False))}")
            found += [f"--{_dashed(other)}" for other in parameters if other in known]
        return list(dict.fromkeys(found))

    own = {*(() if stage else known), *(other.name for other in options if not other.inherited)}
    inherited = {other.name for other in options} - own
    exact = f"; write {' or '.join(found)}" if (found := written(name)) else ""
    return f"{option} is unknown{instead(name, exact, own, inherited, written)}"


def _fitting(value: Any, option: Option) -> Any:
    """The value; a mark to fill in instead of true or false for an option that is no switch."""
    try:
        convert("", {option.name: value}, {option.name: option.hint})
    except ConfigError:
        return "…" if isinstance(value, bool) else value
    return value


def _argument_type(name: str, kind: type, many: bool = False) -> Callable[[str], Any]:
    """Converts the text of a parameter, or of an element of a list."""

    expected = "true or false" if kind is bool else "a number"
    if many:
        default = " ".join(map(str, TABLE[name].default))
        expected = f"numbers with spaces between them, as in --{name} {default}"

    def converted(text: str) -> Any:
        try:
            if kind is dict:
                return parse_overrides(text, name)
            return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        except (KeyError, ValueError) as error:
            raise argparse.ArgumentTypeError(f"must be {expected}; got {text!r}") from error

    return converted


def _name(pipeline: GraphComponent) -> str:
    return str(pipeline.name).replace("-", "_")
