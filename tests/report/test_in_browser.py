"""The report in Chromium: it works, it stays inside the screen of a phone, it asks nobody for anything."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fp8slurm.report.cli import main

HERE = Path(__file__).parent
TIMEOUT_S = 240
DARK, LIGHT = 0, 1
"""Chromium's numbers of the preferred colour schemes."""


def requests(log):
    """Addresses outside the machine's files that a page asked for; Chromium's own requests have no page as
    initiator."""
    params = [event.get("params", {}) for event in log["events"]]
    return {
        p["url"]
        for p in params
        if re.match("(https?|wss?|ftp):", p.get("url", "")) and p.get("initiator", "not an origin") != "not an origin"
    }


@pytest.fixture(scope="module")
def browser(install_packages, tmp_path_factory):
    """run(page, *flags): (standard output, console messages, addresses that were asked for)."""
    install_packages("chromium", program="chromium")
    folder = tmp_path_factory.mktemp("browser")

    def run(page, *flags):
        log = folder / "net.json"
        log.unlink(missing_ok=True)
        done = subprocess.run(
            [shutil.which("chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--disable-background-networking",
             "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
             "--no-first-run", "--allow-file-access-from-files", "--virtual-time-budget=20000",
             "--enable-logging=stderr",
             f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", "--net-log-capture-mode=IncludeSensitive",
             *flags, page.as_uri()],
            capture_output=True, text=True, timeout=TIMEOUT_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        console = re.findall(r"CONSOLE[^\n]*", done.stderr)
        raw = log.read_text()
        assert '"constants"' in raw, "Chromium wrote no log of its requests"
        return done.stdout, console, requests(json.loads(raw))

    return run


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    from made_up_run import write_run

    run = write_run(tmp_path_factory.mktemp("runs") / "hostile", hostile=True, samples=9)
    other = write_run(run.parent / "other")
    assert main([str(run), "--compare", str(other)]) == 0
    return run / "report.html"


def probe(browser, report, folder, width, scheme):
    """What probe.js measured of the report in a frame of `width` pixels."""
    page = folder / f"probe-{width}-{scheme}.html"
    page.write_text(
        f'<!doctype html><body><iframe width="{width}" height="900" style="border:0" src="{report.as_uri()}"></iframe>'
        f'<pre id="result"></pre><script>{(HERE / "probe.js").read_text()}</script>'
    )
    out, console, asked = browser(
        page, "--window-size=1400,1000", f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom"
    )
    found = re.search(r'<pre id="result">(.+?)</pre>', out, re.S)
    assert found, f"the page never answered: {console} {out[-500:]}"
    return json.loads(html.unescape(found[1])), console, asked


@pytest.mark.parametrize(("width", "scheme"), [(1280, LIGHT), (390, LIGHT), (390, DARK)])
def test_it_works_on_a_desk_on_a_phone_and_in_the_dark(browser, report, tmp_path, width, scheme):
    found, console, asked = probe(browser, report, tmp_path, width, scheme)
    assert "error" not in found, found["error"]
    assert console == [] and asked == set()
    assert found["dark"] == (scheme == DARK) and found["title"].startswith("hostile")
    assert found["scrolls"] <= width and found["overflow"] == [] and width - 20 <= found["width"] <= width
    assert found["checked"] > 20 and found["low"] == [], "text with too little contrast"
    assert (found["all"], found["page"], found["second"], found["focused"]) == (
        "1 to 10 of 18",
        10,
        "11 to 18 of 18",
        2,
    )
    assert (found["step20"], found["onlyStep20"], found["rewarded"], found["nobody"]) == (
        "1 to 9 of 9",
        True,
        "1 to 5 of 5",
        "no sample fits",
    )
    assert found["largest"] == [0.45, 0.45, 0.4] and {"n3", "u3"} <= set(found["colours"])
    assert "trainer \u22120.05, engine \u22120.5, d +0.45" in found["detail"]
    assert found["tip"].startswith("step 9reward") and found["first"].startswith("step 0reward")
    assert found["scripts"] == 2 and found["images"] == 0, "text of a sample became an element"


def test_a_page_that_asks_somebody_is_noticed(browser, report, tmp_path):
    """The check above can fail: a request, an error and an inline script that the policy forbids are seen."""
    page = tmp_path / "bad.html"
    page.write_text('<!doctype html><img src="http://127.0.0.1:9/x"><script>console.error("seen")</script>')
    _, console, asked = browser(page, "--dump-dom")
    assert any("seen" in line for line in console) and any("127.0.0.1:9/x" in url for url in asked)
    page.write_text(
        report.read_text(encoding="utf-8").replace(
            "<main>", '<main><script>document.title="owned"</script><img src="http://127.0.0.1:9/y">', 1
        )
    )
    out, console, asked = browser(page, "--dump-dom")
    assert "<title>owned" not in out and not any("/y" in url for url in asked), "the policy holds"
    assert any("Content Security Policy" in line for line in console)


def test_screenshots_are_drawn(browser, report, tmp_path):
    from PIL import Image

    colours = {}
    for scheme in (LIGHT, DARK):
        path = tmp_path / f"{scheme}.png"
        browser(
            report,
            "--window-size=390,3000",
            f"--blink-settings=preferredColorScheme={scheme}",
            "--hide-scrollbars",
            f"--screenshot={path}",
        )
        picture = Image.open(path).convert("RGB")
        assert picture.size == (390, 3000) and len(set(picture.resize((130, 1000)).getdata())) > 50
        colours[scheme] = sum(picture.getpixel((3, 1500)))
    assert colours[LIGHT] > 600 > 150 > colours[DARK]
