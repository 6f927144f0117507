"""The table of the degree loss says what the runs found, differences on the same rows."""

import json

from tests.benchmarks.degree import Run, divided, table


def planted(folder, run, right, tokens, degree=None):
    places = [0, 0, 1, 1]
    run.file(folder).parent.mkdir(exist_ok=True)
    drawn = {"prompts": places, "tokens": tokens, "truncated": [0.0, 0.0, 1.0, 1.0]}
    before = {**drawn, "tokens": [10] * 4}
    kinds = {
        "seen": {"prompts": ["a", "a", "b", "b"], "right": right},
        "unseen": {"prompts": ["a", "b"], "right": right[1:3]},
    }
    found = {**kinds, "lengths": drawn, "reference_lengths": before}
    run.file(folder).write_text(json.dumps({**found, "degree": degree, "seconds": 8.0}))


def test_a_line_has_all_seeds_of_a_weight(tmp_path):
    runs = [Run(seed, weight) for seed in (0, 1) for weight in (0.0, 0.3)]
    for run in runs[::2]:
        planted(tmp_path, run, [1.0, 0.0, 1.0, 0.0], [10, 10, 10, 10])
    # of length alone: 4 is level 1 and 6 is level 0, but for one text of four
    degree = {
        "prompts": ["a", "a", "b", "b"],
        "levels": [0, 1, 1, 0],
        "tokens": [6, 4, 4, 4],
        "said": [0, 0, 1, 0],
    }
    planted(tmp_path, runs[1], [1.0, 1.0, 1.0, 1.0], [12, 12, 12, 12], degree)
    first = table(runs[:2], tmp_path).splitlines()[-1]
    assert first == (
        "| 0.3 | 1 | 1.000 [1.000, 1.000] | 0.500 [0.500, 0.500] "
        "| 1.000 [1.000, 1.000] | 0.500 [0.000, 1.000] | 12 [12, 12] | 2.0 [2.0, 2.0] "
        "| 0.500 [0.000, 1.000] | 0.750 [0.500, 1.000] | 0.750 | 8 |"
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
