"""Unpaired completions: from a source of their own, past the splits, to the method `kto`."""

import itertools
import json

import datasets
import pytest
from softpref.cli import main
from softpref.data.config import DataConfig
from softpref.data.stage import run
from softpref.errors import ConfigError, DataError
from softpref.records.model import load_metadata

PROMPTS = ["".join(letters) for letters in itertools.product("abcd", "abcd")]
QUICK = {
    "max_prompt_length": 16,
    "max_completion_length": 6,
    "cut_rows": "keep",
    "samples_per_refresh": 8,
    "sampling_interval": 2,
    "per_device_train_batch_size": 6,
    "learning_rate": 1e-2,
    "num_train_epochs": 20,
    "save_strategy": "no",
    "method": "kto",
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def pairs(tmp_path):
    rows = [{"prompt": prompt, "chosen": "a", "rejected": "b"} for prompt in PROMPTS]
    return write(tmp_path / "pairs.jsonl", rows)


def judged(good, prompts=("fa", "fb", "fc", "fd")):
    """Of each prompt one completion, `good` or another, desirable where it is `good`."""
    answers = itertools.cycle((good, {"e": "f", "f": "e"}[good]))
    return [
        {"q": prompt, "a": answer, "thumb": answer == good}
        for prompt, answer in zip(prompts, answers, strict=False)
    ]


def unpaired(path, rows):
    columns = {"prompt": "q", "completion": "a", "label": "thumb"}
    return {"unpaired_source": write(path, rows), "unpaired_columns": columns}


def test_unpaired_completions_lie_beside_the_preferences_and_keep_clear_of_their_prompts(
    tmp_path, pairs, caplog
):
    rows = [
        *judged("e"),
        {"q": "ab", "a": "e", "thumb": 1},  # a prompt of the preferences, in whatever split
        {"q": "g", "a": "e", "thumb": 0},
        {"q": "h", "a": "e", "thumb": "perhaps"},
    ]
    config = DataConfig(source=pairs, **unpaired(tmp_path / "judged.jsonl", rows), max_rejected_fraction=0.2)
    stats = run(config, str(tmp_path / "data"))
    saved = datasets.load_from_disk(str(tmp_path / "data" / "unpaired"))
    assert saved.to_list() == [
        {"prompt": "fa", "completion": "e", "label": True},
        {"prompt": "fb", "completion": "f", "label": False},
        {"prompt": "fc", "completion": "e", "label": True},
        {"prompt": "fd", "completion": "f", "label": False},
        {"prompt": "g", "completion": "e", "label": False},
    ]
    own = stats["unpaired"]
    assert (own["train"], own["desirable"], own["shared_prompt"]) == (5, 2, 1)
    assert "1 of 6 completions of" in caplog.text
    assert own["rejected"] == {"label is neither true nor false": 1}
    assert "unpaired/data-00000-of-00001.arrow" in stats["files"]
    assert "unpaired completions, 40 % desirable, train" in (tmp_path / "data" / "page.html").read_text(
        encoding="utf-8"
    )
    assert sum(stats["rows"].values()) == len(PROMPTS)
    again = run(DataConfig(source=str(tmp_path / "data")), str(tmp_path / "taken-over"))
    assert again["unpaired"] == own
    assert datasets.load_from_disk(str(tmp_path / "taken-over" / "unpaired")).to_list() == saved.to_list()
    other = unpaired(tmp_path / "other.jsonl", judged("f"))
    replaced = run(DataConfig(source=str(tmp_path / "data"), **other), str(tmp_path / "replaced"))
    assert replaced["unpaired"]["train"] == 4
    assert replaced["unpaired"]["hash"] != own["hash"]


def test_no_completion_of_another_prompt_is_an_error(tmp_path, pairs):
    rows = [{"q": prompt, "a": "e", "thumb": True} for prompt in PROMPTS]
    with pytest.raises(DataError, match=r"every prompt of .*judged.jsonl is also among the preferences"):
        run(DataConfig(source=pairs, **unpaired(tmp_path / "judged.jsonl", rows)), str(tmp_path / "data"))
    with pytest.raises(
        ConfigError, match=r"unpaired_columns has no effect without unpaired_source; give that"
    ):
        DataConfig(source=pairs, unpaired_columns={"label": "thumb"})
    with pytest.raises(ConfigError, match=r"unpaired_columns has the role 'score'; known: prompt, compl"):
        DataConfig(source=pairs, unpaired_source=pairs, unpaired_columns={"score": "s"})


SYSTEM = "Be brief, please."


@pytest.mark.parametrize(
    ("beside", "columns", "options"),
    [
        ({}, {}, {}),
        ({"system": SYSTEM}, {}, {}),
        ({"system_prompt": SYSTEM}, {}, {"as_messages": True}),
        ({}, {}, {"as_messages": True, "system_prompt": SYSTEM}),
        ({"input": "of this"}, {"prompt": "instruction"}, {}),
        ({"hint": "of this"}, {}, {"prompt_template": "{instruction} {hint}"}),
    ],
    ids=["plain", "system", "system message", "system prompt", "input", "template"],
)
def test_no_prompt_of_the_preferences_gets_in_whatever_it_is_made_of(
    tmp_path, caplog, beside, columns, options
):
    """One file as both: pairs within a prompt, and beside them the completions of prompts with one label."""
    asked = "instruction" if columns or "prompt_template" in options else "prompt"
    rows = [
        {asked: f"{prompt}?", **beside, "completion": one, "label": one == "a"}
        for prompt in PROMPTS
        for one in ("a", "b")
    ]
    rows += [{asked: f"{prompt}!", **beside, "completion": "a", "label": True} for prompt in PROMPTS[:5]]
    source = write(tmp_path / "thumbs.jsonl", rows)
    given = {"source": source, "unpaired_source": source, "unpaired_columns": columns, **options}
    stats = run(DataConfig(**given), str(tmp_path / "data"))
    assert (stats["unpaired"]["train"], stats["unpaired"]["shared_prompt"]) == (5, 2 * len(PROMPTS))
    found = json.dumps(datasets.load_from_disk(str(tmp_path / "data" / "unpaired"))["prompt"][:])
    assert found.count("!") == 5
    said = {"system": "system ← system", "system_prompt": "system ← system_prompt", "input": "input ← input"}
    for name in {*beside} & {*said}:
        assert f"thumbs.jsonl (unpaired): recognised by the columns' names: {said[name]}" in caplog.text
    assert found.count(SYSTEM) == (5 if SYSTEM in (*beside.values(), options.get("system_prompt")) else 0)
    assert found.count("of this") == (5 if "of this" in beside.values() else 0)


def test_a_word_beside_a_prompt_is_no_system_text_here_either(tmp_path, pairs):
    rows = [{**row, "system": "gpt"} for row in judged("e")]
    stats = run(DataConfig(source=pairs, **unpaired(tmp_path / "judged.jsonl", rows)), str(tmp_path / "data"))
    assert stats["unpaired"]["train"] == 4
    assert datasets.load_from_disk(str(tmp_path / "data" / "unpaired"))[0]["prompt"] == "fa"


def test_unpaired_completions_that_were_changed_are_not_taken_over(tmp_path, pairs):
    run(DataConfig(source=pairs, **unpaired(tmp_path / "judged.jsonl", judged("e"))), str(tmp_path / "data"))
    (file,) = (tmp_path / "data" / "unpaired").glob("data-*.arrow")
    file.write_bytes(file.read_bytes().replace(b"fa", b"zz"))
    with pytest.raises(DataError, match=r"unpaired cannot be read: .* is not what was written"):
        run(DataConfig(source=str(tmp_path / "data")), str(tmp_path / "taken-over"))


@pytest.mark.parametrize("method", ["kto", "dpo"])
def test_kto_alone_learns_from_them_in_either_direction(tmp_path, pairs, command, method):
    """The same preferences, and completions judged one way or the other: what differs, they have taught."""
    margins = {}
    for good in "ef":
        beside = unpaired(tmp_path / f"{good}.jsonl", judged(good, [f"f{one}" for one in PROMPTS]))
        dataset = str(tmp_path / f"data-{good}")
        run(DataConfig(source=pairs, **beside), dataset)
        name = f"policy-{good}"
        assert (
            command(name, dataset, **{**QUICK, "method": method}, reference_cache=str(tmp_path / "logps"))
            == 0
        )
        given = load_metadata(tmp_path / name)["row_counts"]["train"]["given"]
        preferences = len(datasets.load_from_disk(dataset)["train"])
        assert given == preferences + (len(PROMPTS) if method == "kto" else 0)
        margins[good] = preferred(tmp_path / name, "fab", ("e", "f"))
    if method == "kto":
        assert margins["e"] > margins["f"] + 0.4
    else:
        assert margins["e"] == margins["f"]


def preferred(policy, prompt, completions):
    """How much more likely the first completion is made than the second, in nats."""
    from softpref.lm.loading import load_model, load_tokenizer

    model, tokenizer = load_model(policy), load_tokenizer(str(policy))
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    logps = model(**ids).logits[0, -1].log_softmax(-1)
    first, second = (logps[tokenizer.convert_tokens_to_ids(one)].item() for one in completions)
    return first - second


def test_a_training_is_not_taken_for_one_with_other_completions(tmp_path, pairs, command, capsys):
    """A finished model is handed back only to who asks for it, unpaired completions included."""
    options = {**QUICK, "num_train_epochs": 1}
    for good in "ef":
        beside = unpaired(tmp_path / f"{good}.jsonl", judged(good))
        run(DataConfig(source=pairs, **beside), str(tmp_path / "data"))
        status = command("policy", str(tmp_path / "data"), **options)
        assert status == (0 if good == "e" else 2)
    assert "unpaired_hash" in capsys.readouterr().err


def test_the_command_line_says_what_is_wrong_with_a_label(tmp_path, pairs, capsys):
    source = write(tmp_path / "judged.jsonl", [{"prompt": "x", "completion": "e", "label": "good"}])
    given = ["--source", pairs, "--unpaired_source", source, "--output", str(tmp_path / "data")]
    assert main(["data", *given]) == 2
    said = capsys.readouterr().err
    assert "none of the 1 rows of" in said
    assert "can be used: label is neither true nor false (1). They are listed in" in said
    (line,) = (tmp_path / "data.rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["source"] == "unpaired"
