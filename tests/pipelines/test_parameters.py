"""Recipes, the command line and the planning task: what is wrong is refused before anything runs."""

import re
import resource
import subprocess
import sys

import pytest
import softpref
import yaml
from softpref.config import build_config, parse_overrides
from softpref.errors import ConfigError
from softpref.pipelines import command
from softpref.pipelines.recipes import RECIPES, pipeline_parameters
from softpref.preflight.parameters import SWEEP
from softpref.preflight.stage import plan, training_layers
from softpref.registry.config import RegistryConfig
from softpref.spo.config import SPOConfig

from tests.pipelines.conftest import PACKAGES, REPOSITORY


def test_command_line_wins_over_recipe_and_recipe_over_default(sweep):
    parameters = pipeline_parameters(sweep, "embedded", {"beta": 0.3, "alphas": None})
    assert parameters["beta"] == 0.3
    assert parameters["alphas"] == [0.5, 1.0, 2.0]
    assert parameters["learning_rate"] == 0.0005
    assert parameters["prompt_template"] == ""
    assert parameters["data_overrides"]["votes"] == 20


def test_every_recipe_serves_both_pipelines(sweep, single):
    recipes = [path.stem for path in RECIPES.glob("*.yaml")]
    assert {"embedded", "own", "convarg", "smollm2"} <= set(recipes)
    for recipe in recipes:
        for pipeline in (sweep, single):
            pipeline_parameters(pipeline, recipe, {})


@pytest.mark.parametrize("recipe", ["embedded", "storyteller", "own"])
def test_no_recipe_sets_what_has_no_effect(sweep, recipe, caplog):
    source = {"source": "owner/name", "base_model": "owner/name"} if recipe == "own" else {}
    assert plan(pipeline_parameters(sweep, recipe, source))
    assert "no effect" not in caplog.text.replace("softness has no effect", "")


def test_embedded_recipe_plans_one_model_per_alpha_and_baseline(sweep):
    members = plan(pipeline_parameters(sweep, "embedded", {}))
    assert [member.name for member in members] == [
        "spo-alpha-0.5",
        "spo-alpha-1",
        "spo-alpha-2",
        "dpo-beta-1",
    ]
    assert members[0].beta == 0.1
    assert members[3].beta == 1.0


def test_what_is_given_is_laid_over_a_recipes_mapping_key_by_key(sweep):
    def overrides(given):
        return pipeline_parameters(sweep, "embedded", {"data_overrides": given})["data_overrides"]

    recipe = overrides(None)
    given = {"votes": 1, "story_kind": "ranking", "max_characters": None}
    assert overrides(given) == {
        **recipe,
        **given,
        "max_characters": "$null",
    }  # KFP's structs bear no null here
    assert overrides({}) == {}


def test_numbers_of_a_form_are_whole_again_where_they_were_written_so():
    form = {"model_config": {"hidden_size": 96.0, "initializer_range": 0.04}, "save_steps": 200.0}
    assert parse_overrides(form) == {
        "model_config": {"hidden_size": 96, "initializer_range": 0.04},
        "save_steps": 200,
    }
    assert isinstance(parse_overrides(form)["model_config"]["hidden_size"], int)
    assert parse_overrides({"model_config": {"pad_token_id": "$null"}}) == {
        "model_config": {"pad_token_id": None}
    }


def test_a_baseline_has_options_of_its_own_that_win_over_the_shared_ones(sweep):
    changes = {
        "alphas": [],
        "baselines": [
            "dpo:0.5, learning_rate=1e-4",
            "spo:0.1,alpha=2,rounds=2,num_train_epochs=1,name=online",
            "ipo",
        ],
        "train_overrides": {"learning_rate": 0.3, "seed": 5},
    }
    members = plan(pipeline_parameters(sweep, "embedded", changes))
    assert members == [
        ("dpo-beta-0.5", "dpo", 1.0, 0.5, {"learning_rate": "1e-4"}),
        ("online", "spo", 2.0, 0.1, {"rounds": "2", "num_train_epochs": "1"}),
        ("ipo-beta-0.1", "ipo", 1.0, 0.1, {}),
    ]
    shared = {"learning_rate": 0.2, "overrides": changes["train_overrides"]}
    configs = [build_config(SPOConfig, *training_layers(shared, member)) for member in members]
    assert [config.learning_rate for config in configs] == [1e-4, 0.3, 0.3]
    assert [config.rounds for config in configs] == [1, 2, 1]
    assert {config.seed for config in configs} == {5}


def test_a_sweep_trains_dimensions_in_orders_and_with_weights_of_their_own(sweep):
    members = plan(
        pipeline_parameters(sweep, "embedded", {})
        | {
            "alphas": [1.0],
            "data_overrides": {"dimensions": {"trait": {}, "brevity": {}}},
            "train_overrides": {"dimensions": ["trait", "brevity"]},
            "baselines": ["spo:0.1,dimension_weights=0.5,name=half", "dpo:1,dimensions=brevity>trait"],
        }
    )
    assert [member.options for member in members] == [
        {},
        {"dimension_weights": "0.5"},
        {"dimensions": "brevity>trait"},
    ]
    assert SPOConfig(dimensions="brevity>trait").dimension_order == ["brevity", "trait"]


def test_the_anchor_is_of_the_softness_values_alone(sweep, caplog):
    baselines = ["dpo:0.1", "spo:0.3,alpha=4", "spo:0.1,anchor=0,name=published"]
    members = plan(pipeline_parameters(sweep, "embedded", {"anchor": 0.5, "baselines": baselines}))
    configs = [build_config(SPOConfig, *training_layers({}, member)) for member in members]
    assert [config.anchor for config in configs] == [0.5, 0.5, 0.5, 0.0, 0.5, 0.0]
    assert "no effect" not in caplog.text


def test_recipes_for_natural_text_are_anchored_and_others_are_warned(sweep, caplog):
    known = {name: pipeline_parameters(sweep, name, {})["anchor"] for name in ("own", "convarg", "smollm2")}
    assert set(known.values()) == {1.0}
    assert pipeline_parameters(sweep, "embedded", {})["anchor"] == 0
    plan(pipeline_parameters(sweep, "embedded", {}))
    assert "anchor" not in caplog.text
    given = {"source": "owner/name", "judge": "bradley-terry", "data_overrides": {}}
    plan(pipeline_parameters(sweep, "embedded", given))
    assert "softness has no effect then; set anchor to 1" in caplog.text


_LLM = {"judge": "llm", "judge_model": "m", "evaluation_overrides": {"judge_options": {"url": "http://h/v1"}}}


def test_a_sweep_may_be_judged_by_a_language_model_and_ranked_by_win_rate(sweep):
    pytest.importorskip("openai")
    plan(pipeline_parameters(sweep, "embedded", {}) | _LLM | {"selection_rule": "win_rate"})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"anchor": -1.0}, "anchor must be at least 0"),
        ({"train_overrides": {"anchor": 1}}, "use the parameter anchor"),
        ({"alphas": [1.0, -1.0]}, "alpha must be at least 0"),
        ({"alphas": [1.0, 1.0]}, "names that differ"),
        ({"alphas": [], "baselines": []}, "nothing to train"),
        ({"baselines": ["dpp"]}, "did you mean 'dpo'"),
        ({"baselines": ["ppo:0.1"]}, r"write METHOD:BETA, such as dpo:0.1; did you mean '\w+'\?$"),
        ({"baselines": ["dpo=0.1"]}, r"write METHOD:BETA, such as dpo:0.1; did you mean 'dpo'\?$"),
        ({"baselines": ["apo-zero:0.1"]}, r"did you mean 'apo_zero'\?$"),
        ({"baselines": ["simpo:0"]}, "beta must be at least 0 for spo, above 0 for every other method"),
        ({"baselines": ["ropo:0.1,ropo_alpha=0"]}, "ropo_alpha must be above 0"),
        ({"baselines": ["dpo:0.1,learning_rat=1e-6"]}, "did you mean 'learning_rate'"),
        ({"baselines": ["dpo:0.1,1e-6"]}, "must be OPTION=VALUE"),
        ({"baselines": ["dpo:0.1,beta=2"]}, "beta comes first"),
        ({"baselines": ["dpo:0.1", "dpo:0.1,learning_rate=1e-6"]}, "name=slow-dpo"),
        ({"baselines": ["sppo:1,rounds=0"]}, "rounds must be at least 1"),
        ({"train_overrides": {"alpha": 2}}, "use the parameter alpha"),
        (
            {
                "source": "owner/name",
                "data_overrides": {},
                "baselines": ["sppo:1,rounds=2,num_train_epochs=1,judge=expert"],
            },
            "sppo-beta-1: judge expert knows only embedded sources",
        ),
        (
            {"data_overrides": {"story_kind": "best_of_n"}, "baselines": ["sppo"]},
            "sppo needs to know how often each completion wins",
        ),
        ({"baselines": ["dpo:strong"]}, "dpo:0.1"),
        (
            {"train_overrides": {"dimensions": ["trait", "brevity"]}},
            "spo-alpha-0.5: dimensions has brevity, trait, and the data will have none",
        ),
        ({"baselines": ["dpo:0.1,dimensions=trait>trait"]}, "names of dimensions, each once"),
        ({"baselines": ["ipo:0.1,dimensions=trait"]}, "one of spo, dpo, rdpo with dimensions"),
        ({"train_overrides": {"loging_steps": 5}}, "did you mean 'logging_steps'"),
        ({"train_overrides": {"top_p": 0.9}}, "policy's own distribution"),
        ({"train_overrides": {"temperature": 0.7}}, "policy's own distribution"),
        ({"train_overrides": "{logging_steps: 5}"}, "not JSON"),
        ({"sft_overrides": {"model_cofig": {}}}, "did you mean 'model_config'"),
        ({"base_model": "/no/such/model"}, "does not exist"),
        ({"source": "missing.jsonl"}, "does not exist"),
        ({"source": "missing.csv.gz"}, "does not exist"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"gpus": -1}, "gpus must be a whole number of at least 0"),
        ({"data_overrides": {"votse": 1}}, "did you mean 'votes'"),
        ({"samples_per_refresh": 4}, "samples_per_refresh"),
        (
            {"judge": "oracle"},
            "bradley-terry, reward-model, llm, got 'oracle'",
        ),
        ({"judge": "llm"}, "the judge 'llm' needs judge_model"),
        ({"judge": "expert", "judge_model": "m"}, "the judge 'expert' takes no judge_model"),
        (_LLM, "gives no scores, so there is no expected reward .* set selection_rule to win_rate"),
        (_LLM | {"evaluation_overrides": {"judge_options": {"urll": "x"}}}, "did you mean 'url'"),
        (
            _LLM | {"evaluation_overrides": {"judge_options": {"url": "http://h/v1", "rubric": "no.yaml"}}},
            "rubric no.yaml does not exist",
        ),
        (
            {"baselines": ["sppo:1,rounds=2,num_train_epochs=1,judge=llm"]},
            "the judge 'llm' needs judge_model",
        ),
        ({"source": "owner/name", "data_overrides": {}, "judge": "expert"}, "bradley-terry"),
        ({"source": "owner/name"}, "data_overrides has votes and story_kind.*--recipe own"),
        ({"train_overrides": {"lora_r": 0}}, "SPOConfig.lora_r must be at least 1, got 0"),
        ({"sft_overrides": {"vocab_size": 7}}, "SFTConfig.vocab_size must be at least 258, got 7"),
        ({"learning_rate": -1.0}, "SPOConfig.learning_rate must be at least 0, got -1.0"),
        ({"source": ""}, "source is empty"),
        ({"selection_rule": "best"}, "win_rate"),
        ({"registered_model_name": "a/b"}, "model_name"),
    ],
)
def test_wrong_parameter_is_refused_with_what_would_be_right(sweep, changes, says):
    parameters = pipeline_parameters(sweep, "embedded", {}) | changes
    with pytest.raises(ConfigError, match=says):
        plan(parameters)


def test_refusal_reaches_the_user_as_one_line_and_leaves_nothing(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [
            sys.executable,
            REPOSITORY / "pipelines/spo_sweep.py",
            "--alphas",
            "-1",
            "--output",
            tmp_path / "out",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 2
    assert result.stderr.strip().startswith("error: SPOConfig.alpha must be at least 0")
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 60  # seconds of CPU, not the minutes of a run


def test_unknown_recipe_and_parameter_name_the_closest(sweep, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'embedded'"):
        pipeline_parameters(sweep, "embeded", {})
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("learning_rat: 1", encoding="utf-8")
    with pytest.raises(ConfigError, match="did you mean 'learning_rate'"):
        pipeline_parameters(sweep, str(recipe), {})
    recipe.write_text("learning_rate: fast", encoding="utf-8")
    with pytest.raises(ConfigError, match="learning_rate must be a float"):
        pipeline_parameters(sweep, str(recipe), {})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--learning_rte", "1e-4"], "did you mean --learning-rate?"),
        (["--epochs", "2"], "did you mean --num-train-epochs?"),
        (["--rule", "win_rate"], "did you mean --selection-rule?"),
        (["--model_name", "mine"], "did you mean --registered-model-name?"),
        (["--config", "mine.yaml"], "did you mean --recipe?"),
        (["--alpha", "0.5"], "write --alphas\n"),
        (["--lora-r", "8"], """--train-overrides '{"lora_r": 8}'"""),
        (
            ["--lora_rank", "8"],
            """did you mean --train-overrides '{"lora_r": 8}'?""",
        ),
        (["--train.lora_rank", "8"], """did you mean --train-overrides '{"lora_r": 8}'?"""),
        (["--exact_prompts", "16"], """write --evaluation-overrides '{"exact_prompts": 16}'\n"""),
        (["--votes", "5"], """write --data-overrides '{"votes": 5}'\n"""),
        (["--compare_metric", "x"], """write --registry-overrides '{"compare_metric": "x"}'\n"""),
        (["--warmup_steps", "5"], """write --sft-overrides '{"warmup_steps": 5}' or --train-overrides"""),
        (["--resume_from_checkpoint", "X"], "is unknown; a run that was cut off continues"),
        (["--train.output_dir", "X"], "--output names the folder to write"),
        (["--train.alpha", "0.5"], "write --alphas\n"),
        (["--train.method", "dpo"], "write --baselines\n"),
        (["--train.trust_remote_code"], "write --trust-remote-code\n"),
        (["--data.columns", "x"], "write --columns\n"),
        (["--sft.learning_rate", "1"], "write --sft-learning-rate\n"),
        (["--sft.learning_rte", "1"], "did you mean --sft-learning-rate?"),
        (["--foo.x", "1"], "there is no stage 'foo'; known: compare, data, evaluate"),
        (["--evaluation.x", "1"], "did you mean 'evaluate'?"),
        (["--strictness", "1"], "--strictness is unknown; --help lists all"),
        (["--evaluate.exact_prompts=8", "--seed", "1"], """--evaluation-overrides '{"exact_prompts": 8}'"""),
        (["--sft.bf16", "--seed", "1"], """--sft-overrides '{"bf16": true}'"""),
        (["--alphas", "0.5,1,2"], "numbers with spaces between them, as in --alphas 0.5 1.0 2.0"),
        (["--columns", "chosen=better"], """write it like {"chosen": "better"}"""),
        (["--train-overrides", "{lora_r: 8}"], "train_overrides is not JSON"),
        (["--train-overrides", "{lora_r: 8}"], """write it like {"lora_r": 8}"""),
        (["--train-overrides", "{lora_r:8}"], """write it like {"lora_r": 8}"""),
        (["--data-overrides", "{sft_source:s3://a/b}"], """write it like {"sft_source": "s3://a/b"}"""),
        (["--train-overrides", "lora_r=8"], """write it like {"lora_r": "8"}"""),
        (["compil"], "it is run, compile or components"),
    ],
)
def test_what_the_command_line_does_not_know_is_answered_with_what_to_write(sweep, capsys, arguments, says):
    with pytest.raises(SystemExit):
        command.main(sweep, arguments)
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith(
        "usage: spo_sweep.py [run|compile|components] [--recipe NAME] [--OPTION VALUE ...]\n"
    )
    assert error.count("\n") == 2


def test_what_is_advised_is_taken(sweep, capsys):
    for option in ("--votes", "--exact_prompts", "--lora_r", "--lora_rank"):
        with pytest.raises(SystemExit):
            command.main(sweep, [option, "3"])
        advised = re.findall(r"(--\S+) '(\{.*?\})'", capsys.readouterr().err)
        assert advised
        for name, value in advised:
            given = vars(command._parse(sweep, [name, value]))
            plan(pipeline_parameters(sweep, "embedded", {key: given[key] for key in SWEEP}))


def test_a_single_run_is_told_of_its_own_parameters_alone(single, capsys):
    for arguments, says in (
        (["--alphas", "0.5"], "did you mean --alpha?"),
        (["--train.alpha", "0.5"], "write --alpha\n"),
        (["--train.method", "dpo"], "--train.method is unknown; --help lists all"),
    ):
        with pytest.raises(SystemExit):
            command.main(single, arguments)
        assert says in capsys.readouterr().err


def test_version(sweep, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(sweep, ["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"softpref {softpref.__version__}\n"


def test_options_are_written_with_dashes_or_with_underscores(sweep):
    for option in ("--learning-rate", "--learning_rate"):
        assert command._parse(sweep, [option, "1e-4"]).learning_rate == 1e-4
    assert command._parse(sweep, ["--source=my_pairs.jsonl"]).source == "my_pairs.jsonl"


def test_a_parameter_under_an_old_name_is_refused_with_the_new_one(sweep, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("sft_epochs: 1", encoding="utf-8")
    with pytest.raises(ConfigError, match="'sft_epochs'; did you mean 'sft_num_train_epochs'"):
        pipeline_parameters(sweep, str(recipe), {})
    with pytest.raises(ConfigError, match="did you mean 'registered_model_name'"):
        build_config(RegistryConfig, {"model_name": "mine"})


def test_output_folder_with_content_is_not_touched(sweep, tmp_path, capsys):
    (tmp_path / "precious.txt").write_text("mine", encoding="utf-8")
    assert command.main(sweep, ["--output", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize(("option", "cached"), [([], True), (["--no-cache"], False)])
def test_a_package_takes_results_from_kfps_cache_unless_told_otherwise(sweep, tmp_path, option, cached):
    package = tmp_path / "package.yaml"
    assert command.main(sweep, ["compile", "--output", str(package), *option]) == 0
    spec = next(yaml.safe_load_all(package.read_text(encoding="utf-8")))
    dags = [spec["root"], *spec["components"].values()]
    tasks = {name: task for dag in dags if "dag" in dag for name, task in dag["dag"]["tasks"].items()}
    for name in ("prepare-data", "train-reference", "train-policy", "evaluate-model"):
        assert tasks[name]["cachingOptions"].get("enableCache", False) == cached, name
    assert not tasks["compare-models"]["cachingOptions"].get("enableCache", False)


def test_checked_in_packages_are_what_the_pipelines_compile_to(sweep, single, tmp_path):
    for pipeline, name, recipe in (
        (sweep, "spo_sweep", "embedded"),
        (single, "spo_pipeline", "embedded"),
        (sweep, "spo_own", "own"),
    ):
        fresh, kept = tmp_path / f"{name}.yaml", PACKAGES / f"{name}.yaml"
        assert command.main(pipeline, ["compile", "--recipe", recipe, "--output", str(fresh)]) == 0
        assert fresh.read_text() == kept.read_text(), f"{kept.name} is out of date: run make packages"


def test_the_package_for_data_of_ones_own_asks_for_them_and_has_no_setting_of_the_stories():
    spec = next(yaml.safe_load_all((PACKAGES / "spo_own.yaml").read_text(encoding="utf-8")))
    form = {
        name: one.get("defaultValue") for name, one in spec["root"]["inputDefinitions"]["parameters"].items()
    }
    set_apart = {"judge_fraction": 0.2}  # for the judge
    assert (form["source"], form["base_model"], form["data_overrides"]) == ("", "", set_apart)
    assert (form["anchor"], form["train_overrides"]["use_peft"]) == (1, True)
    assert "model_config" not in form["sft_overrides"]


def test_help_shows_the_defaults_of_the_chosen_recipe(sweep, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    for arguments, says in (
        ([], "(recipe embedded: 0.0005)"),
        (["--recipe", "own"], "(recipe own: 5e-05)"),
        (["--recipe=own"], '(default: "auto"'),  # of the judge, where the recipe has another
    ):
        with pytest.raises(SystemExit):
            command.main(sweep, [*arguments, "--help"])
        assert (says in capsys.readouterr().out) is ("auto" not in says)


@pytest.mark.parametrize("name", ["spo_sweep", "spo_pipeline"])
def test_every_task_that_loads_a_model_takes_the_parameter(name):
    package = REPOSITORY / "pipelines" / "packages" / f"{name}.yaml"
    spec = next(yaml.safe_load_all(package.read_text(encoding="utf-8")))
    graphs = [spec["root"], *spec["components"].values()]
    tasks = [task for graph in graphs for task in graph.get("dag", {}).get("tasks", {}).items()]
    given = {task: values["inputs"]["parameters"].get("trust_remote_code") for task, values in tasks}
    for task in ("train-reference", "train-policy", "evaluate-model", "register-model"):
        assert given[task]["componentInputParameter"].endswith("trust_remote_code")
    assert any(task.startswith("plan-") and value for task, value in given.items())


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False)])
def test_the_command_line_takes_true_and_false(single, text, value):
    given = {"trust_remote_code": command._argument_type("trust_remote_code", bool)(text)}
    assert pipeline_parameters(single, "embedded", given)["trust_remote_code"] is value
