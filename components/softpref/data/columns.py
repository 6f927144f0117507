"""Which column of a source plays which role in a preference row. Looks at names, never at rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from softpref.config import closest
from softpref.errors import ConfigError

Form = Literal["pair", "candidates", "list", "single"]

# What a row of each form must have, and the ways to say which completion is better.
_NEEDED: dict[Form, tuple[str, ...]] = {
    "pair": ("chosen", "rejected"),
    "candidates": ("completion_a", "completion_b"),
    "list": ("completions",),
    "single": ("completion",),
}
_LABELS: dict[Form, tuple[tuple[str, ...], ...]] = {
    "pair": (("probability",), ()),
    "candidates": (("votes_a", "votes_b"), ("votes",), ("probability",), ("preference",)),
    "list": (("scores",), ("ranks",), ("best",), ()),
    "single": (("score",), ("rank",)),
}
_SEVERAL_COLUMNS = {"votes", "completions", "scores", "ranks"}
ROLES = {"prompt", "votes_equal"} | {
    role for form in _NEEDED for roles in (_NEEDED[form], *_LABELS[form]) for role in roles
}


class Layout(NamedTuple):
    """The roles of a source's columns: `columns` maps role to column (or columns)."""

    form: Form
    label: tuple[str, ...]
    columns: dict[str, Any]
    guessed: bool


def check_roles(columns: Mapping[str, Any], has_template: bool, guessed: bool = False) -> Layout:
    """Check that a column mapping describes one kind of preference row.

    Raises:
        ConfigError: an unknown role (the closest is named), roles that do not go together, or missing ones.
    """
    for role, column in columns.items():
        if role not in ROLES:
            raise ConfigError(f"columns has no role {role!r}{closest(role, ROLES)}")
        names = column if isinstance(column, list) and role in _SEVERAL_COLUMNS else [column]
        if not names or not all(isinstance(name, str) and name for name in names):
            kind = "a column name or a list of them" if role in _SEVERAL_COLUMNS else "one column name"
            raise ConfigError(f"columns[{role!r}] must be {kind}, got {column!r}")
    given = set(columns)
    if has_template and "prompt" in given:
        raise ConfigError("give either a prompt column or prompt_template, not both")
    forms: list[Form] = [form for form, needed in _NEEDED.items() if given & set(needed)]
    if len(forms) != 1:
        found = " and ".join("/".join(_NEEDED[form]) for form in forms) or "none of them"
        raise ConfigError(
            "columns must name chosen/rejected, or completion_a/completion_b, or completions, or completion; "
            f"got {found} in {dict(columns)}"
        )
    form = forms[0]
    for role in _NEEDED[form]:
        if role not in given:
            raise ConfigError(f"columns names {sorted(given)}, but {role!r} is missing")
    rest = given - set(_NEEDED[form]) - {"prompt"}
    if {"votes_a", "votes_b"} <= rest:
        rest -= {"votes_equal"}
    for label in _LABELS[form]:
        if rest == set(label):
            if form == "single" and not has_template and "prompt" not in given:
                raise ConfigError("rows with one completion each are grouped by prompt: name a prompt column")
            return Layout(form, label, dict(columns), guessed)
    choices = ", or ".join(" and ".join(label) if label else "nothing" for label in _LABELS[form])
    raise ConfigError(
        f"{'/'.join(_NEEDED[form])} go with exactly one of: {choices}; "
        f"got {', '.join(sorted(rest)) or 'nothing'}"
    )


def guess_roles(known: Iterable[str], has_template: bool) -> Layout:
    """Take columns that bear a role's own name (TRL's names among them).

    Raises:
        ConfigError: no complete set of roles is among the `known` columns, which the message lists.
    """
    known = list(known)
    names = set(known)
    for form, needed in _NEEDED.items():
        if not set(needed) <= names:
            continue
        for label in _LABELS[form]:
            if not set(label) <= names:
                continue
            roles = [*needed, *label]
            if "prompt" in names and not has_template:
                roles.insert(0, "prompt")
            if "votes_a" in label and "votes_equal" in names:
                roles.append("votes_equal")
            return check_roles({role: role for role in roles}, has_template, guessed=True)
    raise ConfigError(
        'cannot tell which columns hold the preferences; give columns, for example {"prompt": "question", '
        f'"chosen": "better", "rejected": "worse"}}; the source has {", ".join(map(repr, known))}'
    )


def check_present(wanted: Iterable[tuple[str, Any]], known: Iterable[str], source: str) -> None:
    """Refuse a mapping to columns that the source does not have.

    Args:
        wanted: what asks for the column, and its name (or a list of names).
        known: the columns of the source, as far as its first rows show.
        source: how to call the source in the message.

    Raises:
        ConfigError: names the absent column, the closest present one, and all present ones.
    """
    known = list(known)
    for asker, columns in wanted:
        for column in columns if isinstance(columns, list) else [columns]:
            if column not in known:
                hint = closest(column, known)
                hint = hint if "did you mean" in hint else ""
                raise ConfigError(
                    f"{asker}: {source} has no column {column!r}{hint}; it has {', '.join(map(repr, known))}"
                )
