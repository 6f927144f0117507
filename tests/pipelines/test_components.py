"""The stages as component files: up to date, described, and of use in a pipeline of somebody else's."""

import pytest
import yaml
from softpref.images import DATA_IMAGE, EVALUATE_IMAGE, TRAIN_IMAGE
from softpref.pipelines import command
from softpref.pipelines.profiles import CLUSTERS

from tests.pipelines.conftest import PACKAGES

MEMBER = '{"name": "mine", "method": "spo", "alpha": 0.5, "beta": 0.1, "options": {}}'


def test_checked_in_components_are_what_the_stages_compile_to(sweep, tmp_path):
    assert command.main(sweep, ["components", "--output", str(tmp_path)]) == 0
    fresh = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text() for path in (PACKAGES / "components").iterdir()}
    assert fresh == kept, "the components are out of date: run make packages"


def test_components_are_loaded_into_a_pipeline_of_somebody_elses(tmp_path):
    from kfp import compiler, components, dsl

    stage = {
        path.stem: components.load_component_from_file(str(path))
        for path in (PACKAGES / "components").iterdir()
    }

    @dsl.component
    def choose_source() -> str:
        return "owner/pairs"

    @dsl.pipeline
    def theirs():
        data = stage["prepare_data"](source=choose_source().output)
        reference = stage["train_reference"](dataset=data.outputs["dataset"], base_model="owner/name")
        models = {"dataset": data.outputs["dataset"], "reference": reference.outputs["reference"]}
        policy = stage["train_policy"](**models, member=MEMBER)
        evaluation = stage["evaluate_model"](**models, policy=policy.outputs["policy"])
        stage["register_model"](
            model=policy.outputs["policy"],
            evaluation=evaluation.outputs["evaluation"],
            registered_model_name="mine",
        )

    compiler.Compiler().compile(theirs, str(tmp_path / "theirs.yaml"))
    spec = yaml.safe_load((tmp_path / "theirs.yaml").read_text())
    images = [one["container"]["image"] for one in spec["deploymentSpec"]["executors"].values()]
    assert sorted(image for image in images if "softpref" in image) == sorted(
        [DATA_IMAGE, TRAIN_IMAGE, TRAIN_IMAGE, EVALUATE_IMAGE, EVALUATE_IMAGE]
    )


def test_components_say_what_goes_in_and_comes_out_and_take_a_clusters_images(sweep, tmp_path):

    profile = tmp_path / "lab.yaml"
    text = (CLUSTERS / "default.yaml").read_text()
    profile.write_text(text.replace("localhost/softpref-", "registry.example/softpref-"))
    assert (
        command.main(sweep, ["components", "--cluster", str(profile), "--output", str(tmp_path / "lab")]) == 0
    )
    files = list((tmp_path / "lab").iterdir())
    assert len(files) == 7
    for file in files:
        spec = yaml.safe_load(file.read_text())
        assert "registry.example/softpref-" in str(spec["deploymentSpec"])
        for kind in ("artifacts", "parameters"):
            for name, given in spec["root"]["inputDefinitions"].get(kind, {}).items():
                assert given.get("description"), f"{file.stem} says nothing of {name}"
        for name, given in spec["root"]["outputDefinitions"]["artifacts"].items():
            assert given.get("description"), f"{file.stem} says nothing of {name}"


def test_components_refuse_a_pipelines_parameters(sweep, capsys):
    for option in (["--beta", "0.5"], ["--recipe", "own"]):
        with pytest.raises(SystemExit):
            command.main(sweep, ["components", *option])
    assert "--recipe is for pipelines" in capsys.readouterr().err
