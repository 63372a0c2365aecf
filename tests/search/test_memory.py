"""What is counted before a search begins: a reward model too, and every copy on a mesh."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxlm.core.device import host_memory, host_memory_left
from jaxlm.core.errors import DeviceError
from jaxlm.core.mesh import make_mesh, shardings
from jaxlm.core.tree import nbytes
from jaxlm.decode.samplers import Categorical
from jaxlm.decode.state import layer_kinds
from jaxlm.rewards import PLAIN, process_reward
from jaxlm.rewards.base import Stateless
from jaxlm.search.base import Steps
from jaxlm.search.memory import RESERVE, device_limit, estimate, placed_bytes, reward_bytes
from jaxlm.search.particles import filter_of
from jaxlm.search.run import make_task, prompts_of, start
from tests.rewards.twins import PROBLEMS, twin
from tests.search import toy

STEPS, LIMIT = Steps("\n", tokens=8, max_steps=4, max_new_tokens=32), 2**24


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return twin(folder / "policy", None), twin(folder / "judge", 2)


def ask(policy, reward, particles, memory=None):
    return make_task(policy, PROBLEMS, reward, filter_of("odds", 1.0, 0.5, "systematic"),
                     particles=particles, steps=STEPS, sampler=Categorical(1.0), cache="dense",
                     key=jax.random.key(0), memory=memory)


@pytest.mark.parametrize("on_device", [True, False])
def test_a_reward_model_counts_with_all_that_it_will_hold(models, on_device):
    policy, judge = models
    reward = process_reward(judge, policy, layout=PLAIN, on_device=on_device)
    task = ask(policy, reward, 4)
    pop, carry = start(task, range(3))
    held = (reward, pop.carry) if on_device else (reward.params, carry.state)
    given = prompts_of(task, range(3))
    assert reward_bytes(reward, given, 4, STEPS.max_new_tokens) == nbytes(held)
    assert nbytes(held) > nbytes(judge.params)


def test_the_number_that_fits_is_that_with_the_reward_model(models):
    policy, judge = models
    rewards = process_reward(judge, policy, layout=PLAIN), Stateless(lambda rows: rows.length_B)
    fits = []
    for reward in rewards:
        with pytest.raises(DeviceError, match=r"; (\d+) particles fit") as error:
            ask(policy, reward, 100_000, LIMIT)
        fits.append(int(str(error.value).split("; ")[1].split(" ")[0]))
        ask(policy, reward, fits[-1], LIMIT)
        with pytest.raises(DeviceError):
            ask(policy, reward, fits[-1] + 1, LIMIT)
    assert 4 < fits[0] < fits[1]


def test_a_reward_of_the_host_is_not_asked_and_one_without_shapes_counts_its_parameters():
    table = np.ones(5, np.float32)

    class Reading:
        on_device = True

        def init(self, prompts, particles, slots):
            return np.asarray(jax.numpy.ones(2) + 1)  # numbers that only a run has

    class Host:
        on_device = False  # and init is not there to be called

    assert reward_bytes(Host(), None, 2, 8) == 0
    made = jax.tree_util.register_pytree_node(
        Reading, lambda reward: ((jax.numpy.asarray(table),), None), lambda _, leaves: Reading())
    assert made is None and reward_bytes(Reading(), None, 2, 8) == table.nbytes


def test_a_cpu_has_what_its_host_has_left_once_for_all_its_devices(models, monkeypatch):
    policy, judge = models
    monkeypatch.setattr("jaxlm.search.memory.host_memory_left", lambda: 2**20)
    held = placed_bytes(jax.live_arrays("cpu"))
    assert held >= nbytes(policy.params) + nbytes(judge.params)
    model, mesh = toy.bundle(), make_mesh(data=8)
    spread = replace(model, params=jax.device_put(
        model.params, shardings(model.lm.axes(), model.lm.shapes(), mesh)))
    for some in (policy, spread):
        limit = device_limit(some)
        assert limit == int((1 - RESERVE) * (2**20 + placed_bytes(jax.live_arrays("cpu"))))
    monkeypatch.setattr("jaxlm.search.memory.host_memory_left", lambda: 2**40)
    ask(policy, Stateless(lambda rows: rows.length_B), 100_000)
    monkeypatch.setattr("jaxlm.search.memory.host_memory_left", lambda: 2**26)
    with pytest.raises(DeviceError, match="particles fit"):
        ask(policy, Stateless(lambda rows: rows.length_B), 100_000)
    monkeypatch.setattr("jaxlm.search.memory.host_memory_left", lambda: None)
    assert device_limit(policy) is None


def test_what_a_host_has_left_is_less_in_a_container(tmp_path):
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    assert host_memory_left(tmp_path) == host_memory()  # it does not say: all that there is
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:   900 kB\nMemAvailable:    500 kB\n")
    assert host_memory_left(tmp_path) == 500 << 10
    (group / "memory.stat").write_text("anon 1024\nfile 400000\n")
    for limit, left in (("max", 500 << 10), (str(101 << 10), 100 << 10), (str(9**9), 500 << 10),
                        ("100", 0)):
        (group / "memory.max").write_text(f"{limit}\n")
        assert host_memory_left(tmp_path) == left
    assert 0 < host_memory_left() <= host_memory()


def test_a_parameter_counts_as_often_as_a_mesh_holds_it():
    model, mesh = toy.bundle(), make_mesh(data=8)
    places = shardings(model.lm.axes(), model.lm.shapes(), mesh)
    spread = jax.device_put(model.params, places)
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(spread)
               for shard in leaf.addressable_shards)
    count = lambda params: estimate(
        model.lm, params, layer_kinds(model.lm, "dense"), 8, 32, 4, 4).params
    assert count(spread) == held > nbytes(model.params) == count(model.params)
