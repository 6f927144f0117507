"""What registration leaves: its decision."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from softpref.records.files import read_object, typed, write_object

REGISTRATION_FILE = "registration.json"


@dataclass(kw_only=True)
class Registration:
    """What was decided about a model: `registration.json`.

    Attributes:
        reason: in words.
        champion: whether this version is the champion now.
        reused: whether an earlier attempt had registered it.
    """

    registered: bool = False
    reason: str = ""
    model_name: str
    version: str | None = None
    aliases: list[str] = field(default_factory=list)
    champion: bool = False
    reused: bool = False
    model_uri: str | None = None
    run_id: str | None = None
    tracking_uri: str
    model_hash: str | None = None
    gate_failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: str | Path) -> Registration:
        path = Path(folder) / REGISTRATION_FILE
        return typed(path, read_object(path, "a registration folder"), lambda values: cls(**values))

    def write(self, folder: Path) -> None:
        write_object(folder / REGISTRATION_FILE, asdict(self))
