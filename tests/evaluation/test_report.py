"""The report: one file, offline, model text harmless, useful with whatever a run has left."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from mas_hpc.data import trace_store
from mas_hpc.errors import DataError
from mas_hpc.evaluation.report import build
from mas_hpc.evaluation.report.build import build_report
from mas_hpc.evaluation.report.headline import compare, sentences
from mas_hpc.evaluation.report.plots import Bar, Panel, Series, bars, draw, panels, running_mean, ticks
from mas_hpc.evaluation.report.run_folder import MetricLine, Paired, Results, Row, read_run
from mas_hpc.types import Task, Trace, Turn

HOSTILE = "</script><img src=x onerror=alert(1)><!--<script>{{ 7 * 7 }}&lt;\ud800"
ROW = {
    "name": "team after AT-GRPO", "phase": "after", "temperature": 0.0, "accuracy": 0.75, "low": 0.301, "high": 0.954,
    "num_questions": 4, "tokens_per_question": 21.3, "right": [True, True, True, False],
    "verdicts": {"critic": {"recall_right": 0.9, "recall_wrong": 0.8, "balanced_accuracy": 0.85, "unreadable": 3}},
}  # fmt: skip
PAIRED = {"temperature": 0.0, "difference": 0.5, "low": 0.1, "high": 0.7, "p_value": 0.031, "wins": 6, "losses": 0}
TURN = Turn(
    id="q0/0.0", parent=None, task_id="q0", agent="solver", policy="shared", index=0, prompt_ids=(1, 5),
    prompt_spans=(("", 2),), completion_ids=(9, 2), behavior_logprobs=(-0.25, -0.5), text=HOSTILE, answer=HOSTILE,
    finish="stop", seed=2**60 + 1, committed=True, reward=1.0, credit=0.7,
)  # fmt: skip


def trace(index=0, **fields):
    task = Task(id=f"q{index}", question=f"{HOSTILE} {index}?", answer="42")
    return Trace(**{"task": task, "turns": (TURN,), "answer": "42", "reward": 1.0, "label": "train"} | fields)


class Page(HTMLParser):
    """What a browser would see: the tags, and the text of each element with an id or of a kind."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.data, self._open = [], [], [], None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = (tag, dict(attrs).get("id"))

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        (self.data if self._open == ("script", "data") else self.text).append(data)

    @property
    def traces(self):
        return json.loads("".join(self.data))["traces"]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "demo"
    trace_store.write(folder / "traces" / "train.jsonl", [trace(step=3)])
    (folder / "config.yaml").write_text(f"name: demo\nnote: '{HOSTILE[:-1]}'\n")
    (folder / "results.json").write_text(json.dumps({"rows": [ROW], "paired": [PAIRED]}))
    lines = [
        {"phase": "train", "step": step, "loss": 0.5, f"reward/{HOSTILE}": 0.1, "odd": None if step else 1e300}
        for step in range(50)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"phase": "tr')
    return folder


def test_hostile_text_from_any_file_stays_text(run):
    html = build_report(run).read_text(encoding="utf-8")
    page = Page(html)
    assert HOSTILE[:-1] not in html
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert page.traces[0]["turns"][0]["text"] == HOSTILE
    assert "49" not in "".join(page.text).split("note:")[1][:60]


def test_the_page_needs_nothing_from_elsewhere(run):
    html = build_report(run).read_text(encoding="utf-8")
    references = [a[k] for _, a in Page(html).tags for k in ("src", "href", "srcset", "action", "data") if k in a]
    assert all(reference.startswith("#") for reference in references)
    assert "http:" not in html and "https:" not in html and "@import" not in html and "url(" not in html
    assert "default-src 'none'" in html


def test_the_policy_of_the_page_allows_exactly_its_own_script(run):
    html = build_report(run).read_text(encoding="utf-8")
    script = html.split("<script>")[1].split("</script>")[0]
    digest = build.base64.b64encode(build.hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html
    assert "innerHTML" not in script and "outerHTML" not in script and "insertAdjacentHTML" not in script


def test_table_and_headline_are_readable_without_scripts(run):
    text = " ".join("".join(Page(build_report(run).read_text(encoding="utf-8")).text).split())
    for value in ("team after AT-GRPO", "75.0%", "30.1 - 95.4", "21.3", "90.0%", "80.0%", "85.0%", "Greedy"):
        assert value in text
    assert "training lifts the team's accuracy: +50.0 points (95% interval +10.0 to +70.0, p = 0.031" in text
    assert "Not finite, so not drawn: 49." in text
    assert "1 of 1 in train." in text


def test_a_trace_keeps_its_numbers(run):
    build_report(run)
    record = Page((run / "report.html").read_text(encoding="utf-8")).traces[0]
    turn = record["turns"][0]
    assert (record["set"], record["step"], record["expected"]) == ("train", 3, "42")
    assert (turn["logprob"], turn["tokens"], turn["promptTokens"], turn["credit"]) == (-0.75, 2, 2, 0.7)
    assert turn["seed"] == str(2**60 + 1)


@pytest.mark.parametrize("kept", ["traces", "results.json", "metrics.jsonl", "config.yaml"])
def test_any_one_part_is_enough(run, kept):
    for part in ("results.json", "metrics.jsonl", "config.yaml"):
        if part != kept:
            (run / part).unlink()
    if kept != "traces":
        (run / "traces" / "train.jsonl").unlink()
    assert "<h1>" in build_report(run).read_text(encoding="utf-8")


def test_a_folder_without_any_part_says_what_was_expected(tmp_path):
    with pytest.raises(DataError, match=r"not a run folder; expected at least one of config\.yaml, results\.json"):
        build_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("results.json", '{"rows": [{"name": "x"}]}', r"results\.json: rows\.0\.accuracy: Field required"),
        ("results.json", "{", r"results\.json: .*Invalid JSON"),
        ("metrics.jsonl", '{"phase": "train"}\n', r"metrics\.jsonl:1: KeyError\('step'\)"),
        ("metrics.jsonl", '{"phase": "train", "step": 1, "loss": "low"}\n', r"metrics\.jsonl:1: ValueError"),
        ("traces/train.jsonl", "{}\n", r"train\.jsonl:1: a trace has no field 'turns'"),
    ],
)
def test_a_broken_part_names_its_place(run, name, text, message):
    (run / name).write_text(text)
    with pytest.raises(DataError, match=message):
        build_report(run)


def test_traces_are_spread_over_the_file_and_thinned_to_the_budget(run, monkeypatch):
    trace_store.write(run / "traces" / "train.jsonl", [trace(step=step) for step in range(1, 100)])
    build_report(run)
    html = (run / "report.html").read_text(encoding="utf-8")
    assert [record["step"] for record in Page(html).traces][:4] == [3, 2, 5, 7]  # lines 0, 2, 5, 7 of 100
    assert "40 of 100 in train." in html
    size = len(json.dumps(Page(html).traces[0]))
    monkeypatch.setattr(build, "TRACE_BUDGET_BYTES", 11 * size)
    assert len(Page(build_report(run).read_text(encoding="utf-8")).traces) == 10


def rows(*accuracies):
    phases = ("before", "after", "control", "control")
    return tuple(
        Row(name=f"{phase} {right}", phase=phase, temperature=1.0, accuracy=right / 20,
            right=tuple(index < right for index in range(20)))
        for phase, right in zip(phases, accuracies, strict=False)
    )  # fmt: skip


def test_rows_are_compared_with_the_trained_team_on_the_same_questions():
    before, after, control = compare(rows(10, 16, 20))
    assert (after.difference, after.test, after.best) == (None, None, False)
    assert before.difference == pytest.approx(-0.3)
    assert before.test.p_value == pytest.approx(2 / 2**6)
    assert control.best and control.test.wins == 4
    other_questions = replace_right(rows(10, 16)[0], (True,))
    assert compare([other_questions, rows(10, 16)[1]])[0].test is None


def replace_right(row, right):
    return row.model_copy(update={"right": right})


@pytest.mark.parametrize(
    ("accuracies", "words"),
    [
        ((10, 16, 4, 6), "the team (80.0%) beats its best control, control 6 (30.0%): +50.0 points, p = 0.002"),
        (
            (10, 8, 4, 16),
            "the team (40.0%) loses to its best control, control 16 (80.0%): -40.0 points, p = 0.0078",
        ),
        (
            (10, 16, 15),
            "the team (80.0%) and its best control, control 15 (75.0%), cannot be told apart (+5.0 points",
        ),
    ],
)
def test_the_winner_is_named_only_when_it_is_clear(accuracies, words):
    (sentence,) = sentences(Results(rows=rows(*accuracies)))
    assert sentence.startswith(f"At temperature 1, {words}")


def test_a_greedy_team_is_compared_with_controls_sampled_at_another_temperature_and_tokens_are_named():
    team, control = rows(10, 16, 4)[1:]
    greedy = team.model_copy(update={"temperature": 0.0, "tokens_per_question": 30.0})
    (sentence,) = sentences(Results(rows=(greedy, control.model_copy(update={"tokens_per_question": 35.2}))))
    assert sentence.startswith(
        "Greedy, the team (80.0%, 30 tokens a question) beats its best control, control 4 at temperature 1 "
        "(20.0%, 35 tokens a question): +60.0 points"
    )


def test_an_unclear_gain_is_called_unclear():
    paired = Paired(temperature=0, difference=0.02, low=-0.03, high=0.07, p_value=0.5, wins=9, losses=7)
    assert sentences(Results(paired=(paired,)))[0].startswith("Greedy, training makes no clear difference to the team's")


def test_metrics_of_one_kind_share_a_chart_and_an_agent_keeps_its_colour():
    lines = [
        MetricLine(phase="train", step=s, values={"loss": 1.0, "reward/solver": 0.5, "reward/critic": 0.4,
                   "balanced_accuracy/critic": 0.9, "something/else": 2.0})
        for s in (0, 1)
    ]  # fmt: skip
    charts = {panel.title: panel for panel in panels(lines)}
    assert list(charts) == ["Loss", "Reward", "Balanced verdict accuracy", "something"]
    colours = [(series.name, series.colour) for series in charts["Reward"].series]
    assert colours == [("solver", 0), ("critic", 1)]
    assert charts["Balanced verdict accuracy"].series[0].colour == 1
    assert charts["Reward"].series[0].points == ((0, 0.5), (1, 0.5))


def test_a_chart_puts_values_where_they_belong():
    series = Series(name="", colour=0, points=((0, 0.0), (10, 1.0), (20, float("nan")), (30, 0.5)))
    svg = draw(Panel(title="x", share=True, series=(series,)))
    # x runs from 46 to 352 over steps 0 to 30, y from 168 (0) to 8 (1); the line breaks at what cannot be drawn
    assert re.findall(r'points="([^"]*)"', svg) == ["46.0,168.0 148.0,8.0"]
    assert 'cx="352.0" cy="88.0"' in svg


@pytest.mark.parametrize("points", [(), ((7, 3.0),), ((0, float("nan")),), ((0, 2.0), (1, 2.0)), ((0, 0.0), (9, -1e300))])
def test_a_chart_of_awkward_values_is_drawn(points):
    assert "nan" not in draw(Panel(title="x", share=False, series=(Series(name="a", colour=0, points=points),)))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.25, 0.5, 0.75, 1]), (0, 99, [0, 25, 50, 75, 100]), (-0.3, 0.4, [-0.4, -0.2, 0, 0.2, 0.4])],
)
def test_ticks_are_round_and_enclose_the_range(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_running_mean_is_centred_and_keeps_the_ends():
    points = tuple((i, float(i * i)) for i in range(6))  # half width 2, less at the ends
    assert running_mean(points)[0] == (0, 0.0)
    assert running_mean(points)[1] == (1, pytest.approx((0 + 1 + 4) / 3))
    assert running_mean(points)[2] == (2, pytest.approx((0 + 1 + 4 + 9 + 16) / 5))
    assert running_mean(points)[-1] == (5, 25.0)


def test_a_turn_without_numbers_is_shown_as_such(run):
    error = replace(
        TURN, completion_ids=(), behavior_logprobs=(), text="", finish="error", error="prompt too long", reward=None
    )
    trace_store.write(
        run / "traces" / "evaluation-after.jsonl", [trace(turns=(error,), answer=None, reward=None, label="after")]
    )
    records = Page(build_report(run).read_text(encoding="utf-8")).traces
    assert records[0]["set"] == "evaluation-after: after"
    assert (records[0]["turns"][0]["reward"], records[0]["turns"][0]["error"]) == (None, "prompt too long")


def test_credit_runs_are_shown_by_name_with_their_intervals(run):
    for name, half in (("outcome", 0.125), ("first_error-checks", None)):
        found = {"mean": 0.5, "standard_error": 0.0625, "half_width": half, "n": 8}
        summary = {
            "name": name, "method": name.partition("-")[0], "replays": 4, "traces": {"file": "rollout", "credited": 8},
            "agents": {"solver": {"message": found, "phi": {"mean": None, "n": 0}}},
        }  # fmt: skip
        file = run / "credit" / name / "summary.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(summary))
    (run / "credit" / "other.json").write_text("{}")
    shown = [(summary.name, summary.agents["solver"].message.half_width) for summary in read_run(run, 1).credit]
    assert shown == [("first_error-checks", None), ("outcome", 0.125)]
    html = build_report(run).read_text(encoding="utf-8")
    assert "<h3>outcome</h3>" in html and "<h3>first_error-checks</h3>" in html
    for half in (0.125, 0.0):
        assert bars("Credit per message", [Bar(name="solver", value=0.5, half=half)]) in html
