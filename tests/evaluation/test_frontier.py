"""The figure of a sweep: every member can be found in it, and its labels can be read."""

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from softpref.evaluation import frontier as module
from softpref.evaluation.exact import ExactPrompt, entropy, softmax_frontier

from tests.evaluations import evaluations

REWARDS = np.random.default_rng(0).normal(size=60)
REFERENCE = np.log(np.full(60, 1 / 60))
FRONTIER = softmax_frontier([ExactPrompt(REWARDS, REFERENCE, REFERENCE, REFERENCE, 1.0)])


def figure(value, spread=0.05):
    return {"value": value, "low": value - spread, "high": value + spread}


def member(number, method, value, exact=True, **extra):
    random = np.random.default_rng(number)
    logps = REWARDS / (value or 0.1) + random.normal(size=60) * 0.3
    logps -= np.logaddexp.reduce(logps)
    reward, nats = float(np.exp(logps) @ REWARDS), entropy(logps)
    return {
        "name": f"{method}-{number}",
        "method": method,
        "alpha": value,
        "beta": 0.05 if method == "spo" else value,
        "rounds": 1,
        "train_on": "preferences",
        "extrapolation": 0.0,
        "metrics": {
            "expected_reward": figure(reward),
            "win_rate": figure(1 / (1 + np.exp(-reward))),
            "kl_sequence": figure(float(np.exp(logps) @ (logps - REFERENCE))),
            "entropy_sequence": figure(nats),
            "reference_expected_reward": figure(0.0),
        },
        "exact": {
            "expected_reward": figure(reward),
            "entropy": figure(nats),
            "optimum_expected_reward": figure(reward + 0.01),
            "optimum_entropy": figure(nats + 0.01) if method == "spo" else {"value": None},
            "reference_expected_reward": figure(0.0),
            "reference_entropy": figure(entropy(REFERENCE)),
        }
        if exact
        else None,
        "softmax_frontier": FRONTIER if exact else None,
        **extra,
    }


def crowd(exact=True):
    """Sixteen members: the most that a sweep is meant to show."""
    wanted = [("spo", value) for value in (0.25, 0.5, 1.0, 2.0)]
    wanted += [(method, value) for method in ("dpo", "ipo", "rdpo", "tdpo", "sppo") for value in (0.5, 1.0)]
    members = [member(number, method, value, exact) for number, (method, value) in enumerate(wanted)]
    members.append(member(20, "spo", 0.5, exact, extrapolation=0.5))
    return [*members, member(21, "spo", 0.5, exact, rounds=3, train_on="samples")]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw a sweep; returns the figure itself and its SVG."""

    def draw(members, chosen=None):
        kept = []
        save = module.svg
        monkeypatch.setattr(module, "svg", lambda figure, **o: (kept.append(figure), save(figure, **o))[1])
        svg = module.frontier(evaluations(members), chosen, tmp_path / "frontier.png")
        assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
        return kept[0], svg

    return draw


@pytest.mark.parametrize("exact", [True, False])
def test_labels_of_a_crowded_sweep_overlap_neither_each_other_nor_points(drawn, exact):
    members = crowd(exact)
    figure, _ = drawn(members, "spo-1")
    renderer = FigureCanvasAgg(figure).get_renderer()
    panels = [axes for axes in figure.axes if axes.get_title(loc="left") != "SPO's entropy by softness"]
    assert len(panels) == (4 if exact else 3)
    for axes in panels:
        notes = [text for text in axes.texts if text.get_text().replace(".", "").isdigit()]
        assert len(notes) >= 12  # of 16: few find no place
        boxes = [note.get_window_extent(renderer) for note in notes]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        curves = [line for line in axes.get_lines() if str(line.get_label()).endswith((" (α)", " (β)"))]
        points = np.concatenate([axes.transData.transform(line.get_xydata()) for line in curves])
        assert len(points) == 16
        assert not any(box.contains(*point) for box in boxes for point in points)


def test_softness_beside_several_anchors_is_told_apart_by_name_and_look(drawn):
    members = [
        member(number, "spo", alpha, False, anchor=anchor)
        for number, (alpha, anchor) in enumerate(itertools.product((0.5, 2.0), (1.0, 0.0)))
    ]
    figure, _ = drawn(members)
    lines = figure.axes[-1].get_lines()
    assert [line.get_label() for line in lines] == ["SPO, anchor 1, of samples", "SPO, anchor 0, of samples"]
    assert lines[0].get_markerfacecolor() != lines[1].get_markerfacecolor()
    assert lines[0].get_linestyle() != lines[1].get_linestyle()


def test_every_method_that_trains_has_a_look_of_its_own():
    from softpref.evaluation.frontier import _METHODS
    from softpref.spo.checks import METHODS

    assert set(_METHODS) == set(METHODS)
    assert len(set(_METHODS.values())) == len({marker for _, marker in _METHODS.values()}) == len(METHODS)


def test_each_method_has_a_colour_and_marker_and_its_variants_another_line(drawn):
    figure, _ = drawn(crowd())
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    looks = {
        name: (line.get_color(), line.get_marker(), line.get_linestyle(), line.get_markerfacecolor())
        for name, line in lines.items()
        if name.endswith((" (α)", " (β)"))
    }
    assert set(looks) == {
        "SPO (α)", "SPO, 3 rounds on samples (α)", "SPO, extrapolated by 0.5 (α)",
        "DPO (β)", "IPO (β)", "RDPO (β)", "TDPO (β)", "SPPO (β)",
    }  # fmt: skip
    assert len(set(looks.values())) == 8
    plain = [look[:2] for name, look in looks.items() if "," not in name]
    assert len({colour for colour, _ in plain}) == len({marker for _, marker in plain}) == 6
    variants = [look for name, look in looks.items() if name.startswith("SPO")]
    assert len({look[0] for look in variants}) == 1
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(looks) < set(shown)
    assert "softmax(reward / τ), the most possible" in shown


def test_a_curve_is_joined_in_the_order_of_its_parameter(drawn):
    members = [member(number, "spo", value) for number, value in enumerate((2.0, 0.25, 1.0, 0.5))]
    figure, _ = drawn([*members, member(9, "dpo", 1.0)])
    line = next(line for line in figure.axes[0].get_lines() if line.get_label() == "SPO (α)")
    expected = [members[place]["exact"]["expected_reward"]["value"] for place in (1, 3, 2, 0)]
    assert line.get_xdata() == pytest.approx(expected)


@pytest.mark.parametrize(
    "members",
    [
        [member(0, "spo", 1.0)],
        [member(0, "dpo", 1.0), member(1, "ipo", 0.1)],
        [member(0, "spo", 0.0), member(1, "spo", 1.0)],
        [member(0, "spo", 1.0), member(1, "spo", 0.5, exact=False)],
        [member(0, "", 1.0, alpha=None, beta=None), member(1, "spo", 0.5)],
    ],
    ids=["one", "no SPO", "softness 0", "exact in part", "foreign"],
)
def test_small_and_odd_sweeps_are_drawn_too(drawn, members):
    _, svg = drawn(members, members[0]["name"])
    assert svg.startswith("<svg")
    assert "chosen" in svg


def test_where_samples_tell_theory_its_frontier_and_the_optima_stand_beside_the_models(drawn):
    points = [[0.0, 0.0], [0.3, 0.8], [1.0, 1.4]]
    trusted = {"effective_sample_size": 0.5, "optimum_kl": 0.4, "optimum_expected_reward": 0.9}
    theory = {name: {"value": value} for name, value in trusted.items()}
    members = [
        member(0, "spo", 1.0, exact=False, theory=theory, reward_frontier=points),
        member(1, "spo", 0.5, exact=False, theory={**theory, "effective_sample_size": {"value": 0.01}}),
    ]
    _, svg = drawn(members, "spo-0")
    assert "the most possible" in svg
    assert "the optimum of each one" in svg
    assert svg.count("Expected reward of samples") == 1
    _, svg = drawn([{**one, "theory": None, "reward_frontier": None} for one in members], "spo-0")
    assert "the most possible" not in svg
