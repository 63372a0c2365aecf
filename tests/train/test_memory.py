"""What a run keeps alive, counted over all arrays there are."""

import gc
from contextlib import contextmanager

import jax
import pytest

from jaxlm.core.tree import nbytes
from jaxlm.hf.bundle import load
from jaxlm.train import Full, Lora, loop, run
from tests.train.small import settings


def held_bytes():
    """Of all arrays, those that share a buffer counted once."""
    gc.collect()
    return sum({x.unsafe_buffer_pointer(): x.nbytes for x in jax.live_arrays()
                if len(x.devices()) == 1}.values())


@pytest.mark.parametrize(("tuning", "stack", "in_a_step", "at_the_end"), [
    (Full(), True, 3, 2), (Full(), False, 3, 2), (Lora(rank=2), True, 1, 2)], ids=str)
def test_a_run_holds_no_weights_that_it_does_not_need(
        tiny_folder, tmp_path, monkeypatch, tuning, stack, in_a_step, at_the_end):
    """In units of the model: with its moments in a step, without them when the result is made."""
    size, before, seen = nbytes(load(tiny_folder).params), held_bytes(), {}

    @contextmanager
    def watched():
        yield lambda step: seen.update(step=held_bytes() - before)

    def parameters(*how, real=loop._parameters):
        def made(*trees):
            params = real(*how)(*trees)
            seen.update(end=held_bytes() - before)
            return params

        return made

    monkeypatch.setattr(loop, "asked_to_stop", watched)
    monkeypatch.setattr(loop, "_parameters", parameters)
    run(settings(tmp_path, steps=2, model=str(tiny_folder), tuning=tuning, stack=stack))
    assert in_a_step <= seen["step"] / size < in_a_step + 0.5
    assert at_the_end <= seen["end"] / size < at_the_end + 0.5
