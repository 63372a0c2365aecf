"""jaxlm: Hugging Face checkpoints in JAX, with the methods that go on top of them.

Names are loaded when first used, so that `import jaxlm` costs little beyond `import jax`.
"""

import importlib
from typing import Any

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


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"jaxlm.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
