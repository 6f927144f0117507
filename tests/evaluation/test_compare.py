"""The choice among members of a sweep, its table, its report."""

import copy
import html
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from softpref.cli import main
from softpref.errors import ConfigError, DataError
from softpref.evaluation import choice, compare, tables
from softpref.evaluation.addresses import evaluation_folders
from softpref.evaluation.compare import outcome_lines
from softpref.fitness import Limits
from softpref.records.comparison import Comparison
from softpref.records.evaluation import JudgedBy

from tests.evaluations import evaluations


def choose(members, *rule, **limits):
    return choice.choose(evaluations(members), *rule, **limits)


def run(folders, output, *rule, **options):
    """What comparison.json holds."""
    made = compare.run(folders, output, *rule, **options)
    written = json.loads(Path(output, "comparison.json").read_text())
    assert {**vars(Comparison.read(output)), "members": None} == {**vars(made), "members": None}
    return written


def format_table(members):
    return tables.format_table(evaluations(members))


def markdown_table(members, chosen):
    return tables.markdown_table(evaluations(members), chosen)


def figure(value, spread=0.1):
    return {
        "value": value,
        "low": value - spread,
        "high": value + spread,
        "n": 24,
        "prompts": 12,
        "unit": "nats",
    }


def member(name, alpha, rewards, kl, entropy, method="spo"):
    """`rewards` are of four prompts, each of which stands for three like it."""
    rewards = 3 * rewards
    mean = sum(rewards) / len(rewards)
    return {
        "name": name,
        "method": method,
        "alpha": alpha,
        "anchor": 0.0,
        "beta": 0.1,
        "rounds": 1,
        "train_on": "preferences",
        "extrapolation": 0.0,
        "model_uri": f"s3://{name}",
        "reference_uri": "",
        "run_id": None,
        "dataset_hash": "abc",
        "evaluation_id": "same",
        "judge": {
            name: part
            for name, part in JudgedBy("expert", "the experts' own rewards")._asdict().items()
            if name != "usage"
        },
        "metrics": {
            "expected_reward": figure(mean, 1.0),
            "win_rate": figure(0.5 + mean / 10, 0.05),
            "reference_expected_reward": figure(0.0),
            "kl_sequence": figure(kl),
            "entropy_sequence": figure(entropy),
            "preference_accuracy": figure(0.6),
            "self_bleu": figure(0.4),
        },
        "exact": None,
        "softmax_frontier": None,
        "by_prompt": {"expected_reward": rewards, "win_rate": [0.5 + r / 10 for r in rewards]},
        "settings": {"confidence": 0.95},
        "warnings": [],
    }


SHARP = member("sharp", 0.5, [1.5, 0.5, 2.5, 1.9], kl=3.0, entropy=3.0)
EVEN = member("even", 1.0, [1.49, 0.52, 2.48, 1.9], kl=2.0, entropy=5.0)
SOFT = member("soft", 2.0, [1.1, 0.1, 2.0, 1.5], kl=1.0, entropy=6.0)
EXPO = member("sharp-expo-0.5", 0.5, [2.5, 1.5, 3.5, 2.9], kl=4.0, entropy=2.5) | {
    "extrapolation": 0.5,
    "model_uri": "s3://sharp/extrapolated-0.5",
    "run_id": "run-of-sharp",
}
DPO = member("dpo", 1.0, [1.2, 0.3, 2.2, 1.6], kl=9.0, entropy=2.0, method="dpo")


def save(root, *members):
    folders = []
    for entry in members:
        folder = root / f"evaluation-{len(folders)}"
        folder.mkdir(parents=True)
        (folder / "evaluation.json").write_text(json.dumps(entry))
        sample = {"text": f"<i>{entry['name']}</i> speaks", "score": 1.0, "truncated": False}
        record = {"prompt": "say <b>", "reference": [sample], "policy": [sample]}
        (folder / "samples.jsonl").write_text(json.dumps(record) + "\n")
        folders.append(str(folder))
    return folders


def test_members_are_compared_on_the_prompts_that_a_judge_judged_of_both():
    """Of the other prompts there is no difference; without them `soft` would be as good as `sharp`."""
    wins = {"sharp": 4 * [0.9, 0.8, None, 0.7, 0.8], "soft": 4 * [0.5, 0.4, 0.99, None, 0.4]}
    members = [
        entry | {"by_prompt": {"win_rate": wins[entry["name"]]}, "metrics": {"win_rate": figure(value, 0.05)}}
        for entry, value in ((SHARP, 0.8), (SOFT, 0.57))
    ]
    assert choose(members, "win_rate").name == "sharp"
    alike = [entry | {"by_prompt": {"win_rate": wins["sharp"]}} for entry in members]
    assert choose(alike, "win_rate").name == "soft"


def test_a_judge_without_scores_ranks_by_win_rate_alone(tmp_path):
    scored = {"expected_reward", "reference_expected_reward"}
    entry = SHARP | {
        "judge": {"name": "llm", "accuracy": figure(0.7), "usage": {"requests": 8}},
        "metrics": {name: one for name, one in SHARP["metrics"].items() if name not in scored},
        "by_prompt": {"win_rate": SHARP["by_prompt"]["win_rate"]},
    }
    folders = save(tmp_path, entry)
    with pytest.raises(ConfigError, match=r"the judge 'llm' .* set selection_rule to win_rate"):
        compare.run(folders, str(tmp_path / "out"), "expected_reward")
    assert compare.run(folders, str(tmp_path / "out"), "win_rate").chosen == "sharp"
    assert (tmp_path / "out" / "frontier.png").stat().st_size > 1000


def test_the_softest_member_that_is_not_inferior_to_the_best_is_chosen():
    choice = choose([SHARP, EVEN, SOFT, DPO], "expected_reward")
    assert choice.name == "even"  # `soft` is softer still, but lacks more than a tenth of the gain
    assert "sharp has the best expected reward" in choice.reason
    assert "not inferior by more than 0.16 nats" in choice.reason


def test_a_clear_winner_is_chosen_however_sharp():
    assert choose([SHARP, SOFT, DPO], "expected_reward").name == "sharp"
    assert choose([SHARP, SOFT, DPO], "win_rate").name == "sharp"


def test_differences_between_prompts_do_not_hide_those_between_members():
    """The unpaired intervals of `sharp` and `soft` overlap widely, and yet `soft` is inferior."""
    assert SOFT["metrics"]["expected_reward"]["value"] > SHARP["metrics"]["expected_reward"]["low"]
    assert choose([SHARP, SOFT], "expected_reward").name == "sharp"


def test_a_wide_interval_is_no_reason_to_take_a_model():
    """Prompt by prompt now far better, now far worse: it cannot be told from the best, and is not taken."""
    wild = member("wild", 3.0, [4.0, -2.0, 5.0, -1.0], kl=1.0, entropy=9.0)
    assert choose([SHARP, wild], "expected_reward").name == "sharp"


def test_a_broken_member_is_never_chosen():
    """However good its reward, and however soft it is: what leaks counts as entropy."""
    mass = {"mass_on_set": figure(0.89, 0.01), "reference_mass_on_set": figure(0.99, 0.01)}
    leaked = member("leaked", 4.0, [9.0, 9.0, 9.0, 9.0], kl=4.0, entropy=9.0) | {"exact": mass}
    choice = choose([SHARP, EVEN, leaked], "expected_reward")
    assert choice.name == "even"
    assert (
        "Never chosen: leaked has only 0.89 of its probability on the known set, the reference 0.99."
        in choice.reason
    )
    endless = member("endless", 4.0, [9.0, 9.0, 9.0, 9.0], kl=4.0, entropy=9.0)
    endless["metrics"] |= {
        "truncated_fraction": figure(0.4, 0.05),
        "reference_truncated_fraction": figure(0.1, 0.05),
    }
    choice = choose([endless, SHARP], "expected_reward")
    assert choice.name == "sharp"
    assert "endless has 40% of its samples cut at the length limit, the reference 10%" in choice.reason
    choice = choose([endless, leaked], "expected_reward")
    assert choice.name is None
    assert "No member may be chosen: endless has 40%" in choice.reason


def test_mass_and_truncation_as_the_references_are_no_fault():
    mass = {"mass_on_set": figure(0.5, 0.01), "reference_mass_on_set": figure(0.52, 0.01)}
    young = member("young", 1.0, [9.0, 9.0, 9.0, 9.0], kl=1.0, entropy=1.0) | {"exact": mass}
    assert choose([young, SHARP], "expected_reward").name == "young"
    cut = member("cut", 1.0, [9.0, 9.0, 9.0, 9.0], kl=1.0, entropy=1.0)
    cut["metrics"] |= {
        "truncated_fraction": figure(0.93, 0.02),
        "reference_truncated_fraction": figure(0.9, 0.02),
    }
    assert choose([cut, SHARP], "expected_reward").name == "cut"


def test_a_judge_that_is_a_coin_chooses_nothing():
    def judged(low):
        accuracy = figure(low + 0.1, 0.1)
        return [entry | {"judge": {"name": "bradley-terry", "accuracy": accuracy}} for entry in (SHARP, EVEN)]

    choice = choose(judged(0.45), "win_rate")
    assert choice.name is None
    assert "agrees with 0.55 [0.45, 0.65] of the held-out preferences" in choice.reason
    assert choose(judged(0.52), "win_rate").name == "even"


PLANTED = {  # metrics, or exact figures, that only a broken model has
    "repeating": {"repetition": figure(0.8), "reference_repetition": figure(0.01, 0.01)},
    "random": {
        "cross_entropy": figure(9.0),
        "reference_cross_entropy": figure(2.5),
        "completion_length": figure(40.0),
    },
    "far": {
        "kl_token": figure(3.5),
        "reference_cross_entropy": figure(2.5),
        "completion_length": figure(40.0),
    },
    "truncated": {"truncated_fraction": figure(0.5), "reference_truncated_fraction": figure(0.05, 0.05)},
}


@pytest.mark.parametrize("kind", [*PLANTED, "leaked"])
def test_a_planted_broken_member_is_never_chosen_and_the_report_says_why(tmp_path, kind):
    broken = member(kind, 4.0, [9.0, 9.0, 9.0, 9.0], kl=1.0, entropy=9.0)
    if kind == "leaked":
        named = ("entropy", "expected_reward", "reference_entropy", "reference_expected_reward")
        broken["exact"] = dict.fromkeys((*named, "optimum_entropy", "optimum_expected_reward"), figure(1.0))
        broken["exact"] |= {"kl_optimum_to_policy": figure(0.1), "mass_on_set": figure(0.89)}
        broken["exact"] |= {"reference_mass_on_set": figure(0.99, 0.0)}
    broken["metrics"] |= PLANTED.get(kind, {})
    result = run(save(tmp_path, broken, SHARP, EVEN), str(tmp_path / "out"))
    assert result["chosen"] == "even"
    assert f"Never chosen: {kind} " in result["reason"]
    with pytest.raises(DataError, match=f"No member may be chosen: {kind} "):
        run(save(tmp_path / "alone", broken), str(tmp_path / "none"))


def test_where_the_chosen_fails_the_gate_the_next_that_passes_is_chosen_and_it_is_said(tmp_path):
    """`even` comes first by the rule, `sharp` next, `soft` last."""
    weak = copy.deepcopy(EVEN)
    weak["metrics"]["win_rate"] = figure(0.53, 0.05)
    folders = save(tmp_path, weak, SHARP, SOFT)
    result = run(folders, str(tmp_path / "out"), limits=Limits(min_win_rate=0.5))
    assert result["chosen"] == "sharp"
    assert list(result["passed_over"]) == ["even"]
    said = "The rule ranks higher, but the gate refuses: even (win_rate is 0.53 [0.48, 0.58], n=24: "
    assert said in result["reason"]
    assert "win_rate is 0.53" in (tmp_path / "out" / "report.html").read_text()
    assert json.loads((tmp_path / "out" / "chosen" / "evaluation.json").read_text())["name"] == "sharp"
    assert run(folders, str(tmp_path / "open"), limits=Limits(min_win_rate=0.4))["chosen"] == "even"
    assert run(folders, str(tmp_path / "near"), limits=Limits(None, max_kl=1.5))["chosen"] == "soft"


def test_the_console_compares_and_chooses_as_the_pipeline_does(tmp_path, capsys):
    folders = save(tmp_path, SHARP, EVEN, SOFT)
    options = ["--output", str(tmp_path / "out"), "--max-kl", "1.5", "--min_win_rate", "0.4"]
    assert main(["compare", *folders, *options]) == 0
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert result == run(folders, str(tmp_path / "kept"), max_kl=1.5, limits=Limits(0.4))
    printed = capsys.readouterr().out
    assert f"chosen:   {result['chosen']}. " in printed
    assert f"report:   {tmp_path / 'out' / 'report.html'}" in printed


def test_called_again_a_comparison_is_made_anew_and_one_that_was_cut_off_is_none(tmp_path, monkeypatch):
    output = tmp_path / "out"
    folders = save(tmp_path / "members", SHARP, EVEN, SOFT)
    first = run(folders, str(output))
    files = {path.relative_to(output) for path in output.rglob("*")}
    assert run(folders, str(output)) == first
    assert {path.relative_to(output) for path in output.rglob("*")} == files

    def cut_off(self, folder):
        raise KeyboardInterrupt

    weak = [copy.deepcopy(entry) for entry in (SHARP, SOFT)]
    for entry in weak:
        entry["metrics"]["win_rate"] = figure(0.5, 0.0)
    others = save(tmp_path / "weak", *weak)
    with monkeypatch.context() as patch:
        patch.setattr(Comparison, "write", cut_off)
        with pytest.raises(KeyboardInterrupt):
            compare.run(others, str(output), limits=Limits(0.5), required=False)
    assert not (output / "comparison.json").exists()
    assert not (output / "chosen").exists()  # what was chosen before
    assert run(folders, str(output)) == first


def test_where_none_passes_the_gate_the_run_fails_and_says_so_of_each(tmp_path):
    even = [copy.deepcopy(entry) for entry in (SHARP, SOFT, DPO)]
    for entry in even:
        entry["metrics"]["win_rate"] = figure(0.5, 0.0)
    said = r"No member passes the gate: sharp \(win_rate is 0\.5 .*\); dpo \(.*\); soft \("
    with pytest.raises(DataError, match=said):
        run(save(tmp_path, *even), str(tmp_path / "out"), limits=Limits(min_win_rate=0.5))
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert result["chosen"] is None
    assert list(result["passed_over"]) == ["sharp", "dpo", "soft"]
    assert "No member passes the gate" in (tmp_path / "out" / "report.html").read_text()
    folders = [str(tmp_path / f"evaluation-{i}") for i in range(3)]
    assert run(folders, str(tmp_path / "kept"), limits=Limits(0.5), required=False) == result


def test_the_terminal_has_the_choice_its_place_and_every_warning_once(tmp_path):
    warned = [SHARP | {"warnings": ["all", "own"]}, EVEN | {"warnings": ["all"]}]
    lines = outcome_lines(compare.run(save(tmp_path, *warned), str(tmp_path / "out")))
    assert lines[0].startswith("chosen:   even. sharp has the best")
    assert lines[1:] == [
        "model:    s3://even",
        "best for: one answer: sharp (not told from it: even)",
        "warning:  all",
        "warning:  sharp: own",
    ]


def test_members_too_far_from_the_reference_cannot_be_chosen():
    assert choose([SHARP, EVEN, SOFT], "expected_reward", max_kl=1.5).name == "soft"


def test_of_one_member_no_comparison_is_claimed():
    choice = choose([SOFT], "expected_reward")
    assert choice.name == "soft"
    assert "only one" in choice.reason
    assert "gain" not in choice.reason


def test_with_too_few_prompts_nothing_is_sure_and_the_best_is_chosen():
    for count, chosen in ((1, "sharp"), (9, "sharp"), (10, "even")):
        few = [copy.deepcopy(entry) for entry in (SHARP, EVEN)]
        for entry in few:
            entry["by_prompt"] = {"expected_reward": entry["by_prompt"]["expected_reward"][:count]}
        assert choose(few, "expected_reward").name == chosen


def test_comparison_holds_members_choice_and_what_registration_needs(tmp_path):
    result = run(save(tmp_path, SOFT, DPO, SHARP, EVEN), str(tmp_path / "out"), max_kl=5.0)
    known = {"reference_uri", "dataset_hash", "settings"}  # of an evaluation alone
    blank = {"kl_beta": 0.0, "kl_on": "samples", "theory": None, "reward_frontier": None, "reliability": None}
    blank |= {"dimensions": [], "dimension_weights": []}
    even = {key: value for key, value in EVEN.items() if key not in known}
    assert result["members"][1] == blank | even
    assert result["chosen"] == "even"
    assert [entry["name"] for entry in result["members"]] == ["sharp", "even", "soft", "dpo"]
    assert "within 5 nats" in result["rule"]
    chosen = json.loads((tmp_path / "out" / "chosen" / "evaluation.json").read_text())
    assert chosen == EVEN
    assert (tmp_path / "out" / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_report_shows_rule_reason_and_escaped_samples(tmp_path):
    result = run(save(tmp_path, SHARP, EVEN, DPO), str(tmp_path / "out"))
    page = (tmp_path / "out" / "report.html").read_text()
    assert result["reason"] in html.unescape(page)
    assert result["rule"] in html.unescape(page)
    assert "say &lt;b&gt;" in page
    assert "&lt;i&gt;dpo&lt;/i&gt; speaks" in page
    assert "<i>dpo" not in page


def test_report_says_where_the_figures_of_all_members_come_from(tmp_path):
    shared = {"reference_uri": "s3://reference", "data_source": "tales.jsonl"}
    members = [SHARP | shared | {"base_model": "owner/one"}, EVEN | shared | {"base_model": "owner/other"}]
    run(save(tmp_path, *members), str(tmp_path / "out"))
    page = (tmp_path / "out" / "report.html").read_text()
    told = {"reference": "s3://reference", "data": "tales.jsonl", "evaluation id": "same"}
    for name, value in told.items():
        assert f'<th scope="row">{name}</th><td><code>{value}</code></td>' in page
    for name in ("policy", "base model"):  # each has its own
        assert f'<th scope="row">{name}</th>' not in page


def test_report_says_how_much_of_each_win_is_sure_where_the_judge_has_heads(tmp_path):
    heads = {"sure_win_rate": figure(0.47, 0.05)}
    sure = [one | {"metrics": one["metrics"] | heads} for one in (SHARP, EVEN)]
    run(save(tmp_path / "heads", *sure), str(tmp_path / "out"))
    page = (tmp_path / "out" / "report.html").read_text()
    assert '<th scope="col" class="n">Sure win rate' in page
    assert page.count('data-value="0.47"') == 2
    assert "Sure win rate: what nine of ten heads of the judge exceed." in page
    run(save(tmp_path / "none", SHARP, EVEN), str(tmp_path / "other"))
    assert "ure win rate" not in (tmp_path / "other" / "report.html").read_text()


def test_figures_and_scores_that_a_judge_did_not_give_are_dashes(tmp_path):
    members = [
        one
        | {
            part: {name: value for name, value in one[part].items() if "reward" not in name}
            for part in ("metrics", "by_prompt")
        }
        for one in (SHARP, EVEN)
    ]
    folders = save(tmp_path, *members)
    for folder in folders:
        file = Path(folder, "samples.jsonl")
        file.write_text(file.read_text().replace('"score": 1.0', '"score": null'))
    run(folders, str(tmp_path / "out"), "win_rate")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Expected reward" not in page  # a column without any figure is left out
    assert '<span class="score">–</span>' in page
    assert '"judged":false' in page


def save_with_extrapolated(root):
    """Three evaluation folders; in that of `sharp` lies another, of what was extrapolated from it."""
    folders = save(root, EVEN, SHARP, SOFT)
    (within,) = save(root / "apart", EXPO)
    shutil.move(within, f"{folders[1]}/extrapolated-0.5")
    return folders


def test_extrapolated_models_are_members(tmp_path):
    folders = save_with_extrapolated(tmp_path)
    within = f"{folders[1]}/extrapolated-0.5"
    assert [str(folder) for folder in evaluation_folders(folders)] == [*folders[:2], within, folders[2]]
    assert len(evaluation_folders([*folders, within])) == 4  # one that is named as well counts once
    result = run(folders, str(tmp_path / "out"))
    names = ["sharp", "even", "soft", "sharp-expo-0.5"]
    assert [entry["name"] for entry in result["members"]] == names
    assert result["chosen"] == "sharp-expo-0.5"
    assert json.loads((tmp_path / "out" / "chosen" / "evaluation.json").read_text()) == EXPO
    assert "&lt;i&gt;sharp-expo-0.5&lt;/i&gt; speaks" in (tmp_path / "out" / "report.html").read_text()
    assert run(folders, str(tmp_path / "near"), max_kl=3.5)["chosen"] == "even"


def test_entropy_at_equal_reward_is_written_and_shown(tmp_path):
    sharp = member("dpo-sharp", 1.0, [2.0, 1.0, 3.0, 2.0], kl=9.0, entropy=2.0, method="dpo") | {"beta": 0.1}
    soft = member("dpo-soft", 1.0, [1.0, 0.0, 1.0, 1.0], kl=1.0, entropy=4.0, method="dpo") | {"beta": 1.0}
    result = run(save(tmp_path, SHARP, SOFT, sharp, soft), str(tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())["equal_reward"]
    assert found == result["equal_reward"]
    assert [row["name"] for row in found["rows"]] == ["sharp", "soft"]
    at_sharp = found["rows"][0]
    assert at_sharp["entropy"]["SPO"] == 3.0
    # rewards 2 and 0.75 with 2 and 4 nats; sharp's is 1.6
    assert at_sharp["entropy"]["DPO"] == pytest.approx(4 - (1.6 - 0.75) / 1.25 * 2)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Entropy at equal expected reward" in page
    assert f"{at_sharp['entropy']['DPO']:.3f}<br><small>{at_sharp['entropy']['DPO'] - 3:+.3f}" in page


def test_members_evaluated_differently_are_refused_by_name(tmp_path):
    other = SOFT | {"evaluation_id": "other"}
    with pytest.raises(DataError, match=r"sharp, even \(same\); soft \(other\)"):
        run(save(tmp_path, SHARP, EVEN, other), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    alike = {"data": "d", "judge": "expert e", "reference": "r", "settings": {"seed": 0}}
    first = SHARP | {"evaluated_on": alike}
    then = other | {"evaluated_on": alike | {"judge": "llm f", "settings": {"seed": 1}}}
    with pytest.raises(DataError, match="evaluated on different judge and settings: "):
        run(save(tmp_path / "more", first, then), str(tmp_path / "out"))


def test_when_every_member_is_too_far_the_report_is_kept_and_the_run_fails(tmp_path):
    with pytest.raises(DataError, match=r"Every member exceeds the limit of 0.5 nats.*nearest has 1.00"):
        run(save(tmp_path, SHARP, SOFT), str(tmp_path / "out"), max_kl=0.5)
    assert "exceeds the limit" in (tmp_path / "out" / "report.html").read_text()
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["chosen"] is None


@pytest.mark.parametrize(
    ("members", "options", "message"),
    [
        ([], {}, "nothing to compare"),
        ([SHARP, SHARP], {}, "more than one is called sharp"),
        ([SHARP], {"rule": "elo"}, "expected_reward, win_rate, got 'elo'"),
        ([SHARP], {"max_kl": -1.0}, "positive number of nats"),
    ],
)
def test_wrong_requests_are_refused(tmp_path, members, options, message):
    with pytest.raises(ConfigError, match=message):
        run(save(tmp_path, *members), str(tmp_path / "out"), **options)


def test_table_has_a_line_per_member_by_softness_with_intervals():
    lines = format_table([DPO, SOFT, EVEN, SHARP]).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["sharp", "even", "soft", "dpo"]
    assert "1.60 [0.60, 2.60]" in lines[2]
    assert lines[5].split()[1] == "–"  # dpo has no softness


def test_table_orders_a_method_by_its_parameter_and_variants_behind():
    expo = SHARP | {"name": "sharp-expo-0.5", "extrapolation": 0.5}
    baselines = [DPO | {"name": f"dpo-beta-{beta}", "beta": float(beta)} for beta in (10, 2)]
    lines = format_table([expo, *baselines, SOFT, EVEN]).splitlines()
    assert [line.split()[0] for line in lines[2:]] == [
        "even",
        "soft",
        "sharp-expo-0.5",
        "dpo-beta-2",
        "dpo-beta-10",
    ]


def test_markdown_table_is_six_columns_by_softness_and_marks_the_choice():
    table = markdown_table([DPO, SOFT, SHARP], "soft")
    assert all(cell.startswith("&nbsp;&nbsp;") for cell in table.splitlines()[2].strip("| ").split(" | ")[1:])
    rows = [line.strip("| ").split(" | ") for line in table.replace("&nbsp;", "").splitlines()]
    assert rows[0] == ["model", "α", "expected reward", "KL (nats)", "entropy (nats)", "win rate"]
    assert rows[1] == [":--", *["--:"] * 5]
    assert [row[:2] for row in rows[2:]] == [["sharp", "0.5"], ["**soft**, chosen", "2"], ["dpo", "–"]]
    assert rows[2][2] == "1.60 [0.60,\N{NO-BREAK SPACE}2.60]"
    assert {len(row) for row in rows} == {6}


def test_markdown_table_says_what_stays_on_a_known_set_and_escapes_names():
    known = SHARP | {"name": "a|b_c", "exact": {"mass_on_set": figure(0.987)}}
    lines = markdown_table([known, SOFT], None).splitlines()
    assert lines[0].endswith("mass on set |")
    assert lines[2].startswith("| a\\|b\\_c |")
    assert lines[2].endswith(";0.987 |")
    assert lines[3].endswith(";– |")


def test_the_choice_is_logged_to_the_parent_run(tmp_path, recorded):
    run(save(tmp_path, SHARP, EVEN), str(tmp_path / "out"), parent_run_id="parent")
    assert recorded[0][1]["run_id"] == "parent"
    logged = next(call[1] for call in recorded if call[0] == "metrics")
    assert logged["chosen/entropy_sequence"] == 5.0
    assert ("artifact", "frontier.png") in recorded
    (tags,) = [call[1] for call in recorded if call[0] == "tags"]
    assert "| even |" in tags["mlflow.note.content"]


@pytest.mark.parametrize(
    ("max_kl", "chosen"),
    [
        (3.5, ("s3://even", "even")),
        (0.0, ("s3://sharp/extrapolated-0.5", "sharp-expo-0.5")),
    ],
)
def test_component_returns_the_chosen_model(tmp_path, capsys, max_kl, chosen):
    from softpref.evaluation.component import compare_models

    def artifact(name):
        return SimpleNamespace(path=str(tmp_path / name), uri=str(tmp_path / name), metadata={})

    written = {name: artifact(name) for name in ("comparison", "chosen", "report", "summary")}
    outputs = compare_models.python_func(
        evaluations=[SimpleNamespace(path=folder) for folder in save_with_extrapolated(tmp_path)],
        **written,
        max_kl=max_kl,
    )
    name = outputs.name
    assert (outputs.model_uri, name) == chosen
    assert json.loads((tmp_path / "chosen" / "evaluation.json").read_text())["name"] == name
    summary = (tmp_path / "summary").read_text()
    assert summary.startswith("| model | &nbsp;&nbsp;α |")
    assert "\n\n**Chosen:** " in summary
    assert "\n\n**Rule:** " in summary
    assert f"| **{name}**, chosen |" in summary
    assert "sharp-expo-0.5" in summary
    assert (tmp_path / "report").exists()
    said = written["comparison"].metadata
    assert (said["chosen"], said["rule"]) == (name, "expected_reward")
    assert "sharp-expo-0.5" in said["models"].split(", ")
    assert written["summary"].metadata["title"] == f"Chosen: {name}"
    printed = capsys.readouterr().out
    assert f"[softpref] chosen:   {name}. " in printed
    assert f"[softpref] model:    {chosen[0]}\n" in printed
    assert f"[softpref] report:   {written['report'].uri}\n" in printed


@pytest.mark.parametrize("name", ["", "story"])
def test_component_asks_for_the_gate_where_a_model_is_to_be_registered(tmp_path, capsys, name):
    from softpref.evaluation.component import compare_models

    weak = copy.deepcopy(EVEN)
    weak["metrics"]["win_rate"] = figure(0.5, 0.0)
    written = {
        key: SimpleNamespace(path=str(tmp_path / key), uri=key, metadata={})
        for key in ("comparison", "chosen", "report", "summary")
    }

    def compared(min_win_rate, *members):
        return compare_models.python_func(
            evaluations=[SimpleNamespace(path=one) for one in save(tmp_path / str(min_win_rate), *members)],
            **written,
            registered_model_name=name,
            min_win_rate=min_win_rate,
            registry_overrides={"max_kl": 2.5, "beyond_noise": True},
        )

    assert compared(0.55, weak, SOFT).name == ("soft" if name else "even")
    coin = {"judge": EVEN["judge"] | {"name": "bradley-terry", "accuracy": figure(0.52, 0.05)}}
    if name:
        with pytest.raises(DataError, match="no better than a coin"):
            compared(0.54, EVEN | coin)
        assert "Nothing is chosen: the judge agrees with" in (tmp_path / "summary").read_text()
        assert "[softpref] chosen:   none. Nothing is chosen: " in capsys.readouterr().out
    else:
        assert compared(0.54, EVEN | coin) == ("", "")
        assert json.loads((tmp_path / "comparison" / "comparison.json").read_text())["chosen"] is None
