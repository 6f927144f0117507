"""Builds a stage's checked configuration, a dataclass, from files, values and an `overrides` string."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import json
import os
import re
import reprlib
import types
import typing
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from softpref.disk import in_brief, what_is_at
from softpref.errors import ConfigError
from softpref.records.files import PARAMETERS_FILE
from softpref.remote import public_url

Config = TypeVar("Config")
NULL = "$null"  # stands for null where KFP allows none
REFUSED = {  # options of transformers that a stage sets itself
    "resume_from_checkpoint": "a run that was cut off continues from its last complete checkpoint when the "
    "same command is given again",
}
RENAMED = {  # former names, and names in the other console
    "epochs": "num_train_epochs",
    "sft_epochs": "sft_num_train_epochs",
    "rule": "selection_rule",
    "model_name": "registered_model_name",
    "config": "recipe",
    "recipe": "config",
    # TRL's names
    "loss_type": "method",
    "precompute_ref_log_probs": "reference_cache",
    "use_weighting": "weight_exponent",
    "model_kwargs": "model_init_kwargs",
    "num_generations": "completions_per_prompt",
}
COMMIT = "commit "  # prefix of a Hub version that the plan has pinned

TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}
_WORDS = ("prompt_template", "system_prompt", "implicit_prompt_end")  # text that is never a URL
_MOST_VALUES = 100_000  # in one configuration, YAML's aliases expanded
_BROKEN_JSON = (ValueError, RecursionError)  # ValueError also for numbers of thousands of digits
_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxother = 2, 200, 200


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read a YAML or JSON file that holds one mapping, in UTF-8 or UTF-16 with a byte order mark.

    All keys are text as written, even YAML's `yes`, `no` and `0`.

    Raises:
        ConfigError: the file is absent, is not YAML, or holds something other than a mapping.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
            node = super().compose_mapping_node(anchor)  # before `<<` merges others into it
            _refuse_repeated([key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
            return node

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            self.flatten_mapping(node)
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    key.tag = self.DEFAULT_SCALAR_TAG
            return super().construct_mapping(node, deep)

    path = Path(path)
    if not os.path.isfile(path):
        raise ConfigError(f"configuration file {path} {what_is_at(path)}; give a YAML or JSON file")
    content = path.read_bytes()
    try:
        try:
            values = _from_json(content)  # YAML does not know JSON's pairs of \\u escapes
        except _BROKEN_JSON:
            values = yaml.load(content, Loader)
    except Exception as error:  # of the parser, or of the types of its values
        raise ConfigError(
            f"configuration file {path} is not valid YAML or JSON: {in_brief(error)}"
        ) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"configuration file {path} holds a {type(values).__name__}, expected a mapping")
    _check_values(values, f"configuration file {path}")
    return values


def parse_overrides(overrides: str | Mapping[str, Any] | None, name: str = "overrides") -> dict[str, Any]:
    """Read the JSON object of a parameter, called `name` in messages; empty text and None give an empty one.

    Raises:
        ConfigError: the text is not JSON, or not a JSON object.
    """
    if overrides is None or overrides == "":
        return {}
    if isinstance(overrides, Mapping):
        return {key: _from_struct(value) for key, value in overrides.items()}
    try:
        values = _from_json(overrides)
    except _BROKEN_JSON as error:
        raise ConfigError(
            f"{name} is not JSON ({in_brief(error)}); write it like {_meant(overrides, dict)}, "
            f"got {shown(overrides)}"
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{name} must be a JSON object, got {shown(overrides)}")
    return values


def _from_json(text: str | bytes) -> Any:
    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _refuse_repeated([key for key, _ in pairs])
        return dict(pairs)

    return json.loads(text, object_pairs_hook=mapping)


def _refuse_repeated(keys: list[str]) -> None:
    """Of a repeated key only the last value would count; YAML's merge key may be repeated."""
    for key, count in Counter(keys).items():
        if count > 1 and key != "<<":
            raise ValueError(f"it names {shown(key)} twice")


def shown(value: object) -> str:
    """The `repr` of a value for a message, cut short."""
    try:
        return _repr.repr(value)
    except ValueError:
        return "a number of thousands of digits"


def _check_values(values: object, where: str) -> None:
    """Refuse text that no file can hold, and too many values, as YAML's aliases can make."""
    waiting = [values]
    for _ in range(_MOST_VALUES):
        if not waiting:
            return
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [*value, *value.values()]
        elif isinstance(value, (list, tuple, set)):
            waiting += value
        elif isinstance(value, str) and ("\0" in value or value.encode(errors="ignore").decode() != value):
            raise ConfigError(f"{where}: {shown(value)} holds a NUL or is not UTF-8; write it without")
    raise ConfigError(f"{where} holds more than {_MOST_VALUES:,} values")


def _from_struct(value: Any) -> Any:
    """Undo what KFP's structs do: they make all numbers floats, and allow no null."""
    if isinstance(value, dict):
        return {key: _from_struct(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_from_struct(one) for one in value]
    if value == NULL:
        return None
    return int(value) if isinstance(value, float) and value.is_integer() else value


def hub_revision(version: str) -> dict[str, str]:
    """The parameter `revision` for a version that the plan has pinned; none where it is not a commit."""
    if not version.startswith(COMMIT):
        return {}
    return {"revision": version.removeprefix(COMMIT).partition(";")[0]}


def build_config(cls: type[Config], *layers: Mapping[str, Any]) -> Config:
    """Build `cls`, a dataclass, from layers of values, later ones winning.

    Text is converted to the field's type (`"0.5"` to a float), so that the console, recipes and the KFP form
    share one path. Integer fields accept a float without a fraction: KFP turns integers in JSON into floats.

    Raises:
        ConfigError: an unknown key (the closest known one is named), a value of a wrong type, a missing
            required field, or what the dataclass itself refuses.
    """
    values = {key: value for layer in layers for key, value in layer.items()}
    fields = check_names(cls, values)
    converted = convert(f"{cls.__name__}.", values, typing.get_type_hints(cls))
    missing = [
        name
        for name, field in fields.items()
        if name not in converted
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{cls.__name__} needs {', '.join(missing)}")
    try:
        return cls(**converted)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{cls.__name__}: {error}") from error


def check_names(cls: type, names: typing.Iterable[str]) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a dataclass's constructor by name.

    Raises:
        ConfigError: one of `names` is not a field; the closest field is named.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    own = {
        name
        for base in cls.__mro__
        if not base.__module__.startswith("transformers.")
        for name in inspect.get_annotations(base)
    }
    for name in names:
        if name not in fields:
            hint = closest(name, own & {*fields}, {*fields} - own)
            raise ConfigError(f"{cls.__name__} has no parameter {name!r}{hint}")
    return fields


def write_parameters(config: Any, folder: str | Path) -> None:
    """Write a stage's configuration (a dataclass) beside its result, in a file for `--config`.

    Passwords in URLs and tokens are left out, and so is what the stage sets itself.
    """
    import yaml

    values = config.to_dict() if hasattr(config, "to_dict") else dataclasses.asdict(config)
    kept = {
        key: value if key in _WORDS else without_secrets(value)
        for key, value in values.items()
        if key not in ("output_dir", *REFUSED)
        and value != f"<{key.upper()}>"  # how transformers masks its tokens
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    with (Path(folder) / PARAMETERS_FILE).open("w", encoding="utf-8") as file:
        yaml.safe_dump(json.loads(json.dumps(kept, default=str)), file, sort_keys=False, allow_unicode=True)


def without_secrets(value: Any) -> Any:
    """Parameters fit to be recorded: without the passwords and signatures of URLs, however deep."""
    if isinstance(value, dict):
        return {public_url(str(key)): without_secrets(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(one) for one in value]
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(*_BROKEN_JSON):
            return json.dumps(without_secrets(json.loads(value)))
    return public_url(value) if isinstance(value, str) else value


def convert(prefix: str, values: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """Values converted to the types of their fields (`hints`); `Any` leaves a value as it is.

    Args:
        prefix: of a parameter's name in messages.

    Raises:
        ConfigError: names the parameter, and what would be right.
    """
    for key, value in values.items():
        _check_values(value, f"{prefix}{shown(key)}")
        if key in REFUSED and value not in (None, ""):
            raise ConfigError(f"{prefix}{key} must be left out: {REFUSED[key]}")
    return {key: _convert(f"{prefix}{key}", value, hints[key]) for key, value in values.items()}


def closest(key: str, known: typing.Iterable[str], others: typing.Iterable[str] = ()) -> str:
    """`"; did you mean 'x'?"` for the known names most like `key`, or the known names when none is close.

    Args:
        others: known names that are suggested only for the same words or a much closer spelling.
    """
    known = sorted(known)
    if near := nearest(key, known, others):
        return f"; did you mean {' or '.join(map(repr, near))}?"
    return f"; known: {', '.join(known)}" if len(known) <= 40 else ""


def nearest(key: str, known: typing.Iterable[str], others: typing.Iterable[str] = ()) -> list[str]:
    """The names that `closest` suggests: up to four, best first."""
    known, others, key = sorted(known), sorted(others), str(key)
    if RENAMED.get(key) in [*known, *others]:
        return [RENAMED[key]]
    if near := holding(key, [*known, *others])[:4]:
        return near
    spelt = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    spelt += difflib.get_close_matches(key, others, n=1, cutoff=0.88)
    return difflib.get_close_matches(key, spelt, n=1, cutoff=0)


def holding(key: str, names: typing.Iterable[str]) -> list[str]:
    """The names with all words of a key of several words, as `num_train_epochs` has those of `num_epochs`."""
    words = set(key.split("_"))
    return [name for name in names if len(words) > 1 and words < set(name.split("_"))]


def _convert(name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type, or a ConfigError that names the parameter."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options, broken = typing.get_args(hint) if union else (hint,), ""
    if value is None or (isinstance(value, str) and value == "" and str not in options):
        if type(None) in options or Any in options:
            return None
        raise ConfigError(f"{name} needs a value, got none")
    for option in options:
        origin = typing.get_origin(option)
        if option is Any:
            return value
        if origin is typing.Literal:
            if value in typing.get_args(option):
                return value
        elif option is bool:
            if isinstance(value, bool):
                return value
            if isinstance(value, str) and value.lower() in TRUE | _FALSE:
                return value.lower() in TRUE
        elif option is int:
            if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
                return value
            if isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
                return int(value)
            if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", value):
                return int(value)
        elif option is float:
            if isinstance(value, (int, float, str)) and not isinstance(value, bool):
                try:
                    return float(value)
                except (ValueError, OverflowError):
                    pass
        elif option is str:
            if isinstance(value, str):
                return value
            if name.endswith("fsdp") and isinstance(value, bool):  # transformers declares str and wants True
                return value
        elif (origin or option) in (dict, list, tuple):
            container = origin or option
            if isinstance(value, str):
                try:
                    value = _from_json(value)
                except _BROKEN_JSON as error:
                    broken = f" ({in_brief(error)}); write it as JSON, like {_meant(value, container)}"
                    continue
                _check_values(value, name)
            if isinstance(value, container) or (container is tuple and isinstance(value, list)):
                return container(value)
        elif isinstance(option, type) and isinstance(value, option):
            return value
        elif isinstance(option, type) and not option.__module__.startswith("builtins"):
            return value  # an enum or class that the dataclass converts itself
    allowed = " or ".join(
        " | ".join(repr(choice) for choice in typing.get_args(option))
        if typing.get_origin(option) is typing.Literal
        else getattr(option, "__name__", str(option))
        for option in options
        if option is not type(None)
    )
    raise ConfigError(f"{name} must be {allowed}, got {shown(value)}{broken}")


def _meant(text: str, container: type) -> str:
    """The JSON that text of another form may mean: `a=b`, YAML, or words separated by commas."""
    import yaml

    meant: Any = None
    parts = [part.strip() for part in text.split(",")]
    if len(text) <= 200:
        with contextlib.suppress(Exception):
            # YAML takes `a:1` for one word; the colon of a URL separates no key
            meant = yaml.safe_load(re.sub(r"(?<=\w):(?=[^\s/])", ": ", text))
    if container is dict and all("=" in part for part in parts):
        meant = dict(part.partition("=")[::2] for part in parts)
    elif container is not dict and isinstance(meant, str):
        meant = parts
    if isinstance(meant, dict if container is dict else list):
        return json.dumps(meant, default=str)
    return '{"KEY": "VALUE"}' if container is dict else '["VALUE"]'
