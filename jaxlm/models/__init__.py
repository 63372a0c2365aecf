"""Decoders: configuration, layers, attention, and the LM handle."""

from jaxlm.models.attention import Mask as Mask
from jaxlm.models.config import AttentionSpec as AttentionSpec
from jaxlm.models.config import LayerPlan as LayerPlan
from jaxlm.models.config import ModelConfig as ModelConfig
from jaxlm.models.config import Rope as Rope
from jaxlm.models.lm import LM as LM
from jaxlm.models.lm import Output as Output
