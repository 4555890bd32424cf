"""``flexsp report`` on plans: the page in a browser, the pictures, and the trace for Perfetto."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib import image

from megatron_flexsp.cli import flexsp
from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner import load_cost_model, plan
from megatron_flexsp.planner.plans_file import planned_line

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
COSTS = load_cost_model("gpt-7b-192k")


def run(*arguments):
    return CliRunner().invoke(flexsp, ["report", *map(str, arguments)], catch_exceptions=False)


def batches():
    generator = np.random.default_rng(5)
    return [generator.lognormal(7, 1.3, 40).astype(int) + 1 for _ in range(3)]


@pytest.fixture
def plans(tmp_path):
    """Three batches on 8 ranks, static and nested, as ``flexsp simulate --output`` writes them."""
    path = tmp_path / "plans.jsonl"
    lines = [
        planned_line(plan(lengths, COSTS, 8, schedule=strategy), lengths, COSTS, strategy=strategy, batch=number)
        for number, lengths in enumerate(batches())
        for strategy in ("static", "nested")
    ]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_page_draws_all_its_pictures_in_a_browser_without_a_network(plans, tmp_path):
    page = tmp_path / "report.html"
    result = run(plans, "--output", page, "--strategy", "nested", "--step", 1)
    assert result.exit_code == 0, result.output
    window = ("--window-size=1280,3000", "--virtual-time-budget=5000")
    offline = "--proxy-server=127.0.0.1:9"
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *window, offline, "--dump-dom", f"file://{page}"],
        capture_output=True,
        text=True,
        timeout=90,
    )
    drawn = done.stdout.split("<body>")[-1]
    lengths = batches()[1]
    made = plan(lengths, COSTS, 8)
    bars = sum(item.degree for item in made.micro_batches)
    before, after = drawn.split('id="seconds"')
    assert before.count('<g class="point">') == bars  # a bar for each micro-batch on each of its ranks
    assert after.count('<g class="trace scatter') == 6
    assert "plans.jsonl: nested" in drawn
    assert "the file also has static" in drawn


def test_a_missing_package_is_named(plans, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "megatron_flexsp.report.images", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(FlexSPError, match="draws with matplotlib: pip install"):
        run(plans, "--strategy", "nested", "--png", tmp_path)


def test_pictures_and_a_trace_for_perfetto(plans, tmp_path):
    chrome, folder = tmp_path / "chrome.json", tmp_path / "png"
    options = ("--output", tmp_path / "report.html", "--chrome-trace", chrome, "--png", folder)
    result = run(plans, "--strategy", "nested", *options)
    assert result.exit_code == 0, result.output
    for name in ("timeline", "lengths", "seconds"):
        assert image.imread(folder / f"{name}.png")[..., :3].std() > 0.05, f"{name}.png is blank"
    events = [event for event in json.loads(chrome.read_text())["traceEvents"] if event["ph"] == "X"]
    lengths = batches()
    made = [plan(batch, COSTS, 8) for batch in lengths]
    assert len(events) == sum(item.degree for each in made for item in each.micro_batches)
    assert max(event["ts"] + event["dur"] for event in events) == pytest.approx(
        1e6 * sum(each.predicted_seconds for each in made), rel=1e-6
    )
    for number, batch in enumerate(lengths):
        held = [event["args"] for event in events if event["args"]["step"] == number]
        once = {item["micro_batch"]: item["lengths"] for item in held}
        assert sorted(tokens for found in once.values() for tokens in found) == sorted(batch.tolist())


def test_the_fastest_of_several_strategies_is_shown(plans, tmp_path):
    result = run(plans, "--output", tmp_path / "report.html")
    assert "shows nested; the file also has static" in result.stderr


def test_refuses_what_it_cannot_show(plans, tmp_path):
    lines = plans.read_text().splitlines()
    bare = json.loads(lines[0])
    del bare["lengths"]
    foreign = json.loads(lines[0])
    foreign["lengths"] = foreign["lengths"][:-1]
    for name, text, words in (
        ("empty", "", "holds no plans"),
        ("cut", plans.read_text()[:-30], "line 6: not JSON"),
        ("bare", json.dumps(bare), 'without "lengths"'),
        ("foreign", json.dumps(foreign), "belong to different plans"),
        ("mixed", lines[1] + "\n" + planned_line(plan([5], COSTS, 4), [5], COSTS, strategy="nested"), "split the file"),
    ):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(text)
        with pytest.raises(FlexSPError, match=f"{name}.jsonl.*{words}"):
            run(path, "--output", tmp_path / "report.html")
    for options, words in (
        (("--step", 7), "has no step 7; it has 0 to 2"),
        (("--strategy", "lockstep"), "no plans of lockstep; it holds static, nested"),
        (("--output", tmp_path / "nowhere" / "report.html"), "cannot write"),
    ):
        with pytest.raises(FlexSPError, match=words):
            run(plans, *options)
