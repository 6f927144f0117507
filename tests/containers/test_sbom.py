"""Bills of materials: what they name, that CycloneDX's schema allows it, that they are the same each time."""

import importlib.util
import json

import pytest

from tests.containers.conftest import REPOSITORY

pytest.importorskip("cyclonedx", reason="cyclonedx-python-lib is not installed: make setup")
pytestmark = pytest.mark.fast

PYTHON = {  # as `cyclonedx-py environment` writes it
    "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
    "bomFormat": "CycloneDX",
    "specVersion": "1.6",
    "version": 1,
    "metadata": {"properties": [{"name": "cdx:reproducible", "value": "true"}]},
    "components": [
        {"bom-ref": f"{name}==1.0", "name": name, "version": "1.0", "type": "library", "purl": purl}
        for name, purl in (("six", "pkg:pypi/six@1.0"), ("idna", "pkg:pypi/idna@1.0"))
    ],
    "dependencies": [{"ref": "six==1.0", "dependsOn": ["idna==1.0"]}, {"ref": "idna==1.0"}],
}
DEBIAN = [("libc6", "2.36-9+deb12u14", "amd64"), ("base-files", "12.4", "all")]


@pytest.fixture(scope="module")
def bill():
    specification = importlib.util.spec_from_file_location("images_sbom", REPOSITORY / "images/sbom.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.bill


def test_a_bill_names_the_image_and_each_package_and_is_valid(bill):
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = bill(PYTHON, DEBIAN, "3.11.2", "softpref-data:1", "1")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    found = json.loads(text)
    assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.6")
    assert found["metadata"]["component"]["name"] == "softpref-data:1"
    assert found["metadata"]["component"]["type"] == "container"
    assert sorted(one["purl"] for one in found["components"]) == [
        "pkg:deb/debian/base-files@12.4?arch=all",
        "pkg:deb/debian/libc6@2.36-9%2Bdeb12u14?arch=amd64",
        "pkg:generic/python@3.11.2",
        "pkg:pypi/idna@1.0",
        "pkg:pypi/six@1.0",
    ]
    depends = {one["ref"]: one.get("dependsOn") for one in found["dependencies"]}
    assert depends["six==1.0"] == ["idna==1.0"]


def test_the_same_image_has_the_same_bill_and_another_one_another_number(bill):
    first = bill(PYTHON, DEBIAN, "3.11.2", "softpref-data:1", "1")
    assert bill(PYTHON, DEBIAN, "3.11.2", "softpref-data:1", "1") == first
    other = bill(PYTHON, DEBIAN[:1], "3.11.2", "softpref-data:1", "1")
    assert json.loads(other)["serialNumber"] != json.loads(first)["serialNumber"]
    assert "timestamp" not in first


def test_what_the_schema_does_not_allow_is_an_error(bill):
    broken = json.loads(json.dumps(PYTHON))
    broken["components"][0]["externalReferences"] = [{"type": "website", "url": "not a URI: \\"}]
    with pytest.raises(ValueError, match="the bill of materials of softpref-data:1 is no CycloneDX"):
        bill(broken, DEBIAN, "3.11.2", "softpref-data:1", "1")
