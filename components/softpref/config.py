"""From a file, keyword values and an `overrides` string to one checked dataclass, alike in every stage.

Knows nothing of any stage: a stage hands in its own dataclass.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import json
import re
import reprlib
import types
import typing
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from softpref.errors import ConfigError
from softpref.records import PARAMETERS_FILE
from softpref.remote import public_url

Config = TypeVar("Config")
NULL = "$null"  # stands for a null where KFP bears none
REFUSED = {  # options of transformers that a stage settles by itself
    "resume_from_checkpoint": "a run that was cut off continues from its last complete checkpoint when the "
    "same command is given again",
}
RENAMED = {  # names that options had, or that the other console has
    "epochs": "num_train_epochs",
    "sft_epochs": "sft_num_train_epochs",
    "rule": "selection_rule",
    "model_name": "registered_model_name",
    "config": "recipe",
    "recipe": "config",
    # as TRL's trainers have them
    "loss_type": "method",
    "precompute_ref_log_probs": "reference_cache",
    "use_weighting": "weight_exponent",
    "model_kwargs": "model_init_kwargs",
    "num_generations": "completions_per_prompt",
}
COMMIT = "commit "  # how the version of something on the Hub begins, as the plan settles it

_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}
_WORDS = ("prompt_template", "system_prompt", "implicit_prompt_end")  # parameters that are no addresses
_MOST_VALUES = 100_000  # in one configuration, aliases of YAML expanded
_BROKEN_JSON = (ValueError, RecursionError)  # also numbers of thousands of digits, and deep nesting
_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxother = 2, 200, 200


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read a YAML or JSON file that holds one mapping, in UTF-8, or UTF-16 with its mark.

    Keys are text as they are written: `yes`, `no` and `0` of YAML too.

    Raises:
        ConfigError: the file is absent, is not YAML, or holds something else than a mapping.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)  # before other mappings are laid under it
            _once([key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            self.flatten_mapping(node)
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    key.tag = self.DEFAULT_SCALAR_TAG
            return super().construct_mapping(node, deep)

    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"configuration file {path} does not exist")
    content = path.read_bytes()
    try:
        try:
            values = _from_json(content)  # whose pairs of \\u escapes YAML does not know
        except _BROKEN_JSON:
            values = yaml.load(content, Loader)
    except Exception as error:  # the parser's own, and what its values' types raise
        raise ConfigError(
            f"configuration file {path} is not valid YAML or JSON: {_in_words(error)}"
        ) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"configuration file {path} holds a {type(values).__name__}, expected a mapping")
    _check_values(values, f"configuration file {path}")
    return values


def parse_overrides(overrides: str | Mapping[str, Any] | None, name: str = "overrides") -> dict[str, Any]:
    """Read a parameter that is a JSON object, by default `overrides`; an empty string or None means none.

    Args:
        name: of the parameter, for messages.

    Raises:
        ConfigError: the text is not JSON, or not a JSON object.
    """
    if overrides is None or overrides == "":
        return {}
    if isinstance(overrides, Mapping):
        return {key: _whole(value) for key, value in overrides.items()}
    try:
        values = _from_json(overrides)
    except _BROKEN_JSON as error:
        raise ConfigError(
            f"{name} is not JSON ({_in_words(error)}); write it like {_meant(overrides, dict)}, "
            f"got {shown(overrides)}"
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{name} must be a JSON object, got {shown(overrides)}")
    return values


def _from_json(text: str | bytes) -> Any:
    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _once([key for key, _ in pairs])
        return dict(pairs)

    return json.loads(text, object_pairs_hook=mapping)


def _once(keys: list[str]) -> None:
    """Refuse a key that stands twice in a mapping, of which only the last would count."""
    for key, count in Counter(keys).items():
        if count > 1 and key != "<<":  # YAML's way to lay mappings under one
            raise ValueError(f"it names {shown(key)} twice")


def shown(value: Any) -> str:
    """A value for a message: `repr`, cut short."""
    try:
        return _repr.repr(value)
    except ValueError:
        return "a number of thousands of digits"


def _in_words(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _check_values(values: Any, where: str) -> None:
    """Refuse text that no file could hold, and values without end (YAML's aliases can multiply them)."""
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


def _whole(value: Any) -> Any:
    """KFP hands numbers of a struct over as floats; those without a fraction were written as integers."""
    if isinstance(value, dict):
        return {key: _whole(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_whole(one) for one in value]
    if value == NULL:
        return None
    return int(value) if isinstance(value, float) and value.is_integer() else value


def hub_revision(version: str) -> dict[str, str]:
    """The parameter `revision` that a version settled by the plan stands for; none where it is no commit."""
    if not version.startswith(COMMIT):
        return {}
    return {"revision": version.removeprefix(COMMIT).partition(";")[0]}


def build_config(cls: type[Config], *layers: Mapping[str, Any]) -> Config:
    """Build `cls`, a dataclass, from layers of values, later ones winning.

    Text values are turned into the field's type (`"0.5"` into a float), so that the console, a recipe and
    the KFP form can share one path. A float without a fraction is accepted where an integer is asked for,
    because KFP hands integers inside JSON over as floats.

    Raises:
        ConfigError: an unknown key (the closest known one is named), a value of a wrong type, a missing
            required field, or whatever the dataclass itself refuses.
    """
    values: dict[str, Any] = {}
    for layer in layers:
        values.update(layer)
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


def check_names(cls: type, names: typing.Iterable[str]) -> dict[str, dataclasses.Field]:
    """The fields of a dataclass by name, which are all that its constructor takes.

    Raises:
        ConfigError: one of `names` is none of them; the closest is named.
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
    """Write all parameters of a stage beside its result, as it ran; `--config` takes the file again.

    Passwords in URLs and tokens are left out, and so is what the stage settles by itself.

    Args:
        config: the stage's configuration, a dataclass.
    """
    import yaml

    values = config.to_dict() if hasattr(config, "to_dict") else dataclasses.asdict(config)
    kept = {
        key: value if key in _WORDS else without_secrets(value)
        for key, value in values.items()
        if key not in ("output_dir", *REFUSED)
        and value != f"<{key.upper()}>"  # transformers masks its tokens so
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    with (Path(folder) / PARAMETERS_FILE).open("w", encoding="utf-8") as file:
        yaml.safe_dump(json.loads(json.dumps(kept, default=str)), file, sort_keys=False, allow_unicode=True)


def without_secrets(value: Any) -> Any:
    """Parameters as they may be recorded: a URL, however deep, can hold a password or a signature."""
    if isinstance(value, dict):
        return {public_url(str(key)): without_secrets(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(one) for one in value]
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(*_BROKEN_JSON):  # a mapping within a text
            return json.dumps(without_secrets(json.loads(value)))
    return public_url(value) if isinstance(value, str) else value


def convert(prefix: str, values: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """Values as the types of their fields.

    Args:
        prefix: what stands before a parameter's name in messages.
        hints: type of each field; `Any` takes a value as it is.

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
        others: names that are known too, but meant only with the key's words, or nearly its letters.
    """
    known = sorted(known)
    if near := nearest(key, known, others):
        return f"; did you mean {' or '.join(map(repr, near))}?"
    return f"; known: {', '.join(known)}" if len(known) <= 40 else ""


def nearest(key: str, known: typing.Iterable[str], others: typing.Iterable[str] = ()) -> list[str]:
    """The names most like `key`, as `closest` has them: up to four, best first."""
    known, others, key = sorted(known), sorted(others), str(key)
    if RENAMED.get(key) in [*known, *others]:
        return [RENAMED[key]]
    if near := holding(key, [*known, *others])[:4]:
        return near
    spelt = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    spelt += difflib.get_close_matches(key, others, n=1, cutoff=0.88)
    return difflib.get_close_matches(key, spelt, n=1, cutoff=0)


def holding(key: str, names: typing.Iterable[str]) -> list[str]:
    """The names that hold all words of a key of several, as `num_train_epochs` those of `num_epochs`."""
    words = set(key.split("_"))
    return [name for name in names if len(words) > 1 and words < set(name.split("_"))]


def _convert(name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type, or a ConfigError that names the parameter."""
    options, broken = _flatten(hint), ""
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
            if isinstance(value, str) and value.lower() in _TRUE | _FALSE:
                return value.lower() in _TRUE
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
            if name.endswith("fsdp") and isinstance(value, bool):  # transformers says str, and wants True
                return value
        elif (origin or option) in (dict, list, tuple):
            container = origin or option
            if isinstance(value, str):
                try:
                    value = _from_json(value)
                except _BROKEN_JSON as error:
                    broken = f" ({_in_words(error)}); write it as JSON, like {_meant(value, container)}"
                    continue
                _check_values(value, name)
            if isinstance(value, container) or (container is tuple and isinstance(value, list)):
                return container(value)
        elif isinstance(option, type) and isinstance(value, option):
            return value
        elif isinstance(option, type) and not option.__module__.startswith("builtins"):
            return value  # an enum or class that the dataclass converts by itself
    allowed = " or ".join(
        " | ".join(repr(choice) for choice in typing.get_args(option))
        if typing.get_origin(option) is typing.Literal
        else getattr(option, "__name__", str(option))
        for option in options
        if option is not type(None)
    )
    raise ConfigError(f"{name} must be {allowed}, got {shown(value)}{broken}")


def _meant(text: str, container: type) -> str:
    """The JSON that may have been meant by text that is none: `a=b`, YAML, or words with commas between."""
    import yaml

    meant: Any = None
    parts = [part.strip() for part in text.split(",")]
    if len(text) <= 200:
        with contextlib.suppress(Exception):
            # YAML takes `a:1` for one word; the colon of an address is none between key and value
            meant = yaml.safe_load(re.sub(r"(?<=\w):(?=[^\s/])", ": ", text))
    if container is dict and all("=" in part for part in parts):
        meant = dict(part.partition("=")[::2] for part in parts)
    elif container is not dict and isinstance(meant, str):
        meant = parts
    known = isinstance(meant, dict if container is dict else list)
    return (
        json.dumps(meant, default=str) if known else '{"KEY": "VALUE"}' if container is dict else '["VALUE"]'
    )


def _flatten(hint: Any) -> list[Any]:
    """The members of a union, narrow types first so that `"5"` for `int | str` stays what was meant."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [option for member in typing.get_args(hint) for option in _flatten(member)]
    return [hint]
