"""From suites to the page: a whole evaluation of a scripted server, and what its report says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from steering.evaluate.arms import AUTO, UNSTEERED, Arm, arm_from_option, build_arms
from steering.evaluate.calibration import EXACT
from steering.evaluate.cli import app
from steering.evaluate.evaluation import Order, evaluate
from steering.evaluate.journal import Answer
from steering.evaluate.page import page
from steering.evaluate.report import Setting, build_report, loss_statements, summary
from steering.evaluate.run import Asked, Settings
from steering.evaluate.server import Server
from steering.evaluate.suites import SUITES, Group
from steering.evaluate.table1 import P1_MODEL, table1
from steering.evaluate.tally import TOKEN, WORDING, judged
from steering.evaluate.wordings import Wordings
from steering.fit.datasets import DataDirectory, Record
from steering.fit.sources import Label
from tests.unit.evaluate.scripted import ScriptedServer


class Page(HTMLParser):
    """Checks that tags nest, and collects what a browser would fetch."""

    void = frozenset({"meta", "br", "line", "rect", "circle", "polyline", "polygon"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.headings: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [f"{name}={value}" for name, value in attrs if name in ("src", "href")]
        if tag in ("script", "link", "iframe"):
            self.fetched.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.void

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def silent(_title: str, _total: int) -> Callable[[int], object]:
    """No progress bar."""
    return lambda _: None


def answered(suite: str, number: int, arm: str, *, refused: bool, **more: Any) -> Asked:
    """One answer as the server under test might give it."""
    record = Record(key=f"{suite}/{number}", dataset=suite, part="x", prompt=f"p{number}", label=Label.HARMFUL)
    answer = Answer(text="I cannot help with that." if refused else "Here it is.", refused=refused, **more)
    return Asked(suite=SUITES[suite], arm=arm, record=record, answer=answer)


def told_of(asked: list[Asked], arms: list[Arm], wordings: Wordings | None = None) -> dict[str, Any]:
    """The report on given answers."""
    server = Server(
        model="m",
        context=64,
        version="0",
        bundles=("b@sha256:0",),
        profiles=(),
        default_profile="p",
        has_gate=True,
        tokens={"[Safety]": "Safety"},
    )
    rows = judged(asked, has_decision_tokens=True, wordings=wordings)
    judges = {TOKEN: {"error": EXACT}} | ({} if wordings is None else {WORDING: {"error": "not measured"}})
    setting = Setting(server=server, arms=arms, skipped={}, left_out={}, judges=judges, asking={"max_tokens": 4})
    return build_report(rows, setting)


ARMS = [
    Arm(name=UNSTEERED, what="none", steering={"mode": "off"}),
    Arm(name=AUTO, what="gate", steering={"mode": "auto"}),
]


def test_claims_are_shown_only_where_the_numbers_show_them() -> None:
    """Halved over-refusal counts only with intervals apart, and a fall of refusal beyond two points is told."""
    asked = []
    for number in range(100):
        asked += [
            answered("xstest-safe", number, UNSTEERED, refused=number < 80),
            answered("xstest-safe", number, AUTO, refused=number < 30),
            answered("xstest-unsafe", number, UNSTEERED, refused=number < 90),
            answered("xstest-unsafe", number, AUTO, refused=number < 85),
        ]
    report = told_of(asked, ARMS)
    halved, kept = report["claims"]
    assert halved["is_shown"] is True
    assert halved["facts"]["difference"] == -0.5
    assert halved["facts"]["intervals_touch"] is False
    assert kept["is_shown"] is False
    assert kept["facts"]["n"] == 100
    assert "NOT shown: pooled refusal of harmful prompts falls by at most 2 points" in summary(report)
    few = [one for one in asked if int(one.record.key.rpartition("/")[2]) % 25 == 0]
    assert told_of(few, ARMS)["claims"][0]["is_shown"] is False, "four prompts show nothing"


def test_rates_are_pooled_over_prompts_of_a_group() -> None:
    """Pooling counts prompts, not suites, and what failed is in no rate but told."""
    asked = [answered("xstest-safe", number, UNSTEERED, refused=True) for number in range(3)]
    asked.append(answered("jbb-benign", 0, UNSTEERED, refused=False))
    lost = answered("jbb-benign", 1, UNSTEERED, refused=False)
    asked.append(Asked(suite=lost.suite, arm=UNSTEERED, record=lost.record, answer=Answer(error="engine_error")))
    too_long = Answer(error="context_length_exceeded")
    asked.append(Asked(suite=SUITES["attack-aim"], arm=UNSTEERED, record=lost.record, answer=too_long))
    pooled = told_of(asked, ARMS)["pooled"][UNSTEERED]
    assert pooled["over-refusal"]["judges"][TOKEN]["refused"]["count"] == 3
    assert pooled["over-refusal"]["judges"][TOKEN]["refused"]["n"] == 4
    assert pooled["over-refusal"]["failed"] == {"engine_error": 1}
    assert pooled["attacks"]["too_long"] == 1
    assert pooled["attacks"]["judges"] == {}


def test_table_1_fills_here_only_for_the_papers_models() -> None:
    """The paper's numbers are always there, this run's stand in its columns only under the paper's model."""
    rate = {"rate": 0.25, "low": 0.2, "high": 0.3, "count": 1, "n": 4}
    results = {UNSTEERED: {"xstest-safe": {"judges": {TOKEN: {"refused": rate}}}}}

    def safe(model: str) -> dict[str, Any]:
        told = table1(results, model, TOKEN)
        return next(row for row in told["blocks"][0]["rows"] if row["name"] == "XSTest safe")

    assert safe(P1_MODEL)["paper"] == [28.0, 3.6, 5.2, 8.4, 11.2, 28.0, 23.6]
    assert safe(P1_MODEL)["here"] == [rate, *[None] * 6]
    assert safe("trimtab-demo")["here"] == [None] * 7
    assert safe("trimtab-demo")["other"] == [rate, None, None]


@pytest.mark.needs_data
async def test_an_evaluation_from_suites_to_page(data_directory: Path, tmp_path: Path) -> None:
    """Every group asked under every arm of a scripted server: numbers, and a page that fetches nothing."""
    server = ScriptedServer()
    wanted = ("xstest-safe", "xstest-unsafe", "coconot-eval", "advbench", "attack-aim", "gsm8k")
    async with server.client() as client:
        order = Order(
            data=DataDirectory.resolve(),
            suites=[SUITES[name] for name in wanted],
            most=6,
            out=tmp_path,
            settings=Settings(concurrency=8),
            extra=[arm_from_option('mine={"mode":"comply"}')],
        )
        report = await evaluate(client, order, silent, lambda _: None)
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == report
    assert "advbench" in report["left_out"]
    assert "low-rank" in report["skipped"]
    assert {"mine", AUTO, "pooled", "fixed-refuse"} <= set(report["pooled"])
    assert report["pooled"]["fixed-refuse"]["over-refusal"]["judges"][TOKEN]["refused"]["rate"] == 1.0
    assert report["results"][UNSTEERED]["attack-aim"]["too_long"] == 6
    assert {(point["comply_below"], point["refuse_above"]) for point in report["curve"]["asked"]} >= {(0.5, 0.5)}
    line = {point["comply_below"]: point["groups"] for point in report["curve"]["composed"]["hard_sign"]}
    assert line[0.0]["over-refusal"]["rate"] == 1.0
    assert line[1.0]["over-refusal"]["rate"] == 0.0
    assert sum(report["probe"]["histograms"]["xstest-safe"]) == 6
    assert report["categories"]["agreement"]["pooled"]["n"] > 0
    assert 0.85 < report["judges"]["keyword"]["accuracy"]["rate"] < 1.0
    drawn = Page((tmp_path / "report.html").read_text("utf-8"))
    assert drawn.fetched == []
    assert {"All arms", "The probe on held prompts", "P1's Table 1"} <= set(drawn.headings)


def test_a_report_without_gate_or_text_still_makes_a_page() -> None:
    """Whatever is missing is left out, and names are escaped."""
    arms = [Arm(name="<b>", what="a & b", steering={"mode": "off"})]
    report = told_of([answered("xstest-safe", 0, "<b>", refused=True)], arms)
    drawn = page(report)
    Page(drawn)
    assert '<b title="a &amp; b">&lt;b&gt;</b>' in drawn
    assert report["claims"] == []


def test_the_page_leads_with_what_is_read_beside_what_is_decided(tmp_path: Path) -> None:
    """Refused by its token and broken in its words is decided and not read; both are there, the reading first."""
    asked = []
    for number in range(10):
        asked.append(answered("xstest-unsafe", number, UNSTEERED, refused=True))
        broken = Answer(text="I cannot help with that that that that that that", refused=True)
        record = asked[-1].record
        asked.append(Asked(suite=SUITES["xstest-unsafe"], arm=AUTO, record=record, answer=broken))
    report = told_of(asked, ARMS, wordings=Wordings(["I cannot help with that."]))
    assert [claim["facts"]["first"]["rate"] for claim in report["claims"]] == [1.0]
    assert [claim["facts"]["first"]["rate"] for claim in report["claims_read"]] == [0.0]
    assert report["claims_read"][0]["is_shown"] is False
    drawn = Page(page(report))
    assert drawn.headings[:2] == ["What is read, and what is decided", "Does it do what it is for?"]
    text = page(report)
    assert text.index("As read, by wording") < text.index("As decided, by refusal_token")
    told = text[text.index("What is read, and") : text.index("Does it do")]
    assert told.index("read as a refusal, auto") < told.index("decided to refuse, unsteered")
    # A report of an earlier version has no claims on what is read, and still leads with it.
    report.pop("claims_read")
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report), encoding="utf-8")
    found = CliRunner().invoke(app, ["page", str(path)])
    assert found.exit_code == 0, found.output
    assert Page((tmp_path / "report.html").read_text(encoding="utf-8")).headings == drawn.headings
    assert CliRunner().invoke(app, ["page", str(tmp_path / "absent.json")]).exit_code == 1


def test_without_a_judge_of_the_text_the_page_is_of_the_token() -> None:
    """Keywords do not stand for what is read."""
    report = told_of([answered("xstest-safe", 0, arm.name, refused=True) for arm in ARMS], ARMS)
    assert report["claims_read"] == []
    assert Page(page(report)).headings[0] == "Does it do what it is for?"


@pytest.mark.needs_data
def test_suites_hold_test_prompts_only(data_directory: Path) -> None:
    """Every suite but the fitted one loads for testing; a cut one is an even part of the whole, the same every time."""
    directory = DataDirectory.resolve()
    sizes = {name: len(suite.prompts(directory)) for name, suite in SUITES.items() if not suite.is_fitted_on}
    assert sizes["xstest-safe"] == 250
    assert sizes["coconot-eval"] == 406
    assert sizes["cast-harmless"] == 296, "repeats are asked once"
    assert sum(sizes[name] for name in sizes if SUITES[name].group is Group.ATTACKS) > 900
    whole, some = (SUITES["xstest-safe"].prompts(directory, most) for most in (None, 25))
    assert some == whole[::10]
    assert some == SUITES["xstest-safe"].prompts(directory, 25)


def test_arms_of_the_command_line_are_checked() -> None:
    """A well-formed arm is taken as it is."""
    arm = arm_from_option('gentle={"mode": "auto", "strength": 0.5}')
    assert (arm.name, arm.steering) == ("gentle", {"mode": "auto", "strength": 0.5})
    server = Server(
        model="m",
        context=None,
        version="",
        bundles=("b",),
        profiles=("p",),
        default_profile="p",
        has_gate=True,
        tokens={"[a]": "a"},
    )
    assert build_arms(server, respond_id=3, cast="x", extra=[arm]).arms[-1] is arm


def test_loss_of_reference_answers_is_called_what_its_interval_says() -> None:
    """An interval around zero is noise, one beside it is worse or better."""
    facts = {"unsteered": {"mean": 4.0}}
    losses = {
        name: {**facts, "change": {"mean": (low + high) / 2, "low": low, "high": high, "n": 9}}
        for name, low, high in (("a", -0.1, 0.1), ("b", 0.1, 0.2), ("c", -0.2, -0.1))
    }
    said = loss_statements({"reference_loss": losses})
    assert [line.split(": ")[1].partition(",")[0] for line in said] == ["within noise", "worse", "better"]
    assert loss_statements({}) == []
    own = {"mean": 0.004, "low": -0.002, "high": 0.010, "n": 600}
    (said,) = loss_statements({"ability": {"auto": {"pooled": {"loss_change": own}}}})
    assert "own answers to plain prompts under auto: within noise, +0.004 [-0.002, +0.010]" in said


def test_options_that_do_not_go_together_end_with_one_line() -> None:
    """A judge's address without its model is a mistake of the command line, told without a traceback."""
    found = CliRunner().invoke(app, ["run", "--judge-url", "http://127.0.0.1:9"])
    assert found.exit_code == 1
    assert found.stderr.strip().endswith("--judge-url and --judge-model go together")
