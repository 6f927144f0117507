"""The pages in a browser: what a reader can do with them, by keyboard too, on a phone, in the dark, printed;
that hostile text stays text, and that nothing is loaded or run but what a page brings."""

import dataclasses
import json
import random
import re

import numpy as np
import pytest
from softpref.data.config import DataConfig
from softpref.data.stage import run as make_dataset
from softpref.evaluation import compare
from softpref.evaluation.exact import ExactPrompt
from softpref.evaluation.report import write_report
from softpref.records.evaluation import DrawnText, PromptRecord, write_samples
from softpref.records.figures import Figure

from tests.evaluations import evaluation

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
LONG = "wordwithoutend" * 60
PROMPTS = [
    f"Tell me of {hero}." for hero in ("owls", "foxes", f"<b>{HOSTILE}", LONG, "hens \u202e \U0001f989 \x0b")
]
NAMES = ("spo-soft", "spo-sharp", "dpo " + HOSTILE)
REWARDS = {"spo-soft": 0.5, "spo-sharp": 10.25, NAMES[2]: 2.0}  # as texts, 10.25 would come before 2


def figure(value, spread=0.05):
    return {
        "value": value,
        "low": value - spread,
        "high": value + spread,
        "n": 40,
        "prompts": 5,
        "unit": "nats",
    }


def member(place, name):
    reward = REWARDS[name]
    return evaluation(
        name=name,
        method=name[:3],
        alpha=(2.0, 0.5, None)[place],
        beta=0.1,
        judge={"name": "expert", "description": f"an expert {HOSTILE}"},
        data_source="tales.jsonl",
        metrics={
            "expected_reward": figure(reward),
            "reference_expected_reward": figure(0.0),
            "win_rate": figure(0.6 + place / 10),
            "kl_sequence": figure(0.2 + place),
            "entropy_sequence": figure(5.0 - place),
            **({"good_diversity": figure(0.3)} if place else {}),
            "calibration_error": figure(0.02 + place / 100),
            "lm_eval/unheard_of/acc": figure(0.5),
        },
        by_prompt={"expected_reward": [reward] * len(PROMPTS), "win_rate": [0.6] * len(PROMPTS)},
        reliability=[
            {"confidence": 0.55 + i / 10, "share": 0.54 + i / 12, "low": 0.5, "high": 0.95, "pairs": 40}
            for i in range(4)
        ],
        warnings=[f"Only 5 held-out prompts {HOSTILE}"],
        settings={"confidence": 0.95, "samples_per_prompt": 3, "split": "test", "theory_samples": 10},
    )  # fmt: skip


def records(name):
    rng = random.Random(name)

    def drawn(prompt, who):
        for i in range(3):
            text = (
                f"{who} says {i}: the {rng.choice(['green', 'red'])} apple {HOSTILE} {LONG if i == 2 else ''}"
            )
            score = rng.gauss(0, 1) if i else 0.0
            heads = (2 * score, 0.0) if prompt == PROMPTS[1] else ()
            yield DrawnText(text, score, i == 2, 12, heads=heads)

    return [
        PromptRecord(prompt, list(drawn(prompt, "reference")), list(drawn(prompt, name)))
        for prompt in PROMPTS
    ]


@pytest.fixture(scope="session")
def pages(tmp_path_factory):
    """Files of the three pages, with hostile text wherever it can get in."""
    root = tmp_path_factory.mktemp("pages")
    members = [member(place, name) for place, name in enumerate(NAMES)]
    folders = []
    for place, one in enumerate(members):
        folder = root / str(place)
        folder.mkdir()
        one.write(folder)
        write_samples(folder, records(one.name))
        folders.append(str(folder))
    compare.run(folders, str(root / "comparison"), required=False)
    logps = np.log(np.full(4, 0.25))
    exact = [ExactPrompt(np.array([0.0, 1.0, 2.0, 3.0]), logps, logps, logps, 1.0)]
    known = ("entropy", "optimum_entropy", "expected_reward", "kl_optimum_to_policy", "mass_on_set")
    whole = dataclasses.replace(members[2], exact={name: Figure(1.0, 0.9, 1.1, 4, 1) for name in known})
    write_report(root / "evaluation.html", whole, records(NAMES[2]), exact)
    rows = [
        {"prompt": f"{HOSTILE} {i}?", "chosen": f"{LONG} {i}", "rejected": f"b {HOSTILE} {i}", HOSTILE: 1}
        for i in range(40)
    ]  # fmt: skip
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_dataset(DataConfig(source=str(root / "rows.jsonl")), str(root / "data"))
    return {
        "comparison": root / "comparison/report.html",
        "evaluation": root / "evaluation.html",
        "dataset": root / "data/page.html",
    }


class Seen(list):
    """What a page asked for, complained of, or was refused."""

    def watch(self, page):
        page.on("console", lambda message: self.append((message.type, message.text)))
        page.on("pageerror", lambda error: self.append(("error", str(error))))
        page.on("request", lambda request: self.append(("request", request.url)))
        page.on("dialog", lambda dialog: self.append(("dialog", dialog.message)))


@pytest.fixture(scope="session")
def opened(browser, pages):
    """Opens a page once, at desktop width and in the light; its complaints are kept with it."""
    kept = {}

    def open_page(name):
        if name not in kept:
            page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
            page.set_default_timeout(60_000)
            seen = Seen()
            seen.watch(page)
            page.goto(pages[name].as_uri())
            if name != "dataset":
                page.wait_for_selector("html.charted")
            kept[name] = page, seen
        return kept[name]

    yield open_page
    for page, _ in kept.values():
        page.close()


@pytest.fixture
def comparison(opened):
    page, _ = opened("comparison")
    page.emulate_media(media="screen", color_scheme="light")
    page.set_viewport_size({"width": 1280, "height": 900})
    return page


def column(page, table, number):
    """What the shown rows of a table have in a column."""
    cells = page.get_by_role("table", name=table).locator(f"tbody tr:visible > :nth-child({number})")
    return [text.split("\n")[0] for text in cells.all_inner_texts()]


# Safe


@pytest.mark.parametrize("name", ["comparison", "evaluation", "dataset"])
def test_a_page_asks_for_nothing_and_complains_of_nothing(opened, pages, name):
    _, seen = opened(name)
    assert seen == [("request", pages[name].as_uri())]


@pytest.mark.parametrize("name", ["comparison", "evaluation", "dataset"])
def test_hostile_text_is_shown_and_does_nothing(opened, name):
    page, _ = opened(name)
    assert HOSTILE in page.inner_text("body")
    assert page.evaluate("window.hacked") is None
    assert page.locator("main img, main script").count() == 0


def test_the_policy_refuses_scripts_and_addresses_that_the_page_did_not_bring(browser, pages):
    page = browser.new_page()
    page.goto(pages["dataset"].as_uri())
    found = page.evaluate(
        """async () => {
            const refused = [];
            addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
            const script = document.createElement("script");
            script.textContent = "window.hacked = 1";
            document.body.append(script);
            document.body.setAttribute("onclick", "window.hacked = 1");
            document.body.click();
            await fetch("data:,x").catch(() => 0);
            await new Promise((done) => setTimeout(done, 100));
            return [window.hacked ?? null, refused.sort()];
        }"""
    )
    page.close()
    assert found == [None, ["connect-src", "script-src-attr", "script-src-elem"]]


# Tables


def test_the_table_sorts_by_value_with_the_unknown_last_and_says_so(comparison):
    table = comparison.get_by_role("table", name="Figures of each model")
    header = table.get_by_role("columnheader", name="Expected reward")
    header.get_by_role("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert [name[:9] for name in column(comparison, "Figures of each model", 1)] == [
        "spo-soft",
        "dpo </scr",
        "spo-sharp",
    ]
    header.get_by_role("button").press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert column(comparison, "Figures of each model", 1)[0] == "spo-sharp"
    for wanted in (["0.5", "2", "–"], ["2", "0.5", "–"]):
        table.get_by_role("columnheader", name="α").get_by_role("button").press("Space")
        assert column(comparison, "Figures of each model", 2) == wanted
    assert header.get_attribute("aria-sort") == "none"


def test_the_table_shows_the_rows_that_hold_what_was_typed(comparison):
    field = comparison.get_by_label("Filter models")
    field.fill("SHARP")
    assert column(comparison, "Figures of each model", 1) == ["spo-sharp"]
    assert comparison.get_by_text("1 of 3", exact=True).is_visible()
    field.fill("")
    assert len(column(comparison, "Figures of each model", 1)) == 3


# Charts


def shown(page, selector):
    """Titles of a chart's axes, and of each trace its name and points."""
    return page.evaluate(
        """(selector) => {
            const { layout, data } = document.querySelector(selector + " .canvas");
            const traces = data.map(({ name, x, y }) => [name ?? "", x, y]);
            return [layout.xaxis.title.text, layout.yaxis.title.text, traces];
        }""",
        selector,
    )


def test_the_reader_chooses_the_axes_of_the_frontier(comparison):
    x, y, traces = shown(comparison, "#frontier-chart")
    assert (x, y) == ("Expected reward, nats", "Entropy, nats")
    assert ["SPO (α)", [10.25, 0.5], [4.0, 5.0]] in traces
    comparison.get_by_role("button", name="Win rate for KL").press("Enter")
    x, y, traces = shown(comparison, "#frontier-chart")
    assert (x, y) == ("KL to the reference, nats", "Win rate, nats")
    assert ["reference", [0], [0.5]] in traces
    comparison.get_by_label("Up").select_option("Variety among good answers")
    _, y, traces = shown(comparison, "#frontier-chart")
    assert y.startswith("Variety among good answers")
    assert ["SPO (α)", [1.2], [0.3]] in traces  # spo-soft has no such figure
    assert "Without these figures: spo-soft" in comparison.inner_text("#frontier-chart")
    pressed = comparison.locator("#frontier-chart [aria-pressed=true]")
    assert pressed.count() == 0
    comparison.get_by_role("button", name="Entropy for reward").click()
    assert pressed.all_inner_texts() == ["Entropy for reward, of samples"]


def test_pointing_at_a_model_tells_its_figures(comparison):
    comparison.get_by_role("button", name="Entropy for reward").click()
    comparison.locator("#frontier-chart").scroll_into_view_if_needed()
    place = comparison.evaluate(
        """() => {
            const chart = document.querySelector("#frontier-chart .canvas");
            const { xaxis, yaxis } = chart._fullLayout;
            const box = chart.getBoundingClientRect();
            return [box.x + xaxis._offset + xaxis.c2p(2), box.y + yaxis._offset + yaxis.c2p(3)];
        }"""
    )
    comparison.mouse.move(*place)
    label = comparison.wait_for_selector("#frontier-chart .hovertext")
    said = label.text_content()
    assert "dpo </script><script>window.hacked" in said
    assert "Expected reward, nats: 2.000 [1.950, 2.050]" in said


def test_every_model_is_on_the_reliability_diagram(comparison):
    traces = shown(comparison, "#reliability-chart")[2]
    assert [name for name, *_ in traces][:3] == ["calibrated", "spo-sharp", "spo-soft"]
    assert traces[1][2] == [bin.share for bin in member(1, "spo-sharp").reliability]


def test_charts_follow_the_colour_scheme(comparison):
    def ink():
        return comparison.evaluate("document.querySelector('#frontier-chart .canvas').layout.font.color")

    light = ink()
    comparison.emulate_media(color_scheme="dark")
    comparison.wait_for_function(
        "light => document.querySelector('#frontier-chart .canvas').layout.font.color !== light", arg=light
    )
    assert ink() == comparison.evaluate("getComputedStyle(document.body).color")


# Samples


def texts(page):
    return page.locator("#browser .sample .text").all_inner_texts()


def test_models_stand_side_by_side_and_what_differs_is_marked(comparison):
    comparison.get_by_label("Left").select_option("spo-soft")
    comparison.get_by_label("Right").select_option("spo-sharp")
    found = texts(comparison)
    assert [text.partition(" says")[0] for text in found] == ["spo-soft", "spo-sharp"] * 3
    marks = comparison.locator("#browser .sample").nth(0).locator("mark").all_inner_texts()
    assert marks[0] == "spo-soft"
    assert "says" not in " ".join(marks)
    comparison.get_by_label("mark differences").uncheck()
    assert comparison.locator("#browser mark").count() == 0
    assert texts(comparison) == found
    comparison.get_by_label("mark differences").check()
    left = comparison.locator("#browser .sample .score").all_inner_texts()[0]
    assert left == "score 0.00 · 12 tokens"


def test_a_sample_has_the_score_that_nine_of_ten_heads_exceed(comparison):
    first = comparison.get_by_label("Left").locator("option").nth(1).inner_text()  # whose reference is shown
    drawn = [*records(first)[1].reference, *(text for name in NAMES for text in records(name)[1].policy)]
    middle = np.mean([text.score for text in drawn])
    sure = {text.text: np.percentile([2 * (text.score - middle), 0], 10) + middle for text in drawn}
    comparison.get_by_label("Prompt", exact=True).select_option("1")
    told = comparison.locator("#browser .sample .score").all_inner_texts()
    assert len(told) == 6
    for text, said in zip(texts(comparison), told, strict=True):
        assert f", surely above {sure[text]:.2f} ·" in said
    assert comparison.get_by_text("Surely above: what nine of ten heads of the judge exceed").is_visible()
    comparison.get_by_label("Prompt", exact=True).select_option("0")


def test_best_first_sorts_each_side_by_score(comparison):
    comparison.get_by_label("best first").check()
    told = comparison.locator("#browser .sample .score").all_inner_texts()
    scores = [float(re.match(r"score ([-0-9.]+)", text)[1]) for text in told]
    for side in (scores[::2], scores[1::2]):
        assert side == sorted(side, reverse=True)
    comparison.get_by_label("best first").uncheck()


def test_search_finds_prompts_and_samples(comparison):
    search = comparison.get_by_label("Search prompts and samples")
    search.fill("FOXES")
    assert comparison.inner_text("#browser .prompt") == PROMPTS[1]
    assert comparison.get_by_text("1 of 5 prompts").is_visible()
    search.fill("no such words")
    assert "No prompt or sample" in comparison.inner_text("#browser .view")
    search.fill("")
    assert comparison.inner_text("#browser .prompt") == PROMPTS[0]


def test_prompts_are_walked_through_by_keyboard(comparison):
    ahead = comparison.get_by_role("button", name="Next prompt")
    assert comparison.get_by_role("button", name="Previous prompt").is_disabled()
    for prompt in PROMPTS[1:4]:
        ahead.press("Enter")
        assert comparison.inner_text("#browser .prompt") == prompt
    ahead.press("Enter")
    assert ahead.is_disabled()
    comparison.get_by_label("Prompt", exact=True).select_option("0")
    assert comparison.inner_text("#browser .prompt") == PROMPTS[0]


def test_prompts_are_ordered_by_what_they_gained(opened):
    page, _ = opened("evaluation")

    def mean(drawn):
        return sum(sample.score for sample in drawn) / len(drawn)

    gains = {one.prompt: mean(one.policy) - mean(one.reference) for one in records(NAMES[2])}
    for order, best in (("largest gain first", max), ("largest loss first", min)):
        page.get_by_label("Order of prompts").select_option(order)
        assert page.inner_text("#browser .prompt").split() == best(gains, key=gains.get).split()
    page.get_by_label("Order of prompts").select_option("as drawn")


def test_figures_stand_beside_the_references_and_unknown_ones_are_shown_too(opened):
    page, _ = opened("evaluation")
    table = page.get_by_role("table", name="Figures of held-out rows and samples")
    cells = table.get_by_role("row", name="Expected reward").get_by_role("cell").all_inner_texts()
    assert [cell.split("\n")[0] for cell in cells[:3]] == ["2.000", "0.000", "nats"]
    assert page.get_by_role("rowheader", name="lm_eval/unheard_of/acc").is_visible()
    assert "better than its reference" in page.inner_text(".verdict")


# For everyone


@pytest.mark.parametrize("name", ["comparison", "evaluation", "dataset"])
def test_no_barrier_is_found_in_light_and_dark_on_desktop_and_phone(opened, name):
    from axe_playwright_python.sync_playwright import Axe

    page, _ = opened(name)
    for width, scheme in ((1280, "light"), (390, "dark"), (390, "light"), (1280, "dark")):
        page.emulate_media(media="screen", color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 844})
        found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
        grave = [
            (one["id"], [node["html"][:200] for node in one["nodes"]][:3])
            for one in found
            if one["impact"] in ("serious", "critical")
        ]
        assert not grave, (width, scheme)
        # and nothing but tables, within their own frame, is wider than the screen
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_without_script_tables_verdict_drawings_and_samples_remain(browser, pages):
    page = browser.new_page(java_script_enabled=False)
    for name, drawings in (("comparison", 2), ("evaluation", 4)):
        page.goto(pages[name].as_uri())
        assert page.locator("svg.chart:visible").count() == drawings
        assert page.locator(".verdict").is_visible()
        assert page.locator("table:visible").count() >= 2
        assert page.locator("button:visible, select:visible, input:visible").count() == 0
        assert page.locator(".sample:visible").first.inner_text().startswith("reference says 0")
    page.close()


def test_on_paper_drawings_take_the_place_of_charts_and_controls_are_gone(comparison):
    comparison.evaluate(
        """addEventListener("beforeprint", () => {
            window.unfolded = document.querySelector("details.drawing").open;
        })"""
    )
    assert comparison.pdf()[:4] == b"%PDF"
    assert comparison.evaluate("window.unfolded")
    comparison.emulate_media(media="print", color_scheme="dark")
    assert comparison.locator(".canvas:visible, .controls:visible, nav:visible").count() == 0
    assert comparison.locator("div.drawing svg").is_visible()
    assert comparison.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
