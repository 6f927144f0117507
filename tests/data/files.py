"""Rows as a file of JSON lines, and what a dataset folder holds."""

import json

import datasets


def write(path, rows):
    """Write rows; returns the path as a source."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def splits(folder):
    return {split: list(rows) for split, rows in datasets.load_from_disk(str(folder)).items()}


def everything(folder):
    return [row for rows in splits(folder).values() for row in rows]
