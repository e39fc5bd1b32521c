import logging
import sys
import threading
import types

import pytest

from fp8slurm.observe import weights_and_biases
from fp8slurm.observe.weights_and_biases import WeightsAndBiases

RECORDS = [{"phase": "rl", "step": n, "loss": n / 10, "note": "x", "ok": True} for n in (1, 2)]


class Run:
    """Stands for a W&B run: what it was told."""

    def __init__(self, **arguments) -> None:
        self.arguments, self.logged, self.metrics, self.finished = arguments, [], [], False

    def define_metric(self, name, step_metric=None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, numbers) -> None:
        self.logged.append(numbers)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package, with a key."""
    module = types.ModuleType("wandb")
    module.runs, module.api = [], types.SimpleNamespace(api_key="key")
    module.Settings = lambda **settings: settings
    module.init = lambda **arguments: module.runs.append(Run(**arguments)) or module.runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return module


def send(folder) -> None:
    sink = WeightsAndBiases(folder, "name", "project", {"run": {"steps": 2}})
    for record in RECORDS:
        sink.write(record)
    sink.close()


def test_numbers_arrive_under_their_phase_and_an_attempt_continues_the_run(wandb, tmp_path):
    send(tmp_path)
    send(tmp_path)
    first, second = wandb.runs
    assert first.logged == [{"rl/step": 1, "rl/loss": 0.1}, {"rl/step": 2, "rl/loss": 0.2}] and first.finished
    assert ("rl/*", "rl/step") in first.metrics and first.arguments["config"] == {"run": {"steps": 2}}
    assert first.arguments["id"] == second.arguments["id"] and first.arguments["resume"] == "allow"


def test_without_the_package_or_a_key_it_says_so_and_does_nothing(wandb, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    wandb.api.api_key = None
    send(tmp_path)
    assert not wandb.runs and "WANDB_API_KEY" in caplog.text
    monkeypatch.setenv("WANDB_MODE", "offline")
    send(tmp_path)
    assert len(wandb.runs) == 1
    monkeypatch.setitem(sys.modules, "wandb", None)
    send(tmp_path)
    assert "not installed" in caplog.text


def test_whatever_it_does_is_no_reason_to_fail_or_to_wait(wandb, tmp_path, monkeypatch, caplog):
    def leave(**_):
        raise SystemExit(1)

    wandb.init = leave
    send(tmp_path)
    assert "off from here on" in caplog.text
    never = threading.Event()
    wandb.init = lambda **_: never.wait()
    monkeypatch.setattr(weights_and_biases, "CLOSE_TIMEOUT_S", 0.1)
    send(tmp_path)
    assert "did not take everything" in caplog.text
    never.set()
