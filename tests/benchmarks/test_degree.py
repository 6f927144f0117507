"""The table of the degree loss says what the runs found, differences on the same rows."""

import json

from tests.benchmarks.degree import Run, divided, table


def planted(folder, run, right, tokens, degree=None):
    """What is given of two prompts is found of ten, five times the two: an interval takes as many."""
    run.file(folder).parent.mkdir(exist_ok=True)
    drawn = {"prompts": [0, 0, 1, 1], "tokens": tokens, "truncated": [0.0, 0.0, 1.0, 1.0]}
    found = {
        "seen": {"prompts": [0, 0, 1, 1], "right": right},
        "unseen": {"prompts": [0, 1], "right": right[1:3]},
        "lengths": drawn,
        "reference_lengths": {**drawn, "tokens": [10] * 4},
        "degree": degree,
    }
    tenfold = {
        part: values and {name: 5 * one for name, one in values.items()} for part, values in found.items()
    }
    for values in filter(None, tenfold.values()):
        count = len(values["prompts"]) // 5
        values["prompts"] = [2 * (place // count) + one for place, one in enumerate(values["prompts"])]
    run.file(folder).write_text(json.dumps({**tenfold, "seconds": 8.0}))


def test_a_line_has_all_seeds_of_a_weight(tmp_path):
    runs = [Run(seed, weight) for seed in (0, 1) for weight in (0.0, 0.3)]
    for run in runs[::2]:
        planted(tmp_path, run, [1.0, 0.0, 1.0, 0.0], [10, 10, 10, 10])
    # of length alone: 4 is level 1 and 6 is level 0, but for one text of four
    degree = {
        "prompts": [0, 0, 1, 1],
        "levels": [0, 1, 1, 0],
        "tokens": [6, 4, 4, 4],
        "said": [0, 0, 1, 0],
    }
    planted(tmp_path, runs[1], [1.0, 1.0, 1.0, 1.0], [12, 12, 12, 12], degree)
    # of ten values of 0 or 1 the interval's ends are quantiles of their binomial distribution
    first = table(runs[:2], tmp_path).splitlines()[-1]
    assert first == (
        "| 0.3 | 1 | 1.000 [1.000, 1.000] | 0.500 [0.500, 0.500] "
        "| 1.000 [1.000, 1.000] | 0.500 [0.100, 0.900] | 12 [12, 12] | 2.0 [2.0, 2.0] "
        "| 0.500 [0.100, 0.900] | 0.750 [0.550, 0.950] | 0.750 | 8 |"
    )
    planted(tmp_path, runs[3], [0.0, 0.0, 0.0, 0.0], [8, 8, 8, 8], degree)
    both = table(runs, tmp_path).splitlines()[-1].split(" | ")
    assert both[1] == "2"
    assert both[3].startswith("0.000 ")  # as often better as worse
    assert both[7].startswith("0.0 ")


def test_no_argument_that_is_held_out_is_in_a_training_pair(tmp_path):
    names = [f"argument {number}" for number in range(30)]
    pairs = [
        {"stance": stance, "argument_a": one, "argument_b": other}
        for stance in ("for", "against")
        for place, one in enumerate(names)
        for other in names[:place]
    ]
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    rows, seen, unseen = ([json.loads(line) for line in part] for part in divided(source, 1))

    def arguments(part):
        return {(pair["stance"], pair[side]) for pair in part for side in ("argument_a", "argument_b")}

    assert min(map(len, (rows, seen, unseen))) > 30
    assert arguments(seen) <= arguments(rows)
    assert not arguments(unseen) & arguments(rows)
    assert not any(pair in rows for pair in seen)
    assert divided(source, 1) == divided(source, 1) != divided(source, 2)
