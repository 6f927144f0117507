"""The page that shows what a dataset holds. Computes no statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from softpref.data.config import EMBEDDED
from softpref.judges.texts import as_text
from softpref.pages import render
from softpref.records import DatasetStats, PreferenceRow, Text

_SHOWN_CHARACTERS = 700


def render_page(stats: DatasetStats, examples: Sequence[PreferenceRow]) -> str:
    """A whole HTML document that loads nothing from elsewhere, with these rows as examples."""
    return render(
        "dataset.html",
        stats=stats,
        name=_name(stats),
        total=sum(stats["rows"].values()),
        examples=list(map(_example, examples)),
        origin=list(_origin(stats)),
    )


def _name(stats: DatasetStats) -> str:
    if "mixture" in stats:
        return " + ".join(one["name"] for one in stats["mixture"])
    return f"the {stats['source']} world" if stats["source"] in EMBEDDED else str(stats["source"])


def _example(row: PreferenceRow) -> dict[str, object]:
    if row["kind"] != "pairwise":
        what = "ranking of" if row["kind"] == "ranking" else "best of"
        label = f"{what} {len(row['completions'])}, best first"
    elif row["probability"] is None:
        label = "hard label"
    else:
        label = f"the first beats the second with probability {row['probability']:.2f}"
    return {
        "row": row["source_row"],
        "source": row.get("source", "the source"),
        "label": label,
        "prompt": _shown(row["prompt"]),
        "completions": list(map(_shown, row["completions"])),
    }


def _origin(stats: DatasetStats) -> Iterator[tuple[str, object]]:
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


def _shown(text: Text) -> str:
    text = as_text(text, roles=True)
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    return f"{text[:_SHOWN_CHARACTERS]} … ({len(text):,} characters)"
