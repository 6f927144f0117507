"""The data files of a folder by split, as its dataset card or their names divide it. Reads none of them."""

from __future__ import annotations

import glob
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from softpref.data.file_formats import FORMATS, format_inside, format_of, printable
from softpref.errors import ConfigError

logger = logging.getLogger(__name__)

CARD = "README.md"  # of a folder that comes from the Hub: it can say what subsets and splits there are


def files_in(folder: Path, format: str, subset: str | None, split: str | None) -> list[Path]:
    """The data files of a folder's split, sorted; all of them where it is not divided.

    Raises:
        ConfigError: there is no such subset or split, or no data file.
    """
    from datasets.data_files import FILES_TO_IGNORE

    present = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and file.name not in FILES_TO_IGNORE
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    files = [file for file in present if format != "auto" or format_of(file.name)]
    files = files or [file for file in present if not file.suffix and format_inside(file)]
    divided = _divided(folder, subset)
    if divided is None:
        if split not in (None, "train"):
            raise ConfigError(
                f"source folder {folder} has no split {split!r}: neither a dataset card nor the names of its "
                "files divide it; leave split out"
            )
        chosen, where = files, f"source folder {folder}"
    else:
        asked, split = split, choose_split(list(divided), split, f"source folder {folder}")
        where = f"split {split} of source folder {folder}"
        wanted, known = set(divided[split]), {file for one in divided.values() for file in one}
        chosen = [file for file in files if os.path.abspath(file) in wanted]
        left = [printable(file.relative_to(folder)) for file in files if os.path.abspath(file) not in known]
        if asked is None and len(divided) > 1:
            logger.warning("%s is read, of %s; split chooses another", where, ", ".join(divided))
        if left and subset is None:
            some = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if left[3:] else "")
            logger.warning("source folder %s: %s belong to no split, and are not read", folder, some)
    if not chosen:
        raise ConfigError(
            f"{where} holds no data file ({', '.join(FORMATS)}, also with .gz) and is no saved dataset"
        )
    return chosen


def _divided(folder: Path, subset: str | None) -> dict[str, list[str]] | None:
    """The files of each split, as `datasets` divides a folder: by its dataset card, or by names.

    None where nothing divides it. (`datasets` itself would leave out files of all but the most frequent
    format, and stop at the first bad row.)
    """
    from datasets import data_files

    card = folder / CARD
    subsets, default = _subsets(card)
    chosen = subset or default
    if chosen not in (subsets or ["default"]):
        raise ConfigError(
            f"source folder {folder} has {f'no subset {subset!r}' if subset else 'several subsets'}; "
            + (f"set subset to one of {', '.join(subsets)}" if subsets else "its dataset card names none")
        )
    options = subsets.get(chosen or "", {})
    base = glob.escape(os.path.abspath(folder / str(options.get("data_dir", ""))))
    divided: dict[str, list[str]] = {}
    try:
        patterns = data_files.sanitize_patterns(
            options.get("data_files") or data_files.get_data_patterns(base)
        )
        if patterns == data_files.DEFAULT_PATTERNS_ALL and not options:
            return None
        for split, places in patterns.items():
            divided[str(split)] = []
            for place in places:
                if "://" in place:
                    raise ValueError(f"{place} lies elsewhere, download it")
                with suppress(FileNotFoundError):  # said where the split is asked for: others may be here
                    divided[str(split)] += data_files.resolve_pattern(place, base)
    except FileNotFoundError:  # no data
        return {"train": []} if options else None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the dataset card {card} cannot be followed: {error}") from error
    return divided


def _subsets(card: Path) -> tuple[dict[str, dict[str, Any]], str | None]:
    """What a dataset card says of each subset, and which is the default; empty and "default" without one.

    Raises:
        ConfigError: the card cannot be read.
    """
    import yaml
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    try:
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        if not text.lstrip().startswith("---"):
            return {}, "default"
        subsets = MetadataConfigs.from_dataset_card_data(DatasetCard(text).data)
        default = subsets.get_default_config_name() if subsets else "default"
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(
            f"the dataset card {card}, which says what splits there are, cannot be read: {error}; correct or "
            "remove it"
        ) from error
    return {str(name): options for name, options in subsets.items()}, default and str(default)


def choose_split(present: list[str], split: str | None, where: str) -> str:
    wanted = split or (present[0] if len(present) == 1 else "train")
    if wanted not in present:
        raise ConfigError(f"{where} has no split {wanted!r}; it has {', '.join(present)}: set split")
    return wanted
