"""Writes an image's bill of materials, as CycloneDX's JSON: its Python, and its Python and Debian packages.

    python3 sbom.py ROOT NAME VERSION FILE

ROOT is where the image's root file system is mounted; the target `sbom` of the recipe runs this. The same
image gives the same file. What CycloneDX's schema does not allow is an error.
"""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL


def main(root: str, name: str, version: str, file: str) -> None:
    """Describe the image at `root`."""
    environment = f"{root}/opt/softpref"
    python = json.loads(
        _output("cyclonedx-py", "environment", "--output-reproducible", "--spec-version", "1.6", environment)
    )
    form = "${Package}\t${Version}\t${Architecture}\n"
    debian = _output("dpkg-query", f"--admindir={root}/var/lib/dpkg", "--show", f"--showformat={form}")
    interpreter = _output(
        f"{environment}/bin/python", "-c", "import platform; print(platform.python_version())"
    )
    packages = [tuple(line.split("\t")) for line in debian.splitlines()]
    Path(file).write_text(bill(python, packages, interpreter.strip(), name, version), encoding="utf-8")


def bill(
    python: dict[str, object], debian: Iterable[tuple[str, ...]], interpreter: str, name: str, version: str
) -> str:
    """The text of the bill of materials of an image.

    Args:
        python: the bill of its environment's packages, from `cyclonedx-py environment`.
        debian: name, version and architecture of each Debian package.
        interpreter: version of Python.
        name, version: of the image.

    Raises:
        ValueError: it is not what CycloneDX's schema allows.
    """
    bom = Bom.from_json(python)
    bom.metadata.component = Component(
        name=name, version=version, type=ComponentType.CONTAINER, bom_ref="image"
    )
    found = {PackageURL("generic", None, "python", interpreter): ComponentType.PLATFORM}
    for package, at, architecture in debian:
        found[PackageURL("deb", "debian", package, at, {"arch": architecture})] = ComponentType.LIBRARY
    for purl, kind in found.items():
        text = purl.to_string()
        bom.components.add(
            Component(name=purl.name, version=purl.version, type=kind, purl=purl, bom_ref=text)
        )
    bom.register_dependency(bom.metadata.component, bom.components)
    document = json.loads(JsonV1Dot6(bom).output_as_string())
    # the same each time: no date, and a number that follows from the rest
    del document["metadata"]["timestamp"], document["serialNumber"]
    document["serialNumber"] = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(document, sort_keys=True)).urn
    text = json.dumps(document, indent=2) + "\n"
    if error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        raise ValueError(f"the bill of materials of {name} is no CycloneDX: {error}")
    return text


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main(*sys.argv[1:])
