"""What can be said of the images without building one: names, versions, and what a build is told of pip."""

import importlib.metadata
import importlib.util
import re
import subprocess
import tomllib
import urllib.request

import pytest
from packaging.requirements import Requirement
from softpref import __version__, images

from tests.containers.conftest import REPOSITORY

pytestmark = pytest.mark.fast

REQUIREMENTS = sorted((REPOSITORY / "images/requirements").glob("*.txt"))
LOCKS = sorted((REPOSITORY / "images/locks").glob("*.txt"))
LOCKED = {  # of each lock, the requirements
    "data": ["data"],
    "kfp": ["kfp"],
    "torch-cpu": ["torch"],
    "torch-cuda": ["torch"],
    "cuda": ["torch", "cuda"],
    "train": ["data", "train"],
    "evaluate": ["data", "train", "evaluate"],
    "tracking": ["tracking"],
    "build": ["build"],
    "sbom": ["sbom"],
}


@pytest.fixture(scope="module")
def build():
    specification = importlib.util.spec_from_file_location("images_build", REPOSITORY / "images/build.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def names_in(requirements):
    lines = [line for line in requirements.read_text().splitlines() if line and not line.startswith("#")]
    return {re.split(r"[\[<>=]", line)[0].lower() for line in lines}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints():
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return {normal(name): version for name, version in (line.split("==") for line in lines)}


def locked(stem):
    """Versions of the packages of a lock, by name."""
    text = (REPOSITORY / f"images/locks/{stem}.txt").read_text()
    return {normal(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)}


def test_every_stage_has_a_target_of_the_recipe_and_an_image_with_the_packages_version():
    recipe = (REPOSITORY / "images/Dockerfile").read_text()
    for stage in images.STAGES:
        assert re.search(rf"^FROM \S+ AS {stage}$", recipe, re.MULTILINE)
        assert images.image_name(stage) == f"localhost/softpref-{stage}:{__version__}"
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "softpref.__version__"}


@pytest.mark.parametrize(
    "requirements", [*REQUIREMENTS, REPOSITORY / "tests/requirements.txt"], ids=lambda path: path.stem
)
def test_images_and_the_core_set_up_get_only_packages_whose_version_the_constraints_say(requirements):
    for name in names_in(requirements) - {"cyclonedx-bom"}:  # of no image, see below
        assert normal(name) in constraints()


def test_every_locked_package_has_its_hashes_and_the_version_of_the_constraints_and_no_host_is_named():
    assert {path.stem for path in LOCKS} > {"data", "kfp", "train", "evaluate", "tracking"}
    for lock in LOCKS:
        text = lock.read_text()
        assert "://" not in text
        entries = [line for line in text.replace("\\\n", "").splitlines() if not line.startswith("#")]
        for entry in entries:
            assert re.fullmatch(r"[\w.-]+==\S+( +--hash=sha256:[0-9a-f]{64})+", entry), (
                f"{lock.name}: {entry}"
            )
    for stem in LOCKED.keys() - {"sbom"}:  # what writes the bill contradicts others' ranges, and is alone
        for name, version in locked(stem).items():
            assert version.removesuffix("+cpu") == constraints()[name], f"{stem}: {name}: make lock"


@pytest.mark.parametrize(("lock", "requirements"), LOCKED.items(), ids=LOCKED)
def test_every_package_that_an_image_is_asked_to_have_is_locked(lock, requirements):
    asked = set().union(*(names_in(REPOSITORY / f"images/requirements/{one}.txt") for one in requirements))
    assert set(map(normal, asked)) <= locked(lock).keys(), "make lock"


@pytest.mark.parametrize("lock", ["data", "train", "evaluate", "tracking", "cuda"])
def test_what_a_locked_package_needs_is_locked_too(lock):
    """As the packages that are installed here say of themselves."""
    if lock == "cuda" and "triton" not in {normal(one.name) for one in importlib.metadata.distributions()}:
        pytest.skip("the torch that is installed here is not for CUDA")
    here = {"extra": "", "sys_platform": "linux", "platform_system": "Linux", "python_version": "3.11"}
    found, without = locked(lock), names_in(REPOSITORY / "images/requirements/cuda.txt")
    for name in found:
        try:
            needed = map(Requirement, importlib.metadata.requires(name) or [])
        except importlib.metadata.PackageNotFoundError:
            continue
        for one in needed:
            if one.marker is None or one.marker.evaluate(here):
                assert normal(one.name) in found.keys() | (without if lock != "cuda" else set()), name


def test_the_image_for_the_cpu_has_nothing_of_cuda():
    for_cuda = locked("cuda").keys() - locked("evaluate").keys()
    assert names_in(REPOSITORY / "images/requirements/cuda.txt") <= for_cuda
    assert all(re.match("nvidia-|cuda-|triton", name) for name in for_cuda)


def test_the_recipe_installs_nothing_without_a_hash():
    recipe = (REPOSITORY / "images/Dockerfile").read_text().replace("\\\n", "")
    installs = re.findall(r"pip install [^;&|\n]*", recipe)
    assert len(installs) == 10
    for install in installs:
        if "--no-index" in install:  # the package itself
            assert "--no-build-isolation --root /installed ." in install
        else:
            assert "--only-binary :all: --require-hashes" in install
            assert "--requirement" in install
    assert "apt" not in re.sub("#.*", "", recipe)


def test_the_recipe_and_what_builds_it_give_layers_the_same_date(build):
    recipe = (REPOSITORY / "images/Dockerfile").read_text()
    assert re.findall(r"^ARG SOURCE_DATE_EPOCH=(.*)$", recipe, re.MULTILINE) == [str(build.EPOCH)]
    # a stage that runs pip or makes files says that it takes the date
    for stage in re.split(r"^FROM ", recipe, flags=re.MULTILINE)[1:]:
        if "pip install" in stage or "venv" in stage.partition("\n")[2]:
            assert "\nARG SOURCE_DATE_EPOCH\n" in stage, stage.partition("\n")[0]
    command = build._command("podman", "data", [], {"SOURCE_DATE_EPOCH": str(build.EPOCH)})
    assert f"--timestamp={build.EPOCH}" in command


def test_together_the_images_have_every_package_that_the_project_depends_on():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["tracking"]]
    extras = ("peft", "gguf", "cluster", "s3", "gcs", "azure")
    asked += [line for extra in extras for line in project["optional-dependencies"][extra]]
    wanted = {re.split(r"[\[<>=]", line)[0].lower() for line in asked}
    given = set().union(*map(names_in, REQUIREMENTS))
    assert wanted <= given


@pytest.mark.parametrize("prefix", ["", "#12 34.5 "], ids=["podman", "docker"])
def test_the_recipes_own_error_is_the_last_word_of_a_build(build, tmp_path, monkeypatch, capfd, prefix):
    """An engine that prints a lot, the recipe's error in the middle of it, and fails."""
    engine = tmp_path / "podman"
    recipe = 'STEP 9/9: RUN case $built_for in cpu/*) echo "error: not this one"'
    engine.write_text(
        f"#!/bin/sh\necho '{recipe}'\necho '{prefix}error: only CUDA' >&2\necho tail\nexit 125\n"
    )
    engine.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert build.main(["--only", "train"]) == 1
    printed = capfd.readouterr()
    assert printed.out.splitlines() == [recipe, f"{prefix}error: only CUDA", "tail"]
    assert printed.err.splitlines()[-1] == "error: only CUDA"
    assert "softpref-train" in printed.err.splitlines()[-2]


def test_an_image_without_its_bill_of_materials_is_an_error(build, tmp_path, monkeypatch, capfd):
    """An engine that builds every target but the bill's."""
    engine = tmp_path / "podman"
    engine.write_text("#!/bin/sh\ncase \"$*\" in *'--target sbom'*) exit 125 ;; esac\n")
    engine.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert build.main(["--only", "data", "--sbom", str(tmp_path / "bills")]) == 1
    (said,) = capfd.readouterr().err.splitlines()
    assert "softpref-data" in said
    assert "is built, its bill of materials is not (exit status 125)" in said
    assert not (tmp_path / "bills").exists()


@pytest.mark.parametrize(
    ("accelerator", "built_for", "words"),
    [
        ("cpu", "'13.0'", ("--torch-index URL", "--torch-hash", "is built for CUDA '13.0'")),
        ("cuda", "None", ("--torch-index URL", "--torch-hash", "is built for the CPU")),
        ("cpu", "None", ()),
        ("cuda", "'13.0'", ()),
    ],
)
def test_a_wrong_build_of_torch_is_refused_in_one_sentence_with_the_ways_out(accelerator, built_for, words):
    recipe = (REPOSITORY / "images/Dockerfile").read_text()
    case = re.search(r'case "\$ACCELERATOR/\$built_for" in .*?\besac', recipe, re.DOTALL)[0]
    result = subprocess.run(
        ["sh", "-c", case],
        env={"ACCELERATOR": accelerator, "built_for": built_for},
        capture_output=True,
        text=True,
    )
    assert result.returncode == (1 if words else 0)
    assert len(result.stderr.splitlines()) == (1 if words else 0)
    for word in words:
        assert word in result.stderr


def test_options_of_the_build_reach_it_from_every_target_of_make():
    for target in ("images", "test-containers"):
        planned = subprocess.run(
            ["make", "--dry-run", target, "BUILD=--torch-index URL"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert re.search(r"images/build\.py .*--torch-index URL$", planned, re.MULTILINE)


def test_pips_configuration_is_read_as_pip_reads_it(build, tmp_path):
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip/pip.conf").write_text(
        "[global]\nindex-url = https://mirror.example/simple\ntimeout = 5\nrequire-virtualenv = true\n"
        "[install]\nfind-links =\n    /a\n    /b\n"
    )
    bundle = tmp_path / "bundle.pem"
    bundle.touch()
    environment = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    environment |= {"PIP_TIMEOUT": "60", "PIP_CERT": str(bundle)}
    found = build.pip_configuration(environment)
    assert found["index-url"] == ["https://mirror.example/simple"]
    assert found["timeout"] == ["60"]
    assert found["find-links"] == ["/a", "/b"]
    assert found["cert"] == [str(bundle)]
    assert "require-virtualenv" not in found


def test_folders_of_packages_are_served_while_a_build_runs(build, tmp_path):
    index, wheels = tmp_path / "index/simple", tmp_path / "wheels"
    for folder in (index / "kfp", tmp_path / "index/files", wheels):
        folder.mkdir(parents=True)
    (index / "kfp/index.html").write_text('<a href="../../files/kfp-1.whl">kfp-1.whl</a>')
    (tmp_path / "index/files/kfp-1.whl").write_bytes(b"one")
    (wheels / "torch+cpu.whl").write_bytes(b"two")
    remote = "https://name:password@mirror.example/simple"
    given = {"extra-index-url": [index.as_uri()], "find-links": [str(wheels)], "index-url": [remote]}

    def get(address):
        with urllib.request.urlopen(address) as answer:
            return answer.read()

    with build._reachable(given) as reached:
        assert reached["index-url"] == [remote]
        (address,) = reached["extra-index-url"]
        assert b"kfp-1.whl" in get(f"{address}/kfp/")
        assert get(address.replace("simple", "files/kfp-1.whl")) == b"one"
        (address,) = reached["find-links"]
        assert b'href="torch%2Bcpu.whl"' in get(address)
        assert get(f"{address}torch%2Bcpu.whl") == b"two"
    with pytest.raises(OSError, match="refused"):
        get(address)
