"""The records of metrics.jsonl as a Weights & Biases run: an extra that is never a reason to fail or to wait."""

from __future__ import annotations

import logging
import os
import queue
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 30.0
KEPT = 10_000
"""Records that wait for a slow network; later ones are left out, metrics.jsonl has them all."""


class WeightsAndBiases:
    """Sends records in a thread of its own. Without the package or a key it says so once and does nothing more.

    One W&B run for a run directory, over all attempts (its id is in RUN/wandb_id); steps that a resumed attempt takes
    again appear twice there. WANDB_MODE=offline writes to RUN/wandb without a key.
    """

    def __init__(self, run: Path, name: str, project: str, config: Mapping[str, Any]) -> None:
        self._run, self._name, self._project, self._config = Path(run), name, project, config
        self._records: queue.Queue[dict[str, Any] | None] = queue.Queue(KEPT)
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def write(self, record: Mapping[str, Any]) -> None:
        """Queue every number of a record, under PHASE/KEY."""
        phase = record["phase"]
        numbers = {
            f"{phase}/{key}": value
            for key, value in record.items()
            if key != "phase" and isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        try:
            self._records.put_nowait(numbers)
        except queue.Full:
            pass

    def close(self) -> None:
        """Give the thread CLOSE_TIMEOUT_S to send what is left."""
        try:
            self._records.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            log.warning("Weights & Biases did not take everything within %g s; metrics.jsonl has it", CLOSE_TIMEOUT_S)

    def _work(self) -> None:
        try:
            run = self._begin()
            while run is not None and (numbers := self._records.get()) is not None:
                run.log(numbers)
            if run is not None:
                run.finish()
        except BaseException as error:  # noqa: BLE001 - wandb ends with SystemExit, too
            log.warning("Weights & Biases is off from here on: %s: %s", type(error).__name__, error)

    def _begin(self) -> Any:
        try:
            import wandb
        except ImportError:
            log.warning("--observe.wandb: the package wandb is not installed; the run goes on without it")
            return None
        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.api.api_key:
            log.warning("--observe.wandb: no key (WANDB_API_KEY or `wandb login`; WANDB_MODE=offline needs none); off")
            return None
        path = self._run / "wandb_id"
        if not path.exists():
            path.write_text(secrets.token_hex(4))
        run = wandb.init(
            project=self._project, name=self._name, id=path.read_text(), resume="allow", dir=str(self._run),
            config=dict(self._config), settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        for phase in ("sft", "rl"):
            run.define_metric(f"{phase}/step")
            run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
        return run
