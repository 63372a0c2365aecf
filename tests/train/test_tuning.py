"""What is common to every way of tuning, and full fine-tuning."""

import jax
import pytest

from jaxlm.models.config import ModelConfig
from jaxlm.models.lm import LM
from jaxlm.models.stack import stack, stack_axes
from jaxlm.train.tuning import Full

CONFIG = ModelConfig(vocab_size=16, dim=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4,
                     ffn_dim=16)


@pytest.mark.parametrize("stacked", [False, True])
def test_full_tuning_is_placed_as_the_parameters_are(stacked):
    lm = LM(CONFIG)
    shapes, names = lm.shapes(), lm.axes()
    if stacked:
        shapes = jax.eval_shape(lambda tree: stack(tree, CONFIG), shapes)
        names = stack_axes(names, CONFIG)
    assert Full().axes(shapes, {}) == (names, {})
