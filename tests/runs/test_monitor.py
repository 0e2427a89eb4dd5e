"""Trackers: the callbacks of transformers, and the folder of TensorBoard's files."""

import sys
from types import ModuleType

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerControl, TrainerState, TrainingArguments

from sft.runs.monitor import trackers


def logged(folder, callbacks, step: int, loss: float) -> None:
    arguments = TrainingArguments(output_dir=str(folder), report_to="none")
    state = TrainerState(global_step=step, max_steps=4, is_world_process_zero=True)
    for callback in callbacks:
        callback.on_train_begin(arguments, state, TrainerControl())
        callback.on_log(arguments, state, TrainerControl(), logs={"loss": loss})
        callback.on_train_end(arguments, state, TrainerControl())


def test_tensorboard_gets_the_metrics_below_the_run_and_forgets_steps_that_are_trained_again(tmp_path):
    logged(tmp_path, trackers(("tensorboard",), tmp_path, 0), step=3, loss=9.0)
    logged(tmp_path, trackers(("tensorboard",), tmp_path, 2), step=3, loss=1.5)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 1.5)]


def test_no_tracker_writes_nothing(tmp_path):
    assert trackers((), tmp_path, 0) == []
    assert not list(tmp_path.iterdir())


def test_another_tracker_is_the_callback_that_transformers_has_for_it(tmp_path, monkeypatch):
    import transformers.integrations.integration_utils as integrations

    class Callback:
        pass

    monkeypatch.setitem(sys.modules, "trackio", ModuleType("trackio"))
    monkeypatch.setitem(integrations.INTEGRATION_TO_CALLBACK, "trackio", Callback)
    (tracker,) = trackers(("trackio",), tmp_path, 0)
    assert isinstance(tracker, Callback)
