"""The page that shows what a dataset holds. Computes no statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from softpref.data.config import EMBEDDED
from softpref.pages import render

_SHOWN_CHARACTERS = 700


def render_page(stats: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> str:
    """Draw the page.

    Args:
        stats: what `stats.json` holds.
        examples: accepted rows to show, with the columns of the dataset.

    Returns:
        A whole HTML document that loads nothing from elsewhere.
    """
    return render(
        "dataset.html",
        stats=stats,
        name=_name(stats),
        total=sum(stats["rows"].values()),
        examples=list(map(_example, examples)),
        origin=list(_origin(stats)),
    )


def _name(stats: Mapping[str, Any]) -> str:
    if "mixture" in stats:
        return " + ".join(one["name"] for one in stats["mixture"])
    return f"the {stats['source']} world" if stats["source"] in EMBEDDED else str(stats["source"])


def _example(row: Mapping[str, Any]) -> dict[str, Any]:
    probability = row["probability"]
    label = (
        "hard label"
        if probability is None
        else f"the first beats the second with probability {probability:.2f}"
    )
    if row["kind"] != "pairwise":
        label = f"{row['kind'].replace('_', ' ')} of {len(row['completions'])}, best first"
    return {
        "row": row["source_row"],
        "source": row.get("source", "the source"),
        "label": label,
        "prompt": _shown(row["prompt"]),
        "completions": list(map(_shown, row["completions"])),
    }


def _origin(stats: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    mappings = {f"{one['name']}: ": one["mapping"] for one in stats.get("mixture", ())}
    for of, mapping in (mappings or {"": stats["mapping"]}).items():
        columns = ", ".join(f"{role} ← {column}" for role, column in mapping["columns"].items())
        yield f"{of}columns", columns + (" (guessed from their names)" if mapping["guessed"] else "")
        yield f"{of}read as", "; ".join(mapping.get("notes", [])) or "–"
        yield f"{of}columns without use", ", ".join(mapping.get("unused", [])) or "–"
        yield f"{of}prompt template", mapping["prompt_template"] or "–"
    yield "seed", stats["config"]["seed"]
    yield "dataset hash", stats["dataset_hash"]
    yield "test split hash", stats["test_hash"]


def _shown(text: Any) -> str:
    if not isinstance(text, str):
        text = "\n".join(f"{message['role']}: {message['content']}" for message in text)
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    return f"{text[:_SHOWN_CHARACTERS]} … ({len(text):,} characters)"
