"""What a kill or a SIGTERM costs, wherever in a run it comes."""

import os
import signal
import threading
import time

import pytest

from jaxlm.train import Fitted, Lora, Osft, checkpoint, fit, loop, run, runs
from jaxlm.train.checkpoint import Timer
from jaxlm.train.stopping import Stopped
from tests.train.small import settings


def test_a_sigterm_saves_and_returns(bundle, tmp_path):
    config, log = settings(tmp_path, steps=2000), tmp_path / "out" / "log.jsonl"

    def kill():
        while not (log.exists() and log.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=kill, daemon=True).start()
    fitted = fit(bundle, config)
    assert fitted.stopped and 0 < fitted.step < 2000
    assert (tmp_path / "out" / "checkpoints" / str(fitted.step)).is_dir()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_kill_costs_no_more_than_the_minutes(bundle, tmp_path, monkeypatch):
    """By the clock a checkpoint is written without any `checkpoint_every`."""
    steps = lambda out: sorted(int(p.name) for p in (tmp_path / out / "checkpoints").iterdir()
                               if p.name.isdigit())
    for out, minutes, wanted in (("a", 1e-9, [1, 2, 3]), ("b", 10.0, [3]), ("c", 0.0, [3])):
        fit(bundle, settings(tmp_path, steps=3, out=f"{tmp_path}/{out}", keep=9,
                             checkpoint_minutes=minutes))
        assert steps(out) == wanted


def test_the_first_process_clock_decides_and_is_seldom_asked(monkeypatch):
    now, asked = [0.0], []
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(checkpoint.jax, "process_count", lambda: 2)
    monkeypatch.setattr(checkpoint.multihost_utils, "broadcast_one_to_all",
                        lambda x: asked.append(x) or x)
    timer, due = Timer(10.0, 0), []
    for step in range(1, 301):  # three seconds each, the first a minute
        now[0] += 60.0 if step == 1 else 3.0
        if timer.due(step):
            due.append(now[0])
            timer.restart(step)
    assert due[0] == pytest.approx(600, abs=6) and len(due) == 1 and len(asked) < 12


@pytest.mark.parametrize("tuning", [Lora(rank=2), pytest.param(Osft(), marks=pytest.mark.slow)],
                         ids=["lora", "osft"])
def test_what_is_frozen_is_found_once_whenever_a_kill_comes(bundle, tmp_path, tuning, monkeypatch):
    """Killed before the first checkpoint that has a step in it."""
    class Killed(BaseException):
        pass

    def kill(self, state):
        raise Killed

    config = settings(tmp_path, steps=2, tuning=tuning)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_compile", kill)
        with pytest.raises(Killed):
            fit(bundle, config)
    monkeypatch.setattr(type(tuning), "start", lambda *a, **k: pytest.fail("found a second time"))
    assert fit(bundle, config).step == 2


def test_a_sigterm_before_the_first_step_leaves_with_what_is_saved(bundle, tmp_path, monkeypatch):
    config, real = settings(tmp_path, steps=2, tuning=Lora(rank=2)), loop.first_state

    def interrupted(*args):
        signal.raise_signal(signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(loop, "first_state", interrupted)
    with pytest.raises(Stopped, match="the same command goes on"):
        fit(bundle, config)
    assert (tmp_path / "out" / "checkpoints" / "0").is_dir()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_sigterm_in_the_export_leaves_after_it(bundle, tiny_folder, tmp_path, monkeypatch):
    real = runs.save
    monkeypatch.setattr(runs, "train", lambda opened, config: Fitted(
        opened(), 2, 2, False, [], {}, None))
    monkeypatch.setattr(runs, "save", lambda *a, **k: (
        real(*a, **k), signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(Stopped):
        run(settings(tmp_path, model=str(tiny_folder), export="float32"))
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()
