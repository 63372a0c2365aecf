"""Runs in processes of their own: killed at any moment, out of disk, two at once."""

import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest
import yaml

from jaxlm.hf.weights import load_params
from jaxlm.train import Config, MeshSizes, Osft, run
from jaxlm.train.config import to_dict
from tests.source_tree import ROOT
from tests.train.small import settings, sums

TIMEOUT_S = 900
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def write_config(config: Config, path):
    """A run's settings as YAML."""
    path.write_text(yaml.safe_dump(json.loads(json.dumps(to_dict(config)))))
    return str(path)


def start(config, path, devices=1, **options):
    """`jaxlm train` in a process."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", "jaxlm", "train", write_config(config, path)], text=True,
        env={**ENVIRONMENT, "XLA_FLAGS": flags}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        **options)


def tensors(folder):
    """The exported weights."""
    from safetensors.numpy import load_file

    return load_file(folder / "out" / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def straight(tiny_folder, tmp_path_factory):
    """Twenty steps without a break, a checkpoint at each."""
    folder = tmp_path_factory.mktemp("straight")
    config = settings(folder, steps=20, model=str(tiny_folder), checkpoint_every=1,
                      export="float32")
    begin = time.monotonic()
    process = start(config, folder / "c.yaml")
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, said
    return config, tensors(folder), time.monotonic() - begin


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_is_killed_anywhere_ends_as_if_it_were_not(straight, tmp_path, seed):
    config, wanted, seconds = straight
    config = config.replace(out=str(tmp_path / "out"))
    draw = random.Random(seed)
    for _ in range(3):
        process = start(config, tmp_path / "c.yaml")
        time.sleep(draw.uniform(0.2, 1.0) * seconds)
        process.kill()
        process.communicate()
    process = start(config, tmp_path / "c.yaml")
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, said
    chex.assert_trees_all_equal(tensors(tmp_path), wanted)
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").open()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 21))


@pytest.mark.slow
def test_a_sigterm_is_code_75_and_the_same_command_goes_on(straight, tmp_path):
    config, wanted, _ = straight
    config = config.replace(out=str(tmp_path / "out"), checkpoint_every=0)
    process = start(config, tmp_path / "c.yaml")
    log = tmp_path / "out" / "log.jsonl"
    while not (log.exists() and log.read_text()) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 75 and "stopped" in said, said
    process = start(config, tmp_path / "c.yaml")
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, said
    chex.assert_trees_all_equal(tensors(tmp_path), wanted)


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before_it(straight, tmp_path):
    """As a limit on what one file may hold does."""
    config, wanted, _ = straight
    config = config.replace(out=str(tmp_path / "out"))
    process = start(config.replace(steps=3, export="none"), tmp_path / "c.yaml")
    assert process.communicate(timeout=TIMEOUT_S) and process.returncode == 0

    def small_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = start(config, tmp_path / "c.yaml", preexec_fn=small_disk)
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2 and "that of step 3 is intact" in said, said
    process = start(config, tmp_path / "c.yaml")
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, said
    chex.assert_trees_all_equal(tensors(tmp_path), wanted)


def two(*command):
    """A command in two processes of two devices each; it is told where they meet, and which one
    it is."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = "--xla_force_host_platform_device_count=2"
    return [subprocess.Popen(
        [sys.executable, *command, where, "2", str(i)], env={**ENVIRONMENT, "XLA_FLAGS": flags},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in range(2)]


def start_two(config, folder):
    """A run that also says what each process saw."""
    path = write_config(config, folder / "two.yaml")
    return two(str(ROOT / "tests/train/worker.py"), path, str(folder / "said"))


def start_commands(config, folder):
    """`jaxlm train --distributed`."""
    path = write_config(config, folder / "two.yaml")
    return two("-m", "jaxlm", "train", path, "--distributed")


def codes(running):
    """Their exit codes and errors; both are over afterwards."""
    try:
        said = [process.communicate(timeout=TIMEOUT_S)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    return [process.returncode for process in running], "\n".join(s[-3000:] for s in said)


def finish(running):
    """Both end well."""
    found, said = codes(running)
    assert found == [0, 0], said


@pytest.mark.slow
def test_two_processes_train_save_and_go_on_as_one(tiny_folder, tmp_path):
    """On a mesh over both; each reads its share; one process takes their checkpoint up."""
    held_out = str(sums(tmp_path / "held_out.jsonl", 16, seed=1))
    config = settings(tmp_path, steps=3, model=str(tiny_folder), checkpoint_every=2,
                      mesh=MeshSizes(data=2, fsdp=2), export="float32",
                      data={"eval": (held_out,)})
    finish(start_two(config, tmp_path))
    for _ in range(2):  # the second time all is done, and neither does what the other does not
        finish(start_two(config.replace(steps=6), tmp_path))
    said = [json.loads((tmp_path / f"said.{i}").read_text()) for i in range(2)]
    assert said[0]["step"] == 6 and len(said[0]["losses"]) == 6
    assert [one["tokenised_at_first"] for one in said] == [32, 32]  # of 64 lines
    alone = run(config.replace(steps=6, mesh=MeshSizes(), out=f"{tmp_path}/alone"))
    losses = [row["loss"] for row in alone.history if "loss" in row]
    np.testing.assert_allclose(said[0]["losses"], losses, rtol=1e-4)
    lm = alone.bundle.lm
    from jaxlm.hf.families import family_of

    exported = load_params(tmp_path / "out" / "model", lm.shapes(), family_of("llama"), None, None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4),
                 exported, alone.bundle.params)
    longer = run(config.replace(steps=8, mesh=MeshSizes()))
    assert longer.step == 8


@pytest.mark.slow
@pytest.mark.parametrize("form", ["update", "coordinates", "factored"])
def test_two_processes_protect_subspaces_as_one(tiny_folder, tmp_path, form):
    """Weights lie over both: bases, steps, a checkpoint taken up, evaluation and its leaks."""
    held_out = str(sums(tmp_path / "held_out.jsonl", 16, seed=1))
    config = settings(tmp_path, steps=2, model=str(tiny_folder), tuning=Osft(form),
                      optimizer={"kind": "sgd"}, mesh=MeshSizes(fsdp=2, tensor=2),
                      data={"eval": (held_out,)}, evaluate_every=1)
    finish(start_two(config, tmp_path))
    finish(start_two(config.replace(steps=4), tmp_path))
    said = [json.loads((tmp_path / f"said.{i}").read_text()) for i in range(2)]
    alone = run(config.replace(steps=4, mesh=MeshSizes(), out=f"{tmp_path}/alone"))
    losses = [row["loss"] for row in alone.history if "loss" in row]
    assert [len(one["losses"]) for one in said] == [4, 2]  # the first process keeps the log
    for one in said:
        assert one["step"] == 4
        np.testing.assert_allclose(one["losses"], losses[-len(one["losses"]):], rtol=1e-4)
        np.testing.assert_allclose(one["evaluation"]["loss"], alone.evaluation["loss"], rtol=1e-4)
        assert one["evaluation"]["leak_left"] < 5e-7 and one["evaluation"]["leak_right"] < 5e-7


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_a_sigterm_to_one_of_two_processes_is_code_75_of_both(tiny_folder, tmp_path, asked):
    config = settings(tmp_path, steps=100_000, model=str(tiny_folder),
                      mesh=MeshSizes(data=2, fsdp=2))
    running = start_commands(config, tmp_path)
    log = tmp_path / "out" / "log.jsonl"
    while not (log.exists() and log.read_text()) and running[0].poll() is None:
        time.sleep(0.05)
    running[asked].send_signal(signal.SIGTERM)
    found, said = codes(running)
    assert found == [75, 75], said
    step = max(int(p.name) for p in (tmp_path / "out/checkpoints").iterdir() if p.name.isdigit())
    rows = [json.loads(line) for line in log.open()]
    assert rows[-1]["step"] == step < 100_000
    found, said = codes(start_commands(config.replace(steps=step + 2), tmp_path))
    assert found == [0, 0], said
    rows = [json.loads(line)["step"] for line in log.open()]
    assert rows == list(range(1, step + 3))


@pytest.mark.slow
def test_a_loss_that_is_no_number_is_code_3_of_both_processes(tiny_folder, tmp_path):
    config = settings(tmp_path, steps=50, model=str(tiny_folder), mesh=MeshSizes(data=2, fsdp=2),
                      optimizer={"kind": "sgd", "rate": 1e30, "clip": 0.0})
    found, said = codes(start_commands(config, tmp_path))
    assert found == [3, 3], said
