"""jaxlm: Hugging Face checkpoints in JAX, with the methods that go on top of them.

Names are loaded when first used, so that `import jaxlm` costs little beyond `import jax`.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "jaxlm.core.device": ("enable_compilation_cache",),
    "jaxlm.core.errors": ("JaxlmError",),
    "jaxlm.core.mesh": ("make_mesh",),
    "jaxlm.models.attention": ("Mask",),
    "jaxlm.models.config": ("LayerPlan", "ModelConfig", "Rope"),
    "jaxlm.models.lm": ("LM", "Output"),
    "jaxlm.cache.dense": ("Dense",),
    "jaxlm.cache.kivi": ("Kivi",),
    "jaxlm.cache.parse": ("parse_cache",),
    "jaxlm.cache.squat": ("Squat",),
    "jaxlm.hf.bundle": ("Bundle", "load", "save"),
    "jaxlm.hf.tokenizer": ("Tokenizer",),
    "jaxlm.decode.choices": ("choice_logprobs",),
    "jaxlm.decode.contrastive": ("contrast",),
    "jaxlm.decode.samplers": ("Categorical", "Greedy", "Mirostat2", "Temperature"),
    "jaxlm.decode.state": ("DecodeState", "decode_step", "extend", "prefill"),
    "jaxlm.decode.stop": ("Stop",),
    "jaxlm.decode.text": ("text_rule",),
    "jaxlm.decode.generate": ("Generation", "generate", "stream"),
    "jaxlm.decode.score": ("Score", "perplexity", "score"),
    "jaxlm.search.base": ("Steps",),
    "jaxlm.search.beam": ("beam_search", "dvts"),
    "jaxlm.search.gibbs": ("particle_gibbs",),
    "jaxlm.search.particles": ("particle_filter",),
}
_PACKAGES = ("decode",)  # its function of that name is jaxlm.decode.decode
_WHERE = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_WHERE)

if TYPE_CHECKING:  # as in _HOMES; tests/test_public_api.py holds both alike
    from jaxlm import decode as decode
    from jaxlm.cache.dense import Dense as Dense
    from jaxlm.cache.kivi import Kivi as Kivi
    from jaxlm.cache.parse import parse_cache as parse_cache
    from jaxlm.cache.squat import Squat as Squat
    from jaxlm.core.device import enable_compilation_cache as enable_compilation_cache
    from jaxlm.core.errors import JaxlmError as JaxlmError
    from jaxlm.core.mesh import make_mesh as make_mesh
    from jaxlm.decode.choices import choice_logprobs as choice_logprobs
    from jaxlm.decode.contrastive import contrast as contrast
    from jaxlm.decode.generate import Generation as Generation
    from jaxlm.decode.generate import generate as generate
    from jaxlm.decode.generate import stream as stream
    from jaxlm.decode.samplers import Categorical as Categorical
    from jaxlm.decode.samplers import Greedy as Greedy
    from jaxlm.decode.samplers import Mirostat2 as Mirostat2
    from jaxlm.decode.samplers import Temperature as Temperature
    from jaxlm.decode.score import Score as Score
    from jaxlm.decode.score import perplexity as perplexity
    from jaxlm.decode.score import score as score
    from jaxlm.decode.state import DecodeState as DecodeState
    from jaxlm.decode.state import decode_step as decode_step
    from jaxlm.decode.state import extend as extend
    from jaxlm.decode.state import prefill as prefill
    from jaxlm.decode.stop import Stop as Stop
    from jaxlm.decode.text import text_rule as text_rule
    from jaxlm.hf.bundle import Bundle as Bundle
    from jaxlm.hf.bundle import load as load
    from jaxlm.hf.bundle import save as save
    from jaxlm.hf.tokenizer import Tokenizer as Tokenizer
    from jaxlm.models.attention import Mask as Mask
    from jaxlm.models.config import LayerPlan as LayerPlan
    from jaxlm.models.config import ModelConfig as ModelConfig
    from jaxlm.models.config import Rope as Rope
    from jaxlm.models.lm import LM as LM
    from jaxlm.models.lm import Output as Output
    from jaxlm.search.base import Steps as Steps
    from jaxlm.search.beam import beam_search as beam_search
    from jaxlm.search.beam import dvts as dvts
    from jaxlm.search.gibbs import particle_gibbs as particle_gibbs
    from jaxlm.search.particles import particle_filter as particle_filter
else:  # hidden from type checkers, to which any name would be right otherwise

    def __getattr__(name: str) -> Any:
        if name in _PACKAGES:
            return importlib.import_module(f"jaxlm.{name}")
        if name not in _WHERE:
            raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")
        return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
