"""The report of made-up runs: what it says, what it survives, and that it executes nothing."""

import json
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from made_up_run import HOSTILE, record, sample, write_json, write_lines

from fp8slurm.report import charts, content, drawing, safe
from fp8slurm.report.cli import main
from fp8slurm.report.page import embed
from fp8slurm.report.page import page as page_of
from fp8slurm.report.samples import read_samples
from fp8slurm.report.text import markdown
from fp8slurm.run import timeline
from fp8slurm.run.reader import read_run


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text of the scripts and of the rest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.text, self._stack = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._stack.append(tag)

    def handle_endtag(self, tag):
        if self._stack and tag == self._stack[-1]:
            self._stack.pop()

    def handle_data(self, data):
        (self.scripts if self._stack else self.text).append(data)


def html(run, *more):
    assert main([str(run), *more]) == 0
    return (run / "report.html").read_text(encoding="utf-8")


def text(run, capsys, *more):
    capsys.readouterr()
    assert main([str(run), "--text", *more]) == 0
    return capsys.readouterr().out


def data_of(document):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', document, re.S)[1])


def svg_of(document, chart):
    """The drawing of a chart."""
    return ElementTree.fromstring(re.search(rf'<svg [^>]*data-chart="{chart}".*?</svg>', document, re.S)[0])


def test_it_says_what_the_run_recorded(make_run, capsys):
    run = make_run()
    document = html(run)
    words = re.sub(r"\s+", " ", " ".join(Elements(document).text))
    for said in (
        "20 of 20 RL steps", "FP8 trainer (emulated on the CPU), FP8 engine", "run.deterministic",
        "checkpoint step_000010 was skipped: a.bin was altered (SHA-256)",
        "engine 0 failed (it died); restart 1", "no significant difference", "0.820 to 0.880",
        "every task ended by itself",
        "mean of RL records 0 to 20",
        "Memory: not recorded", "12 of the 12 samples of 2 saved steps",
    ):  # fmt: skip
        assert said in words, said
    drawn = data_of(document)["charts"]
    assert {"reward", "accuracy", "gap", "k3", "clip", "entropy", "length", "grad", "lr", "sft-loss"} <= set(drawn)
    assert len(drawn["reward"]["lines"][0]["p"]) == 21 and [line["name"] for line in drawn["gap"]["lines"]] == [
        "99th percentile |d|",
        "mean |d|",
    ]
    same = text(run, capsys)
    for said in (
        "20 of 20 RL steps",
        "run.deterministic",
        "a.bin was altered (SHA-256)",
        "no significant difference",
        "Largest gaps",
        "Memory: not recorded",
    ):
        assert said in same, said


def test_sources_and_parts_of_the_reward_have_curves(make_run, capsys):
    """By the run's own names; of many the first are drawn, and it says so."""
    run = make_run()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in lines:
        if row["phase"] == "rl":
            row |= {"source/math/reward": 0.25, "source/web/reward": 0.75, "source/web/response_length": 9.0}
            row |= {f"reward/parts/p{i:02d}": i / 100 for i in range(14)}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    document = html(run)
    drawn = data_of(document)["charts"]
    assert [line["name"] for line in drawn["source-reward"]["lines"]] == ["math", "web"]
    assert [line["name"] for line in drawn["source-length"]["lines"]] == ["web"]
    assert [line["name"] for line in drawn["parts"]["lines"]] == [f"p{i:02d}" for i in range(12)]
    assert "source-truncated" not in drawn and "The first 12 of 14 names" in document
    said = text(run, capsys)
    assert "Reward by source, math" in said and "Parts of the reward, p11" in said


def test_conversations_have_curves_where_there_are_any(make_run, capsys):
    run, plain = make_run(), make_run("plain")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in lines:
        if row["phase"] == "rl":
            row |= {"rollout/turns": 3.5, "rollout/branches": 1.25, "rollout/failed": 0.0}
    write_lines(run / "metrics.jsonl", lines)
    drawn = data_of(html(run))["charts"]
    assert [line["name"] for line in drawn["turns"]["lines"]] == ["branches", "turns"] and "failed" in drawn
    said = text(run, capsys, "--compare", str(plain))
    (row,) = [line for line in said.splitlines() if line.startswith("| branches of a conversation (its samples)")]
    assert "1.25" in row
    assert "turns" not in data_of(html(plain))["charts"] and "of a conversation" not in text(plain, capsys)


def test_nothing_of_a_hostile_run_is_obeyed(make_run, capsys):
    run = make_run(hostile=True)
    document = html(run)
    elements = Elements(document)
    tags = [t for t, _ in elements.tags]
    assert (
        tags.count("script") == 2
        and tags.count("style") == 1
        and not {"img", "iframe", "object", "link", "base", "form"} & set(tags)
    )
    for tag, attributes in elements.tags:
        assert not any(name.startswith("on") or name in ("src", "style") for name in attributes), (tag, attributes)
        assert attributes.get("href", "#").startswith("#")
    policy = next(a["content"] for t, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "*" not in policy
    shown = data_of(document)["samples"]
    assert len(shown) == 12
    assert all(
        "</script>" in s["prompt"] and "\u27e8U+202E\u27e9" in s["prompt"] and "\u241b[31m\u2400" in s["prompt"]
        for s in shown
    )
    for c in "\x00\x1b\u202e\u202c\u2028":
        assert c not in document
        assert c not in (same := text(run, capsys))
    assert not re.search(r"^(?! {4}).*(?<!\\)<script", same, re.M), "text of a sample outside a code block"


@pytest.mark.parametrize("value", ["</script>", "<!--<script>", "&lt;", "]]>", "a\u2028b", "'\"\\", "\ud800"])
def test_embedded_json_holds_no_markup_and_reads_back(value):
    shown = safe.visible(value)
    raw = embed({"x": shown})
    raw.encode()
    assert not set("<>&\u2028") & set(raw) and json.loads(raw) == {"x": shown}


def test_a_nan_breaks_the_line_and_is_counted(make_run, capsys):
    run = make_run()
    rows = [record(s) for s in range(21)]
    rows[7]["grad_norm"] = rows[8]["grad_norm"] = None
    for row in rows:
        del row["entropy"]
        row["gap/k3"] = 0.0
    write_lines(run / "metrics.jsonl", rows)
    document = html(run)
    assert "NaN or infinite at 2 steps" in document and "entropy: recorded in every RL step that updates" in document
    drawn = data_of(document)["charts"]
    assert "k3" not in drawn, "a logarithmic axis has no zero"
    (curve,) = (p for p in svg_of(document, "grad").iter("path") if p.get("stroke") == "var(--c0)")
    assert curve.get("d").count("M") == 2, "two pieces"
    shown = text(run, capsys)
    assert "Not recorded in this run" in shown and "entropy: recorded in every RL step that updates" in shown


def test_a_run_whose_every_number_is_missing(make_run, capsys):
    run = make_run()
    write_lines(run / "metrics.jsonl", [{"phase": "rl", "step": s, "loss": None, "time/step": None} for s in range(5)])
    assert "Not recorded: no step has a time yet" in html(run)
    assert "Not recorded: no step has a time yet" in text(run, capsys)


def files_of(run):
    return sorted(p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file())


def test_a_run_interrupted_at_any_file(make_run, capsys):
    """Each file cut in half, garbage, of another shape, gone or a folder: a report all the same, or a clear refusal."""
    whole = make_run("whole", steps=10, sft=2, samples=1)
    reports = 0
    for name in files_of(whole):
        for damage in ("half", "garbage", "shape", "gone", "folder"):
            run = whole.parent / "broken"
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(whole, run)
            path = run / name
            raw = path.read_bytes()
            if damage == "half":
                path.write_bytes(raw[: len(raw) // 2])
            elif damage == "garbage":
                path.write_bytes(b"\xff\xfe\x00{[" * 50 + b"\n")
            elif damage == "shape":
                path.write_text(
                    '[{"tasks": [1], "step": "x", "phase": 3}, null, 1e999]\n{"tasks": {"a": []}, "checkpoint": 4, '
                    '"step": [], "prompt": {}}\n'
                )
            else:
                path.unlink()
                if damage == "folder":
                    path.mkdir()
            document = html(run)
            Elements(document)
            data_of(document)
            if damage in ("half", "shape"):
                assert text(run, capsys).startswith("# broken"), (name, damage)
            if name in ("config.json", "metrics.jsonl"):
                assert "Not everything could be read" in document, (name, damage)
            reports += 1
    assert reports > 50


def test_broken_lines_are_counted_and_the_rest_is_shown(make_run):
    run = make_run()
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:10] + ["{broken\n", lines[9]] + lines[10:]) + '{"phase": "rl", "st')
    document = html(run)
    assert (
        "1 of 31 lines cannot be read" in document
        and "1 steps are there twice" in document
        and "ends in half a line" in document
    )
    assert len(data_of(document)["charts"]["reward"]["lines"][0]["p"]) == 21


def test_what_is_no_run_is_refused(tmp_path, make_run):
    (tmp_path / "data").mkdir()
    for path, why in ((tmp_path / "data", "no run directory"), (tmp_path / "none", "is no folder")):
        with pytest.raises(ValueError, match=why):
            main([str(path)])
    run = make_run()
    for flags, why in (
        (["--out", str(tmp_path)], "is a folder"),
        (["--out", str(tmp_path / "no" / "r.html")], "there is no folder"),
        (["--samples", "-1"], "below 0"),
        (["--compare", str(run)], "named twice"),
    ):
        with pytest.raises(ValueError, match=why):
            main([str(run), *flags])
    assert not (run / "report.html").exists()


def test_a_run_that_has_just_begun(tmp_path, capsys):
    run = tmp_path / "new"
    (run / "attempts").mkdir(parents=True)
    document = html(run)
    assert "no step yet" in document and "metrics.jsonl is missing" in document and "no step yet" in text(run, capsys)


def test_sizes_are_bounded(make_run):
    """10,000 steps, and 1,000 with 400 long samples: megabytes, not tens of them; every extreme is still in the
    curve."""
    run = make_run("long", steps=9, samples=1)
    rows = [record(s) for s in range(10_001)]
    rows[5003]["grad_norm"] = 1234.5
    write_lines(run / "metrics.jsonl", rows)
    document = html(run)
    assert len(document.encode()) < 1_500_000
    points = data_of(document)["charts"]["grad"]["lines"][0]["p"]
    assert len(points) <= charts.POINTS and max(p[4] for p in points) == 1234.5

    run = make_run("wide", steps=1000, samples=0)
    shutil.rmtree(run / "rollouts")
    for step in range(50, 1001, 50):
        rows = [sample(i, "word " * 400, range(600), prompt="p" * 20_000) for i in range(20)]
        write_lines(run / f"rollouts/step_{step:06d}.jsonl", rows)
        gaps = [{"index": i, "trainer_logprobs": [-0.25] * 600} for i in range(20)]
        write_lines(run / f"rollouts/trainer/step_{step:06d}.jsonl", gaps)
    document = html(run, "--samples", "100000")
    assert len(document.encode()) < 5_000_000
    words = " ".join(Elements(document).text)
    shown = data_of(document)["samples"]
    assert f"{len(shown)} of the 400 samples of 20 saved steps" in words and len({s["step"] for s in shown}) == 20


def test_tokens_that_are_left_out_of_the_loss_are_marked(make_run):
    run = make_run(samples=0)
    shutil.rmtree(run / "rollouts")
    write_lines(run / "rollouts/step_000004.jsonl", [sample(0) | {"loss_mask": [1, 0, 1]}, sample(1)])
    write_lines(
        run / "rollouts/trainer/step_000004.jsonl",
        [{"index": 0, "trainer_logprobs": [-0.5, None, -0.5]}, {"index": 1, "trainer_logprobs": [-0.5] * 3}],
    )
    first, second = data_of(html(run))["samples"]
    assert [t[4:] for t in first["tokens"]] == [[], [1], []] and first["tokens"][1][1] is None
    assert first["mean"] == 0.125 and [len(t) for t in second["tokens"]] == [4] * 3


def test_what_a_tool_said_is_marked(make_run, capsys):
    run = make_run(samples=0)
    shutil.rmtree(run / "rollouts")
    talk = sample(0) | {"loss_mask": [1, 0, 0], "turns": [[0, 1], [2, 3]], "rollout": 0, "error": "a tool hung"}
    damaged = sample(1) | {"turns": [[0, "x"], 7, [1, 3]], "prompt_tokens": [1, None]}
    write_lines(run / "rollouts/step_000004.jsonl", [talk, damaged])
    first, second = data_of(html(run))["samples"]
    assert [t[4:] for t in first["tokens"]] == [[], [2], [1]] and first["finish"] == "error: a tool hung"
    assert [t[4:] for t in second["tokens"]] == [[2], [], []]
    assert "Said by tools: " in text(run, capsys)


def test_the_gap_belongs_to_its_token(make_run):
    run = make_run(name_of_model="models/not-there")
    found = read_samples(read_run(run))
    assert found.with_gap and not found.decoded and found.saved == 12
    s = next(s for s in found.shown if s.index == 3)
    assert [round(p.gap, 6) for p in s.pieces] == [0.2, -0.2, 0.2] and s.max_gap == pytest.approx(0.2)
    assert [p.engine for p in s.pieces] == [-0.5, -0.625, -0.75] and s.pieces[0].text == "\u27e824\u27e9"


def test_another_attempts_gaps_are_left_out(make_run):
    run = make_run()
    path = run / "rollouts/trainer/step_000010.jsonl"
    path.write_text(path.read_text().replace('"index": 2', '"index": 77'))
    read = read_run(run)
    found = read_samples(read)
    assert {s.step for s in found.shown if s.max_gap is not None} == {20} and any(
        "belongs to other samples" in n for n in read.notes
    )


def test_samples_of_several_workers_are_counted_on(make_run):
    run = make_run(steps=10, samples=4)
    path = run / "rollouts/step_000010.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.unlink()
    for worker in (0, 1):
        (run / f"rollouts/step_000010.{worker}.jsonl").write_text("".join(lines[2 * worker : 2 * worker + 2]))
    found = read_samples(read_run(run))
    assert [s.index for s in found.shown] == [0, 1, 2, 3] and found.shown[3].max_gap == pytest.approx(0.2)


def test_the_largest_gaps_are_among_the_shown(make_run):
    run = make_run(steps=10, samples=200)
    found = read_samples(read_run(run), 20)
    indices = [s.index for s in found.shown]
    assert found.saved == 200 and len(indices) == 20 and set(range(190, 200)) <= set(indices) and indices[0] == 0


def test_tokens_are_decoded_and_parts_of_a_character_put_together(make_run, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    (tmp_path / "model").mkdir()
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    ids = tokenizer.encode("a \u20ac\n").ids
    assert len(ids) == 6
    run = make_run(steps=10, samples=1, name_of_model=str(tmp_path / "model"))
    write_lines(run / "rollouts/step_000010.jsonl", [sample(0, "a \u20ac\n", ids)])
    write_lines(
        run / "rollouts/trainer/step_000010.jsonl",
        [{"index": 0, "trainer_logprobs": [-0.5, -0.6, -0.75, -0.5, -1.0, -1.2]}],
    )
    found = read_samples(read_run(run))
    assert found.decoded and [p.text for p in found.shown[0].pieces] == ["a", " ", "\u20ac", "\u21b5\n"]
    euro = found.shown[0].pieces[2]
    assert euro.gap == pytest.approx(0.375) and euro.trainer == pytest.approx(-2.25), (
        "the token where it is largest; the sum"
    )


def test_comparing_runs(make_run, capsys):
    a, b = make_run("a"), make_run("b")
    config = json.loads((b / "config.json").read_text())
    config["fp8"]["backend"] = "off"
    write_json(b / "config.json", config)
    write_lines(b / "metrics.jsonl", [record(s, **{"gap/mean_abs": 1e-3}) for s in range(21)])
    document = html(a, "--compare", str(b))
    assert [line["name"] for line in data_of(document)["charts"]["all-gap"]["lines"]] == ["a", "b"]
    assert "gap, mean |d|, mean of all RL records (nats)" in document
    assert "fp8.backend" in document.split("Settings that differ")[1].split("</section>")[0]
    same = text(a, capsys, "--compare", str(b))
    rows = [line for line in same.splitlines() if line.startswith("| fp8.backend")]
    assert re.search(r"emulated +\| off", rows[0]) and "b minus a" in same
    assert content.differences([read_run(a), read_run(b)]) == [("fp8.backend", ["emulated", "off"])]


def test_the_first_format_of_an_evaluation_is_shown_without_an_interval(make_run):
    run = make_run()
    shutil.rmtree(run / "eval")
    write_json(
        run / "eval/step_000020/fp8/summary.json",
        {
            "accuracy": 0.852,
            "questions": 500,
            "truncated": 5,
            "precision": "fp8",
            "step": 20,
            "checkpoint": "c/step_000020",
        },
    )
    (x,) = read_run(run).evaluations
    assert x.accuracy == (0.852, None, None) and x.truncated == 0.01 and x.checkpoint == "step_000020"
    assert "not recorded" in html(run)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.02, -0.001, "FP8 is significantly worse"),
        (0.001, 0.02, "FP8 is significantly better"),
        (-0.01, 0.02, "no significant difference"),
    ],
)
def test_the_verdict_follows_the_interval(make_run, low, high, verdict):
    run = make_run()
    path = run / "eval/compare-step_000010/compare.json"
    said = json.loads(path.read_text())
    next(iter(said["tasks"].values()))["difference"] = {"value": (low + high) / 2, "low": low, "high": high}
    write_json(path, said)
    assert read_run(run).comparisons[0].verdict == verdict and verdict in html(run)


def test_the_old_report_stays_until_the_new_one_is_whole(make_run, monkeypatch):
    run = make_run()
    before = html(run)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ValueError, match="No space left"):
        main([str(run)])
    assert (run / "report.html").read_text() == before


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.85, "0.850"),
        (-0.004, "\u22120.004"),
        (3.29e-5, "3.29e-5"),
        (1234567, "1.23e6"),
        (2781.2, "2,781"),
        (5, "5"),
        (12.345, "12.35"),
        (None, "\u2013"),
    ],
)
def test_figures_are_short(value, shown):
    assert safe.figure(value) == shown


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3, 29), (1e-9, 2e-9), (3e-5, 4e-2), (0.26, 0.67), (0, 10_000), (5, 5), (-1e9, 1e9)]
)
def test_an_axis_has_a_few_labels_in_order(low, high, log):
    points = [(step, low + (high - low) * step / 20) for step in range(21)]
    html, data = drawing.line_chart(charts.Chart("x", "Title", "", [charts.Line("line", points)], log))
    labels = [(t.get("text-anchor"), t.text.replace("\u2212", "-")) for t in svg_of(html, "x").iter("text")]
    steps = [int(text) for anchor, text in labels if anchor == "middle"]
    assert 2 <= len(steps) <= 7 and steps == sorted(set(steps)) and 0 <= steps[0] and steps[-1] <= 20
    values = [float(text.replace("k", "e3")) for anchor, text in labels if anchor == "end"]
    assert 2 <= len(values) <= 9 and values == sorted(set(values)), values
    assert data["y"][0] <= values[0] * (1 + 1e-9) and values[-1] <= data["y"][1] * (1 + 1e-9)


def test_drawings_take_their_colours_from_the_page_and_share_no_id(make_run):
    """Text stays text, a drawing's ids are its own, and the same run gives the same bytes."""
    run, other = make_run("a"), make_run("b")
    document = html(run, "--compare", str(other))
    ids = [attributes["id"] for _, attributes in Elements(document).tags if "id" in attributes]
    assert len(ids) == len(set(ids)) and set(re.findall(r'href="#(\w+)"', document)) <= set(ids)
    drawn = re.findall(r"<svg .*?</svg>", document, re.S)
    assert len(drawn) > 20
    for svg in drawn:
        colours = {
            v for e in ElementTree.fromstring(svg).iter() for k, v in e.attrib.items() if k in ("fill", "stroke")
        }
        assert all(c == "none" or re.fullmatch(r"var\(--\w+\)", c) for c in colours), colours
    assert "20" in [t.text for t in svg_of(document, "reward").iter("text")]

    def undated(page):
        return re.sub("<footer>.*?</footer>", "", page)

    assert undated(html(run, "--compare", str(other))) == undated(document)


def test_hostile_text_is_the_one_that_is_tested():
    assert "</script>" in HOSTILE and "\x1b" in HOSTILE


def test_an_attempt_of_an_older_version_says_what_it_did_not_record(make_run, capsys):
    run = make_run()
    shutil.rmtree(run / "attempts/1/events")
    for page in (html(run), text(run, capsys)):
        attempts = page.split("Attempts and faults")[-1].split("Configuration")[0]
        assert attempts.count("not recorded") >= 2 and "stand in its logs only" in attempts


def test_what_somebody_should_look_at_stands_at_the_top(make_run, capsys):
    run = make_run()
    assert "To look at" not in html(run)
    rows = [json.loads(line) | {"rollout/truncated": 0.5} for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_lines(run / "metrics.jsonl", rows)
    document = html(run)
    assert "To look at" in document and "50% of the last samples hit rollout.max_tokens" in document
    assert "> - truncation: 50%" in text(run, capsys)


def test_an_error_that_the_run_has_left_behind_is_earlier(make_run, capsys):
    run = make_run()
    assert [a.state for a in read_run(run).attempts] == ["failed", "done"]
    assert text(run, capsys).count("earlier: ") == 1
    shutil.rmtree(run / "attempts" / "1")
    assert "earlier: " not in text(run, capsys)


def test_a_step_is_drawn_with_who_waited(make_run):
    path = make_run()
    attempt = max((path / "attempts").iterdir(), key=lambda p: int(p.name))
    for step in (18, 19, 20):
        begin = 100.0 * step
        spans = [("rollout", begin, begin + 40), ("train", begin + 40, begin + 90), ("sync", begin + 90, begin + 100)]
        answers = [timeline.Answered("rollout", 0, begin, begin + 40, begin, begin + 40, [[(begin + 1, begin + 39)]])]
        timeline.append(attempt, timeline.line("rl", step, begin, begin + 100, spans, answers))
    run = read_run(path)
    document = page_of(run, read_samples(run, 0), [], ["run"])
    assert (
        "One step, who waits for whom" in document
        and "RL step 19" in document
        and "engine 0.0: generating 38" in document
    )
    assert "trainer: waits: rollout 40" in document and "updates: weight sync 10" in document
    told = markdown(run, read_samples(run, 0), [], ["run"])
    assert "| engine 0.0 | generating " in told and "38%" in told
