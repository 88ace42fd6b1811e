"""What a person reads: one page that needs nothing, and says what the record says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fuzz import report
from fuzz.campaign import EXIT, Campaign, Settings, summary
from fuzz.files import write_json
from fuzz.tally import Tally


def campaign(out: Path, target: str, cases: int) -> tuple[dict, Tally]:
    settings = Settings(target, out, max_examples=cases, seed=1, max_failures=1)
    ran = Campaign(settings)
    whole = summary(settings, ran.tally, ran.run(), ran.ledger, ran.trouble)
    write_json(out / "summary.json", whole)
    report.write(out, whole, ran.tally)
    return whole, ran.tally


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("failed")
    kills = {"mutants": [{"id": "a<b", "group": "masking", "cases": 3, "killed": True}], "limit": 300,
             "usual": {"allclose": 0}, "alarms": [], "alarm_cases": 10}  # fmt: skip
    write_json(out / "kills.json", kills)
    return out, campaign(out, "mutant:causal_plus1", 25)[0]


class Page(HTMLParser):
    """Tags in balance, and every address the page asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.asked: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.asked += [value for name, value in attrs if name in ("src", "href") and value]
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_for_nothing(failed) -> None:
    page = Page()
    page.feed((failed[0] / "report.html").read_text())
    assert page.open == []
    assert page.asked == []
    assert "<script" not in (failed[0] / "report.html").read_text()


def test_the_page_shows_the_failure_its_script_and_the_plots(failed) -> None:
    out, whole = failed
    text = (out / "report.html").read_text()
    script = (out / "failures" / whole["failures"][0]["id"] / "reproduce.py").read_text()
    assert "Behaves like causal_plus1" in text
    assert script.splitlines()[2] in text
    assert text.count("<svg") >= 10
    assert "a&lt;b: killed after 3 cases" in text


def test_markdown_and_json_say_the_same(failed) -> None:
    out, whole = failed
    text = (out / "report.md").read_text()
    assert text.startswith("# mutant:causal_plus1: fails\n")
    assert f"| cases failed | {whole['failed']:,} |" in text
    assert json.loads((out / "summary.json").read_text()) == whole
    assert whole["exit"] == EXIT["fail"]


def test_a_clean_campaign_and_an_empty_one_have_pages_too(tmp_path: Path) -> None:
    whole, _ = campaign(tmp_path / "clean", "model", 20)
    assert whole["status"] == "pass"
    assert "no failure found" in (tmp_path / "clean/report.html").read_text()
    settings = Settings("model", tmp_path / "empty")
    empty = summary(settings, Tally(), "nothing", Campaign(settings).ledger, None)
    report.write(tmp_path / "empty", empty, Tally())
    assert "nothing verified" in (tmp_path / "empty/report.html").read_text()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium (Debian package chromium)")
def test_a_browser_shows_the_page(failed, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,2400",
               f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}"]  # fmt: skip
    subprocess.run([*command, (failed[0] / "report.html").as_uri()], check=True, timeout=120, capture_output=True)
    import matplotlib.image

    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[:2] == (2400, 1200)
    assert len({tuple(p) for p in pixels[::20, ::20, :3].reshape(-1, 3).tolist()}) > 10  # not a blank sheet


def test_the_matrix_knows_tried_from_impossible() -> None:
    from fuzz.coverage import valid_pairs
    from fuzz.plots import matrix

    some = set(list(valid_pairs())[:100])
    drawn = matrix(some)
    assert len(re.findall('class="hit"', drawn)) == 100
    assert len(re.findall('class="miss"', drawn)) == len(valid_pairs()) - 100
