import pytest

from fp8slurm.observe import plot as plots
from fp8slurm.observe.metrics import MetricsWriter


@pytest.fixture(autouse=True)
def _matplotlib_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path_factory.getbasetemp() / "matplotlib"))


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, kept open for a look."""
    kept = []
    save = plots._save

    def keep(figure, out):
        kept.append(figure)
        return save(figure, out)

    monkeypatch.setattr(plots, "_save", keep)
    return kept


def make_run(folder, slope=0.01):
    with MetricsWriter(folder / "metrics.jsonl") as writer:
        for step in (1, 2):
            writer.write({"phase": "sft", "step": step, "loss": 1.0, "eval/accuracy": 0.1 * step})
        writer.write({"phase": "rl", "step": 0, "eval/accuracy": 0.3, "time/step": 0.0})
        for step in range(1, 21):
            writer.write(
                {
                    "phase": "rl", "step": step, "reward/mean": slope * step, "gap/mean_abs": 0.01, "gap/p99": 0.1,
                    "gap/max": 0.5, "gap/k1": -1e-4, "gap/k3": 0.0 if step == 1 else 1e-4,
                    "time/rollout": 1.0, "time/train": 2.0, "time/step": 4.0,
                    "time/checkpoint": 3.0 if step == 11 else None,
                    "final_gap/mean_abs": 0.02 if step == 20 else None,
                }
            )  # fmt: skip
    return folder


def labels(axes):
    return axes.get_legend_handles_labels()[1]


def test_one_run(tmp_path, figures):
    out = plots.plot(make_run(tmp_path / "tiny"))
    assert out == tmp_path / "tiny" / "plot.png" and out.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in out.parent.iterdir()) == ["metrics.jsonl", "plot.png"]
    reward, accuracy, gap, times = figures[0].axes
    assert list(reward.lines[0].get_ydata()) == pytest.approx([0.01 * s for s in range(1, 21)])
    assert reward.lines[1].get_ydata()[-1] == pytest.approx(0.155)  # mean of steps 11 to 20
    assert list(accuracy.lines[0].get_xdata()) == [-1, 0, 0]
    assert list(accuracy.lines[0].get_ydata()) == pytest.approx([0.1, 0.2, 0.3])
    assert labels(gap)[5:] == ["after the last update"] and len(labels(gap)) == 6 and gap.get_yscale() == "log"
    lines = {line.get_label(): line for line in gap.lines}
    assert list(lines["mean |d|"].get_ydata()) == [0.01] * 20 and lines["mean |d|"].get_xdata()[-1] == 20
    (final,) = [line for line in gap.lines if len(line.get_xdata()) == 1]
    assert (list(final.get_xdata()), list(final.get_ydata())) == ([20], [0.02]), "at the last step, not behind it"
    assert list(lines["KL, k1 (size)"].get_ydata()) == [1e-4] * 20
    assert labels(times) == ["rollout", "training", "other", "checkpoint"]
    heights = [sum(bar.get_height() for bar in bars) for bars in times.containers]
    assert heights == pytest.approx([20.0, 40.0, 20.0, 3.0])


def test_sources_and_parts_have_a_row_of_their_own(tmp_path, figures):
    with MetricsWriter(tmp_path / "run" / "metrics.jsonl") as writer:
        for step in (1, 2):
            more = {"source/math/reward": 0.1 * step, "source/web/reward": 0.5, "reward/parts/right": 0.2}
            writer.write({"phase": "rl", "step": step, "reward/mean": 0.3} | more)
    plots.plot(tmp_path / "run")
    sources, parts = figures[0].axes[4:]
    assert labels(sources) == ["math", "web"] and list(sources.lines[0].get_ydata()) == pytest.approx([0.1, 0.2])
    assert labels(parts) == ["right"] and parts.get_title() == "Parts of the reward"


def test_several_runs(tmp_path, figures):
    runs = {name: make_run(tmp_path / name, slope) for name, slope in (("a", 0.01), ("b", 0.02))}
    out = plots.plot_runs(runs, tmp_path / "all.png")
    assert out.read_bytes().startswith(b"\x89PNG")
    assert all(labels(axes) == ["a", "b"] for axes in figures[0].axes)
    assert figures[0].axes[0].lines[2].get_ydata()[-1] == pytest.approx(0.4)


def test_a_run_with_next_to_nothing_still_plots(tmp_path):
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write({"phase": "rl", "step": 0})
    assert plots.plot(tmp_path).exists()
    assert plots.plot_runs({"a": tmp_path}, tmp_path / "b.png").exists()


def test_a_supervised_run(tmp_path, figures):
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        for step in (1, 2):
            writer.write({"phase": "sft", "step": step, "loss": 1.0 / step, "grad_norm": 3.0, "time/step": 1.0})
    plots.plot(tmp_path)
    loss, _, norm, times = figures[0].axes
    assert list(loss.lines[0].get_ydata()) == [1.0, 0.5] and list(norm.lines[0].get_ydata()) == [3.0, 3.0]
    assert labels(times) == ["other"]


def test_nothing_to_plot(tmp_path):
    MetricsWriter(tmp_path / "metrics.jsonl").close()
    with pytest.raises(ValueError, match="is empty"):
        plots.plot(tmp_path)
    with pytest.raises(ValueError, match="no RL step"):
        plots.plot_runs({"a": tmp_path}, tmp_path / "a.png")
    with pytest.raises(ValueError, match="no runs"):
        plots.plot_runs({}, tmp_path / "a.png")


def test_the_command(tmp_path, capsys):
    runs = [str(make_run(tmp_path / name)) for name in "ab"]
    assert plots.main(runs[:1]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "a" / "plot.png")
    assert plots.main([*runs, "--out", str(tmp_path / "c.png")]) == 0
    assert (tmp_path / "c.png").exists()
    with pytest.raises(ValueError, match="does not exist"):
        plots.main([str(tmp_path / "no")])
    with pytest.raises(ValueError, match="2 runs in one picture.*--out all.png"):
        plots.main(runs)


def test_a_picture_goes_into_a_folder_that_is_there(tmp_path):
    """As a report does: a mistyped path makes no folders."""
    run = str(make_run(tmp_path / "a"))
    with pytest.raises(ValueError, match="--out .*/new/all.png: there is no folder .*/new$"):
        plots.main([run, "--out", str(tmp_path / "new" / "all.png")])
    with pytest.raises(ValueError, match=f"--out {tmp_path} is a folder"):
        plots.main([run, "--out", str(tmp_path)])
    assert not (tmp_path / "new").exists()
