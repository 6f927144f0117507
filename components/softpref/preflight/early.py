"""Checks a stage's options in a fraction of a second, without importing what they configure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softpref.config import closest, convert
from softpref.errors import ConfigError
from softpref.lm.ranges import check_ranges
from softpref.options import CONFIGURATIONS, read_options
from softpref.spo.checks import Derived, check_options


def check_early(stage: str, *layers: Mapping[str, Any]) -> Any:
    """Check names, types and ranges of a stage's options, given in layers, later ones winning.

    Returns:
        The options, with their `Derived` properties.

    Raises:
        ConfigError: the same as of the stage's configuration.
    """
    module, name = CONFIGURATIONS[stage]
    known = read_options(module, name)
    values = {key: value for layer in layers for key, value in layer.items()}
    for key in values:
        if key not in known:
            own = [one.name for one in known.values() if not one.inherited]
            raise ConfigError(f"{name} has no parameter {key!r}{closest(key, own, known.keys() - own)}")
    given = convert(f"{name}.", values, {one.name: one.hint for one in known.values()})
    settled = {one.name: one.default for one in known.values()} | given
    options = type(name, (Derived,), settled)()
    if stage in ("sft", "train", "judge"):
        check_ranges(options)
    if stage == "train":
        check_options(options)
    return options
