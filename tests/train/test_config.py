"""Settings from YAML: what is wrong is named, with the closest that there is."""

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.core.errors import ConfigError
from jaxlm.train import Config, Lora, Osft, read_config
from jaxlm.train.config import TUNINGS, from_dict, to_dict
from jaxlm.train.config import settings as compared
from jaxlm.train.matrices import PROJECTIONS
from tests.source_tree import ROOT


def read(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    return read_config(tmp_path / "c.yaml")


def test_what_yaml_says_is_what_there_is(tmp_path):
    config = read(tmp_path, """
        model: org/name
        data: {train: [a.jsonl, b.jsonl], window: 512}
        tuning: {kind: lora, rank: 4, targets: [q, v]}
        optimizer: {kind: lion, rate: 1e-4}
        batch_tokens: 4096
        epochs: 2
        mesh: {fsdp: 4}
    """)
    assert config.data.train == ("a.jsonl", "b.jsonl") and config.rows == 8
    assert config.tuning == Lora(rank=4, targets=("q", "v"))
    assert config.optimizer.rate == 1e-4 and config.mesh.fsdp == 4
    assert hash(config) == hash(from_dict(Config, to_dict(config)))


@pytest.mark.parametrize(("text", "said"), [
    ("modle: tiny", "field modle is unknown; expected one of model.*did you mean 'model'"),
    ("data: {windwo: 3}", "field data.windwo .*did you mean 'window'"),
    ("tuning: {kind: lorra}", "tuning.kind 'lorra' is unknown.*did you mean 'lora'"),
    ("tuning: {kind: lora, rnk: 3}", "field tuning.rnk .*did you mean 'rank'"),
    ("tuning: {kind: lora, rank: 0}", "tuning.rank is 0"),
    ("tuning: {kind: lora, alpha: .nan}", "tuning.alpha is nan"),
    ("tuning: {kind: olora, rank: 0}", "tuning.rank is 0"),
    ("tuning: {kind: olora, weight: -1}", "tuning.weight is -1.0"),
    ("tuning: {kind: ewc, weight: -5}", "tuning.weight is -5.0; expected a number of at least 0"),
    ("tuning: {kind: ewc, decay: 9}", r"tuning.decay is 9.0; expected a number in \[0.0, 1.0\]"),
    ("checkpoint_minutes: .inf", "checkpoint_minutes is inf"),
    ("previous: a", "of the ways of tuning only olora and ewc"),
    ("optimizer: {kind: adam}", "optimizer.kind 'adam' is unknown.*'adamw'"),
    ("optimizer: {rate: fast}", "optimizer.rate is 'fast'; expected float"),
    ("optimizer: {rate: -1}", "optimizer.rate is -1.0; expected a number of at least 0"),
    ("optimizer: {rate: .nan}", "optimizer.rate is nan"),
    ("optimizer: {b2: 1.0}", r"optimizer.b2 is 1.0; expected a share in \[0, 1\)"),
    ("data: {train: a.jsonl}", r"data.train is 'a.jsonl'; expected a list, as in \[a.jsonl\]"),
    ("data: {train: [3]}", r"data.train\[0\] is 3; expected str"),
    ("data: {window: 0}", "data.window is 0"), ("data: {window: 1.5}", "data.window is 1.5"),
    ("data: {long: trim}", "data.long 'trim' is unknown"),
    ("data: {pack: 1}", "data.pack is 1; expected bool"), ("data: 3", "data is 3; expected fields"),
    ("data: {phased: true}\nsteps: 3", "data.phased needs epochs"),
    ("batch: 8\nbatch_tokens: 1024", "batch and batch_tokens are both given"),
    ("steps: 8\nepochs: 1", "steps and epochs are both given"),
    ("batch_tokens: 1000", "batch_tokens is 1000; expected a multiple of data.window, 1024"),
    ("batch: 8\naccumulate: 3", "a batch of 8 rows does not divide into accumulate: 3"),
    ("steps: true", "steps is True"), ("- 1", "the config is"), ("a: [", "is not YAML"),
    ("!!python/object/apply:os.system [ls]", "is not YAML"), ("dtype: float16", "'float16'"),
])
def test_what_is_wrong_is_named(tmp_path, text, said):
    with pytest.raises(ConfigError, match=rf"c.yaml.*{said}"):
        read(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot read .*none.yaml"):
        read_config(tmp_path / "none.yaml")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5)


@given(st.sampled_from([f.name for f in dataclasses.fields(Config)]), VALUES)
@settings(max_examples=300, deadline=None)
def test_any_value_is_taken_or_refused_with_its_field(name, value):
    try:
        found = from_dict(Config, {name: value})
    except ConfigError as error:
        assert name in str(error)
    else:
        assert isinstance(hash(found), int)


def test_what_a_continuation_may_change():
    base = Config(steps=10)
    same = base.replace(steps=20, out="b", checkpoint_every=3, keep=5)
    assert compared(base) == compared(same)
    cosine = dataclasses.replace(base.optimizer, schedule="cosine")
    longer = base.replace(steps=20, optimizer=cosine)
    assert compared(longer) != compared(longer.replace(steps=10))
    assert compared(base) != compared(base.replace(tuning=Osft()))


def test_the_table_of_tunings_has_every_field_and_its_default():
    page = (ROOT / "docs" / "train.md").read_text().split("Their fields, with `kind`")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in page.split("\n\n")[1].splitlines()[2:]]
    found, kind = {}, ""
    for name, fields, defaults, _ in rows:
        kind = name.strip("`") or kind
        fields = re.findall(r"`(\w+)`", fields)
        values = defaults.split(", ") if len(fields) == len(defaults.split(", ")) else [
            defaults] * len(fields)
        found |= {(kind, f): v.strip("`") for f, v in zip(fields, values, strict=True)}
    words = {PROJECTIONS: "all seven projections", (): "none"}
    wanted = {(kind, f.name): words.get(f.default, str(f.default)) if isinstance(
        f.default, tuple) else str(f.default)
        for kind, tuning in TUNINGS.items() for f in dataclasses.fields(tuning)}
    wanted |= {("olora", f.name): "as lora" for f in dataclasses.fields(Lora)}
    assert {k: v.replace("`", "") for k, v in found.items()} == wanted and len(PROJECTIONS) == 7


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "configs").glob("*.yaml")),
                         ids=lambda p: p.stem)
def test_the_documented_configs_are_right(path):
    assert read_config(path).steps or read_config(path).epochs
