"""Two processes over jax.distributed on loopback: they give what one gives, and none waits on.

What runs in them is `experiments/pod_generate.py`, the script for a pod.
"""

import json
import signal
import time

import jax
import numpy as np
import pytest

from experiments.pod_generate import PROMPTS, ended, finish, start
from jaxlm.cache.parse import parse_cache
from jaxlm.core.errors import ConfigError, DeviceError
from jaxlm.core.hosts import check_same, is_writer, spans_processes, to_host, together
from jaxlm.core.mesh import make_mesh
from jaxlm.decode.generate import generate
from jaxlm.decode.samplers import Greedy, Temperature
from jaxlm.decode.score import score
from jaxlm.hf.bundle import save
from tests.tiny import contents, weights, write_folder

MESH = ("--fsdp", "2", "--tensor", "2")  # four devices, two a process: none holds a whole matrix


def test_alone_everything_is_at_hand():
    tree = {"a": jax.numpy.arange(3), "b": np.ones(2)}
    assert not spans_processes(tree) and not spans_processes(None)
    assert not spans_processes(make_mesh(devices=jax.devices()[:1]))
    jax.tree.map(np.testing.assert_array_equal, to_host(tree), tree)
    assert is_writer(True) and is_writer(False)
    for shared in (True, False):
        with pytest.raises(ConfigError, match="mine"), together(shared):
            raise ConfigError("mine")


@pytest.mark.parametrize(("cache", "tokens"), [
    ("dense", 6), pytest.param("squat2", 40, marks=pytest.mark.slow),
])
def test_two_processes_give_what_one_gives(tiny_folder, bundle, tmp_path, cache, tokens):
    """Text, scores and, to the bit, the exported folder."""
    stop = ["e", "zq"]
    running = start(2, 2, *MESH, "--stop", *stop, "--model", str(tiny_folder),
                    "--tokens", str(tokens),
                    "--cache", cache, "--save", f"{tmp_path}/two", "--out", f"{tmp_path}/two.json")
    answers = generate(bundle, PROMPTS, max_new_tokens=tokens, sampler=Temperature(0.8),
                       cache=parse_cache(cache), key=jax.random.key(0), stop=stop)
    scores = score(bundle, [p + a.text for p, a in zip(PROMPTS, answers, strict=True)])
    save(bundle, tmp_path / "one")
    finish(running)
    found = json.loads((tmp_path / "two.json").read_text())["metrics"]
    assert (found["processes"], found["devices"]) == (2, 4)
    assert found["bytes_of_this_process"] < 0.6 * sum(x.nbytes for x in weights().values())
    assert found["texts"] == [answer.text for answer in answers]
    expected = [score.logprobs.sum() for score in scores]
    np.testing.assert_allclose(found["logprobs"], expected, rtol=1e-5)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two", "two.json"]


@pytest.mark.slow
def test_a_file_damaged_for_one_stops_both(tmp_path):
    write_folder(tmp_path / "0")
    broken = weights()
    broken["model.layers.1.mlp.up_proj.weight"][-1] = np.nan  # in the second process's half
    write_folder(tmp_path / "1", tensors=broken)
    codes, said = ended(start(2, 2, *MESH, "--model", f"{tmp_path}/{{process}}"), 120)
    assert all(codes)
    assert "up_proj.weight' holds NaN" in said[1]
    assert "process 1 failed, so all stop" in said[0] and "up_proj.weight' holds NaN" in said[0]


class Told(Exception):
    """What a process would tell the others, before any compute."""


def digest(bundle, monkeypatch, **settings):
    """What a process would tell the others of one call of `generate`."""
    def tell(mine):
        raise Told(mine.tobytes())

    monkeypatch.setattr("jaxlm.core.mesh.spans_processes", lambda mesh: True)
    monkeypatch.setattr("jaxlm.core.hosts.multihost_utils.process_allgather", tell)
    one = bundle.replace(mesh=make_mesh(devices=jax.devices()[:1]))
    with pytest.raises(Told) as told:
        generate(one, PROMPTS[-1], **{"max_new_tokens": 1, **settings})
    return told.value.args[0]


def test_every_setting_is_compared(bundle, monkeypatch):
    """A process that differs in one alone would draw other tokens, or stop at another place."""
    mine = digest(bundle, monkeypatch)
    assert mine == digest(bundle, monkeypatch, sampler=Greedy(), cache=parse_cache("dense"))
    others = [
        {"sampler": Temperature(0.8)}, {"sampler": Temperature(0.9)},
        {"sampler": Temperature(0.8, top_k=3)}, {"stop": "e"}, {"stop": "z"},
        {"stop": "z", "include_stop": True}, {"stop_ids": [3]}, {"max_new_tokens": 2},
        {"max_len": 9}, {"cache": "squat2"}, {"cache": "squat4"}, {"key": jax.random.key(1)},
    ]
    found = [digest(bundle, monkeypatch, **other) for other in others]
    assert len({mine, *found}) == 1 + len(others)


def test_addresses_of_functions_are_no_difference(monkeypatch):
    told = []
    gather = lambda mine: told.append(mine.tobytes()) or mine
    monkeypatch.setattr("jaxlm.core.hosts.multihost_utils.process_allgather", gather)
    for _ in range(2):
        check_same("it", (lambda x: x, 1.5, None))
    check_same("it", (lambda x: x, 1.25, None))
    assert told[0] == told[1] != told[2]


@pytest.mark.slow
@pytest.mark.parametrize("differs", [
    ("--seed", "{process}"), ("--stop", "{process}"), ("--tokens", "1{process}"),
], ids=lambda flags: flags[0])
def test_what_differs_is_refused(tiny_folder, differs):
    """Or each process would draw its own token, and call it the batch's."""
    codes, said = ended(start(2, 2, *MESH, "--model", str(tiny_folder), "--tokens", "1",
                              *differs), 120)
    assert all(codes) and all("give every process the same" in text for text in said), said


@pytest.mark.slow
def test_a_folder_that_exists_stops_both(tiny_folder, tmp_path):
    (tmp_path / "there").mkdir()
    codes, said = ended(start(2, 2, *MESH, "--model", str(tiny_folder), "--tokens", "1",
                              "--save", f"{tmp_path}/there"), 120)
    assert all(codes)
    assert "exists; pass overwrite=True" in said[0]
    assert DeviceError.__name__ in said[1] and "exists; pass overwrite=True" in said[1]
    assert not list((tmp_path / "there").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_lost_the_other_ends(tiny_folder, victim, how):
    """Both have loaded and are about to compute together."""
    running = start(2, 2, *MESH, "--model", str(tiny_folder), "--tokens", "100",
                    "--heartbeat", "10")
    assert "loaded" in next(line for line in running[victim].stderr if "loaded" in line)
    begin = time.monotonic()
    running[victim].send_signal(how)
    try:
        running[1 - victim].communicate(timeout=100)
    finally:
        for process in running:
            process.kill()
    assert running[1 - victim].returncode not in (0, None, -signal.SIGKILL)
    assert time.monotonic() - begin < 60
