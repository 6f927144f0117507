"""The page that shows what a dataset holds. Computes no statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from softpref.data.config import EMBEDDED
from softpref.judges.texts import as_text
from softpref.pages import render
from softpref.records.dataset import DatasetStats, PreferenceRow, Text

_SHOWN_CHARACTERS = 700


def render_page(stats: DatasetStats, examples: Sequence[PreferenceRow]) -> str:
    """A whole HTML document that loads nothing from elsewhere, with these rows as examples."""
    return render(
        "dataset.html",
        stats=stats,
        name=_name(stats),
        total=sum(stats["rows"].values()),
        examples=list(map(_example, examples)),
        readings=list(_readings(stats)),
        origin=[
            ("seed", stats["config"]["seed"]),
            ("dataset hash", stats["dataset_hash"]),
            ("test split hash", stats["test_hash"]),
        ],
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
    if dimension := row.get("dimension"):
        label = f"{dimension}: {label}"
    return {
        "row": row["source_row"],
        "source": row.get("source", "the source"),
        "label": label,
        "prompt": _shown(row["prompt"]),
        "completions": list(map(_shown, row["completions"])),
    }


def _readings(stats: DatasetStats) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """How the columns of each source are read: its name and facts."""
    mappings = {one["name"]: one["mapping"] for one in stats.get("mixture", ())} or {"": stats["mapping"]}
    for name, mapping in mappings.items():
        columns = ", ".join(f"{role} ← {column}" for role, column in mapping["columns"].items())
        yield (
            name,
            [
                ("columns", columns + (" (guessed from their names)" if mapping["guessed"] else "")),
                *(
                    (
                        f"dimension {dimension}",
                        ", ".join(f"{role} ← {column}" for role, column in own.items()),
                    )
                    for dimension, own in mapping.get("dimensions", {}).items()
                ),
                ("read as", "; ".join(mapping.get("notes", [])) or "–"),
                ("columns without use", ", ".join(mapping.get("unused", [])) or "–"),
                ("prompt template", mapping["prompt_template"] or "–"),
            ],
        )


def _shown(text: Text) -> str:
    text = as_text(text, roles=True)
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    return f"{text[:_SHOWN_CHARACTERS]} … ({len(text):,} characters)"
