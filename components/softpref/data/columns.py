"""Which column of a source plays which role in a preference row, and paths into nested ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, TypeGuard

from softpref.config import closest
from softpref.errors import ConfigError

Form = Literal["pair", "candidates", "list", "single"]
Names = tuple[str, ...]
Record = Mapping[str, object]  # a row of a source
Column = str | list[str]  # or path; several where a role takes them


def _options(text: str) -> tuple[Names, ...]:
    """Alternatives between bars, each of one or several names."""
    return tuple(tuple(option.split()) for option in text.split("|"))


# What a row of each form must have, and the ways to say which completion is better.
_NEEDED: dict[Form, Names] = {
    "pair": ("chosen", "rejected"),
    "candidates": ("completion_a", "completion_b"),
    "list": ("completions",),
    "single": ("completion",),
}
_LABELS: dict[Form, tuple[Names, ...]] = {
    "pair": _options("probability | score_chosen score_rejected | margin | "),
    "candidates": _options(
        "votes_a votes_b | votes | probability | preference | strength | score_a score_b | margin"
    ),
    # probability and kind: as this stage writes its rows
    "list": _options("scores | ranks | order | best | verdicts | probability kind | "),
    "single": _options("score | rank | label"),
}
_CONTEXT = ("prompt", "input", "system", "dimension")  # go with every form
# taken by their names also beside configured columns
_FOUND = ("prompt", "system", "weight", "dimension")
_SEVERAL_COLUMNS = {"votes", "completions", "scores", "ranks", "verdicts"}
_SCALED = (("score_chosen", "score_rejected"), ("margin",))  # of a pair, taken only where asked for
ROLES = {*_CONTEXT, "weight", "votes_equal"} | {
    role for form in _NEEDED for roles in (_NEEDED[form], *_LABELS[form]) for role in roles
}

# Data sets with several labels for a row: columns, and the label of each dimension.
_KNOWN_DIMENSIONS: tuple[tuple[dict[str, Column], dict[str, dict[str, str]]], ...] = (
    (
        {"completions": ["response_0", "response_1"]},  # as PKU-SafeRLHF has them
        {"helpful": {"best": "better_response_id"}, "harmless": {"best": "safer_response_id"}},
    ),
    (
        {"completion": "response"},  # as HelpSteer2 has them
        {
            name: {"score": name}
            for name in ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
        },
    ),
)
# What public data call the columns of these roles, apart from the roles' own names.
_KNOWN_AS: dict[Names, tuple[Names, ...]] = {
    ("prompt",): _options("instruction | question | query | messages | conversations | conversation"),
    ("completion_a", "completion_b"): _options(
        "response_a response_b | response_1 response_2 | answer_a answer_b | output_1 output_2 "
        "| conversation_a conversation_b"
    ),
    ("completions",): _options("responses | completions[].response | answers[].answer"),
    ("system",): _options("system_prompt"),
    ("preference",): _options("winner"),
    ("strength",): _options("preference_strength"),
    ("votes_a", "votes_b"): _options("winner_model_a winner_model_b"),
    ("votes_equal",): _options("winner_tie"),
    ("scores",): _options("completions[].overall_score"),
    ("ranks",): _options("answers[].rank"),
}
_NUMBERED = re.compile(r"(completion|response|answer|output|prediction)[ _]?\d+")
# Names that are used for two things: the role and meaning of either.
_AMBIGUOUS = {
    "ranking": (
        ("order", "holds the places of the completions in the list, from 0, the best one's first"),
        ("ranks", "holds a rank for each completion, lower is better"),
    ),
}


_READ_AS = {  # what a reader should know of a role
    "verdicts": "each judged pair of completions is a row of its own, its probability the share of wins",
    "label": "completions with label true are paired with those of the same prompt with label false",
    "system": "a system text becomes a conversation's system message, or a paragraph before a plain prompt",
    "weight": "weights are kept in the dataset's column weight",
    "input": "where there is an input, the prompt is the instruction, a line break and the input",
    "strength": "a strength of -3 means that the first is much better, 3 that the second is",
    "dimension": "rows are of the dimension that they name",
}


class Layout(NamedTuple):
    """The roles of a source's columns.

    Attributes:
        guessed: whether the columns were found by their names.
        implicit: whether a prompt may be cut from words that the completions share.
        unused: columns of the source that have no role.
        notes: what was recognised or assumed, a sentence each.
    """

    form: Form
    label: Names
    columns: dict[str, Column]
    guessed: bool = False
    implicit: bool = False
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def further_columns(own: Mapping[str, str], roles: Names, known: Sequence[str]) -> dict[str, str]:
    """Role to column of a further source, whose columns have the names of their roles unless `own` says else.

    `system`, and the `input` of an `instruction`, are found by their names, as in a source of preferences:
    the prompts of both must be comparable.
    """
    columns = {**{role: role for role in roles}, **own}
    if "system" not in own and (system := _find(("system",), known)):
        columns["system"] = system[0]
    if "input" not in own and columns["prompt"] == "instruction" and "input" in known:
        columns["input"] = "input"
    return columns


def settle_dimensions(
    dimensions: Mapping[str, Mapping[str, object]],
    columns: Mapping[str, object],
    known: Sequence[str],
    settle: Callable[[Mapping[str, object]], Layout],
) -> dict[str, Layout]:
    """Settle how each dimension of a row is read; `{"": layout}` where rows have none.

    Args:
        dimensions: from the dimension's name to the roles that are its own, as configured. Without any, its
            labels lie under its name in the columns of the labels, or all labels are of this one dimension.
            Empty: as the columns show.
        columns: role to column as configured, for all dimensions.
        known: columns of the source and paths into them, see `paths_of`.
        settle: `settle_layout` of this source.

    Raises:
        ConfigError: as `settle_layout`; or several dimensions would be read off the same label.
    """
    asked = bool(dimensions)
    if not columns and not dimensions:
        for every, labels in _KNOWN_DIMENSIONS:
            found = {
                name: roles for name, roles in labels.items() if all(one in known for one in roles.values())
            }
            if found and all(name in known for name in _flat(every.values())):
                columns, dimensions = every, found
    if any(dimensions.values()):
        layouts = {name: settle({**columns, **roles}) for name, roles in dimensions.items()}
    else:
        layout = settle(columns)
        label = {role: column for role in layout.label if isinstance(column := layout.columns[role], str)}
        nested = [
            {name.removeprefix(f"{column}.") for name in known if name.startswith(f"{column}.")}
            for column in label.values()
        ]
        common = {name for name in set[str]().union(*nested) if all(name in one for one in nested)}
        if not (names := [*dimensions] or sorted(name for name in common if is_dimension(name))):
            return {"": layout}
        own = {name: {role: f"{column}.{name}" for role, column in label.items()} for name in common}
        layouts = {name: layout._replace(columns={**layout.columns, **own.get(name, {})}) for name in names}
    if len({layout.form for layout in layouts.values()}) > 1:
        raise ConfigError(f"dimensions {', '.join(layouts)} are of different forms; give each a source")
    unused = set[str].intersection(*(set(layout.unused) for layout in layouts.values()))
    notes = dict.fromkeys(note for layout in layouts.values() for note in layout.notes)
    if not asked:
        notes[f"recognised as dimensions of preference: {', '.join(layouts)}"] = None
    seen: dict[str, str] = {}
    for name, layout in layouts.items():
        read_off = json.dumps([layout.columns[role] for role in layout.label])
        if (other := seen.setdefault(read_off, name)) != name:
            raise ConfigError(
                f"dimensions {other} and {name} have the same label; give each its own, as in "
                f'{{"{other}": {{"probability": "COLUMN"}}, "{name}": {{"probability": "OTHER"}}}}'
            )
        if "dimension" in layout.columns:
            raise ConfigError(
                f"rows name their dimension in the column {layout.columns['dimension']!r}; leave dimensions "
                'out, or the column: {"dimension": null}'
            )
    return {
        name: layout._replace(unused=tuple(one for one in layout.unused if one in unused), notes=(*notes,))
        for name, layout in layouts.items()
    }


def is_dimension(value: object) -> bool:
    """Whether a value can name a dimension: it becomes a part of figures' names."""
    return isinstance(value, str) and bool(re.fullmatch(r"\w[\w -]{0,39}", value))


def settle_layout(
    columns: Mapping[str, object],
    known: Sequence[str],
    template: Sequence[str] = (),
    *,
    scaled: bool = False,
    implicit: bool = False,
) -> Layout:
    """Settle which column plays which role.

    Args:
        columns: role to column as configured; empty goes by the columns' names. A prompt, a system message
            and a weight are found by their names in either case, unless their role is null.
        known: columns of the source and paths into them, see `paths_of`.
        template: columns that the prompt is built from.
        scaled: whether scores and margins beside chosen and rejected are taken.
        implicit: whether a prompt may be cut from what texts share, whatever columns there are.

    Raises:
        ConfigError: roles that do not go together, absent columns, or names that can mean two things.
    """
    given: dict[str, object] = {**(columns or _guess(known, bool(template), scaled))}
    taken = {root(column) for column in _flat(given.values())}
    free = [name for name in known if root(name) not in {*taken, *template}]
    for role in _FOUND:
        if role in given or (role == "prompt" and template) or (role == "weight" and "completion" in given):
            continue
        if found := _find((role,), free):
            given = {role: found[0], **given}
    layout = check_roles(given, bool(template), guessed=not columns)
    used = {root(column) for column in (*_flat(layout.columns.values()), *template)}
    unused = tuple(name for name in known if root(name) == name and name not in used)
    if layout.form == "single" and not template and "prompt" not in layout.columns:
        raise ConfigError("rows with one completion each are grouped by prompt: name a prompt column")
    named = {name for option in _KNOWN_AS.values() for names in option for name in names} | ROLES
    alone = layout.form == "pair" and not set(unused) - named
    return layout._replace(implicit=implicit or alone, unused=unused, notes=_notes(layout, columns))


def _notes(layout: Layout, asked: Mapping[str, object]) -> tuple[str, ...]:
    notes = []
    recognised = [
        f"{role} ← {column}"
        for role, column in layout.columns.items()
        if role not in asked and (column != role or asked or role in ("input", "system", "weight"))
    ]
    if recognised:
        notes.append(f"recognised by the columns' names: {', '.join(recognised)}")
    if layout.form == "list" and not layout.label:
        notes.append("nothing says which completion is better: each list is assumed to stand best first")
    return *notes, *(note for role, note in _READ_AS.items() if role in layout.columns)


def check_roles(columns: Mapping[str, object], has_template: bool, guessed: bool = False) -> Layout:
    """Check that a column mapping describes one kind of preference row; the layout that it gives.

    Raises:
        ConfigError: an unknown role (the closest is named), roles that do not go together, or missing ones.
    """
    checked: dict[str, Column] = {}
    for role, column in columns.items():
        if column is None and role in _FOUND:
            continue
        if role not in ROLES:
            raise ConfigError(f"columns has no role {role!r}{closest(role, ROLES)}")
        several = role in _SEVERAL_COLUMNS
        if (isinstance(column, str) and column) or (
            several and isinstance(column, list) and column and all(n and isinstance(n, str) for n in column)
        ):
            checked[role] = column
        else:
            kind = "a column name or a list of them" if several else "one column name"
            raise ConfigError(f"columns[{role!r}] must be {kind}, got {column!r}")
    given = set(checked)
    if has_template and "prompt" in given:
        raise ConfigError("give either a prompt column or prompt_template, not both")
    if has_template and "input" in given:
        raise ConfigError("give either an input column or prompt_template, which may name it, not both")
    forms: list[Form] = [form for form, needed in _NEEDED.items() if given & set(needed)]
    if len(forms) != 1:
        found = " and ".join("/".join(_NEEDED[form]) for form in forms) or "none of them"
        raise ConfigError(
            "columns must name chosen/rejected, or completion_a/completion_b, or completions, or completion; "
            f"got {found} in {checked}"
        )
    form = forms[0]
    for role in _NEEDED[form]:
        if role not in given:
            raise ConfigError(f"columns names {sorted(given)}, but {role!r} is missing")
    rest = given - set(_NEEDED[form]) - set(_CONTEXT)
    if form != "single":
        rest -= {"weight"}
    if {"votes_a", "votes_b"} <= rest:
        rest -= {"votes_equal"}
    for label in _LABELS[form]:
        if rest == set(label):
            return Layout(form, label, checked, guessed)
    choices = ", or ".join(" and ".join(label) if label else "nothing" for label in _LABELS[form])
    raise ConfigError(
        f"{'/'.join(_NEEDED[form])} go with exactly one of: {choices}; "
        f"got {', '.join(sorted(rest)) or 'nothing'}"
    )


def _guess(known: Sequence[str], has_template: bool, scaled: bool) -> dict[str, Column]:
    """Roles of columns with a role's own name (TRL's names among them) or a well-known one."""
    for form, needed in _NEEDED.items():
        completions: Sequence[Column] | None = _find(needed, known)
        if form == "list" and completions is None and (numbered := _numbered(known)):
            completions = [numbered]
        if completions is None:
            continue
        roles: dict[str, Column] = dict(zip(needed, completions, strict=True))
        for label in _LABELS[form]:
            if form == "pair" and label in _SCALED and not scaled:
                continue
            if not label and form == "list":
                _refuse_ambiguous(known, roles)
            if (found := _find(label, known)) is not None:
                roles |= dict(zip(label, found, strict=True))
                break
        else:
            continue
        if "votes_a" in roles and (equal := _find(("votes_equal",), known)):
            roles["votes_equal"] = equal[0]
        if not has_template and (prompt := _find(("prompt",), known)):
            roles = {"prompt": prompt[0], **roles}
            if prompt[0] == "instruction" and "input" in known:
                roles["input"] = "input"
        return roles
    raise ConfigError(
        'cannot tell which columns hold the preferences; give columns, for example {"prompt": "question", '
        f'"chosen": "better", "rejected": "worse"}}; the source has {", ".join(map(repr, known))}'
    )


def _find(roles: Names, known: Sequence[str]) -> Names | None:
    """The columns of these roles, their own names before others; None where there are none.

    Raises:
        ConfigError: several sets of columns have names of these roles.
    """
    nested = {root(name) for name in known if "[]" in name}
    options = [
        option
        for option in (roles, *_KNOWN_AS.get(roles, ()))
        if all(name in known and name not in nested for name in option)
    ]
    if len(options) > 1 and options[0] != roles:
        ways = " or ".join(json.dumps(dict(zip(roles, option, strict=True))) for option in options)
        raise ConfigError(f"several columns may be the {' and '.join(roles)}; say which in columns: {ways}")
    return options[0] if options else None


def _numbered(known: Sequence[str]) -> list[str]:
    """Three or more columns that differ in a number at their end, such as `response_1` to `response_4`."""
    names = [name for name in known if _NUMBERED.fullmatch(name)]
    stems = {re.sub(r"\d+$", "", name) for name in names}
    if len(names) < 3 or len(stems) > 1:
        return []
    return sorted(names, key=lambda name: int(re.sub(r"\D", "", name)))


def _refuse_ambiguous(known: Sequence[str], roles: Mapping[str, Column]) -> None:
    """Refuse a list with a column whose name has two meanings, and numbered columns without an order."""
    for name, meanings in _AMBIGUOUS.items():
        if name in known:
            ways = "; or ".join(
                f"{json.dumps({**roles, role: name})} if it {meaning}" for role, meaning in meanings
            )
            raise ConfigError(f"column {name!r} can mean two things, say which in columns: {ways}")
    if isinstance(roles["completions"], list):
        raise ConfigError(
            f"the columns {', '.join(map(repr, roles['completions']))} look like completions, and nothing "
            "says which is better: give columns with completions, and scores, ranks, order, best or verdicts"
        )


# Paths into nested columns


def paths_of(record: Record) -> Iterator[str]:
    """A record's columns, and the paths to what lies in them: `meta.score`, and `answers[].text` of a list.

    Messages are values, not nests.
    """
    for name, value in record.items():
        yield name
        inner, mark = (value[0], "[]") if isinstance(value, list) and value else (value, "")
        if isinstance(inner, Mapping) and not is_message(inner):
            for path in paths_of(inner):
                yield f"{name}{mark}.{path}"


def is_message(value: object) -> TypeGuard[Mapping[str, object]]:
    """Whether a value is a message of a conversation, as `role` and `content` or as `from` and `value`."""
    return isinstance(value, Mapping) and (
        {"role", "content"} <= set(value) or {"from", "value"} <= set(value)
    )


def root(path: str) -> str:
    """The column that a path begins with."""
    return re.split(r"\.|\[\]", path, maxsplit=1)[0]


def value_at(record: Record, path: Column) -> object:
    """What lies at a path: of `answers[].text` the list of texts; None where something on the way is missing.

    JSON text on the way is decoded. Of several paths, the list of what lies there.
    """
    if isinstance(path, list):
        return [value_at(record, one) for one in path]
    if path in record:
        return record[path]
    name, _, rest = path.partition(".")
    value = record.get(name.removesuffix("[]"))
    if rest or name.endswith("[]"):
        value = _decoded(value)
    if not rest:
        return value
    if name.endswith("[]") and isinstance(value, list):
        return [value_at(item, rest) if isinstance(item, Mapping) else None for item in value]
    return value_at(value, rest) if isinstance(value, Mapping) else None


def _decoded(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def _flat(columns: Iterable[object]) -> list[str]:
    lists = [column if isinstance(column, list) else [column] for column in columns]
    return [name for names in lists for name in names if isinstance(name, str)]


def check_present(wanted: Iterable[tuple[str, Column]], known: Iterable[str], source: str) -> None:
    """Refuse a mapping to columns that the source does not have.

    Args:
        wanted: what asks for a column or several, and their names.
        known: the columns of the source and paths into them, as its first rows show.
        source: what messages call the source.

    Raises:
        ConfigError: names the absent column, the closest present one, and all present ones.
    """
    known = list(known)
    opened = {root(name) for name in known if root(name) != name}
    for asker, columns in wanted:
        for column in columns if isinstance(columns, list) else [columns]:
            # what lies in a cell's JSON text, or in a legacy struct of lists, shows only when rows are read
            if column in known or (root(column) in known and root(column) not in opened):
                continue
            if column.replace("[]", "") in known:
                continue
            hint = closest(column, known)
            hint = hint if "did you mean" in hint else ""
            raise ConfigError(
                f"{asker}: {source} has no column {column!r}; it has {', '.join(map(repr, known))}{hint}"
            )
