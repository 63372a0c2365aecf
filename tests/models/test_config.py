"""A configuration is checked when it is made, and hashed by value."""

import math

import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.models.config import LayerPlan, ModelConfig, Rope
from jaxlm.models.lm import LM
from tests.tiny import CONFIG


@pytest.mark.parametrize("field, value", [
    *[(name, bad) for name in ("vocab_size", "dim", "num_layers", "num_kv_heads", "head_dim")
      for bad in (0, -1, 2.0, True, "8", None, 2**31)],
    ("num_layers", 2000), ("num_heads", 3), ("head_dim", 7), ("activation", "relu"),
    ("windows", (4,)), ("windows", [4, None]), ("windows", (0, None)), ("windows", (True, None)),
    *[(name, bad) for name in ("norm_eps", "embed_scale", "logit_divisor")
      for bad in (0, -1.0, math.nan, math.inf, "1", None)],
    ("attention_softcap", 0.0), ("norm_offset", math.nan),
])
def test_bad_fields_are_named(field, value):
    with pytest.raises(ConfigError) as error:
        CONFIG.replace(**{field: value})
    assert field.split("_")[-1] in str(error.value) and "expected" in str(error.value) or (
        field in str(error.value)
    )


@pytest.mark.parametrize("arguments", [
    {"kind": "yarn"}, {"theta": 0.0}, {"theta": math.nan}, {"factor": -1.0}, {"theta": "1"},
    {"kind": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0},
])
def test_bad_rope_is_named(arguments):
    with pytest.raises(ConfigError, match="rope " + [*arguments][-1]):
        Rope(**arguments)


def test_hash_is_by_value():
    again = ModelConfig(**{name: getattr(CONFIG, name) for name in vars(CONFIG)})
    assert again == CONFIG and hash(again) == hash(CONFIG) and again is not CONFIG
    assert hash(CONFIG.replace(dim=np.int64(16))) == hash(CONFIG)
    assert CONFIG.replace(norm_eps=1e-6) != CONFIG


def test_bad_plans_are_refused():
    with pytest.raises(ConfigError, match="plan has 1 entries for 2 layers"):
        LM(CONFIG, (LayerPlan(),))
    with pytest.raises(ConfigError, match="expected a tuple of LayerPlan"):
        LM(CONFIG, [LayerPlan()] * 2)
    with pytest.raises(ConfigError, match="mlp_scale is nan; expected a finite number"):
        LayerPlan(mlp_scale=math.nan)
    with pytest.raises(ConfigError, match="labels is 0; expected a whole number"):
        LM(CONFIG, labels=0)
