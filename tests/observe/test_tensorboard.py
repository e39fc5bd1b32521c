import time

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fp8slurm.observe.tensorboard import TensorBoard


def scalars(folder, key):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(e.step, round(e.value, 4)) for e in events.Scalars(key)]


def test_scalars_by_phase_and_after_a_resume(tmp_path):
    board = TensorBoard(tmp_path)
    for step in (1, 2):
        board.write({"phase": "sft", "step": step, "loss": 9.0, "note": "x"})
    for step in (1, 2, 3):
        board.write({"phase": "rl", "step": step, "loss": step / 10, "eval/accuracy": None})
    board.close()
    board = TensorBoard(tmp_path, resume_at=("rl", 1))
    board.write({"phase": "rl", "step": 2, "loss": 0.7})
    board.close()
    assert scalars(tmp_path / "rl", "loss") == [(1, 0.1), (2, 0.7)]
    assert scalars(tmp_path / "sft", "loss") == [(1, 9.0), (2, 9.0)]


def test_resuming_in_the_supervised_phase_hides_the_rl_steps(tmp_path):
    board = TensorBoard(tmp_path)
    for phase, step in (("sft", 1), ("sft", 2), ("rl", 1), ("rl", 2)):
        board.write({"phase": phase, "step": step, "loss": float(step)})
    board.close()
    board = TensorBoard(tmp_path, resume_at=("sft", 1))
    board.write({"phase": "sft", "step": 2, "loss": 5.0})
    board.write({"phase": "rl", "step": 1, "loss": 6.0})
    board.close()
    assert scalars(tmp_path / "sft", "loss") == [(1, 1.0), (2, 5.0)]
    assert scalars(tmp_path / "rl", "loss") == [(1, 6.0)]


def test_a_run_that_begins_anew_hides_what_is_there(tmp_path, monkeypatch):
    now = time.time()
    for value in (1.0, 2.0):
        monkeypatch.setattr(
            time, "time", lambda: now + 10 * value
        )  # event files are read in the order of their seconds
        board = TensorBoard(tmp_path)
        board.write({"phase": "rl", "step": 3, "loss": value})
        board.close()
    assert scalars(tmp_path / "rl", "loss") == [(3, 2.0)]
