"""Decoding: the state, samplers, generation and scoring.

What a program of its own is composed from is named here: the functions on a `DecodeState`, the
samplers, the stop rules, and what moves rows. `generate`, `stream`, `score` and
`contrast` are in `jaxlm`.
"""

from jaxlm.decode.batcher import Batcher as Batcher
from jaxlm.decode.contrastive import Contrast as Contrast
from jaxlm.decode.contrastive import contrastive_decode as contrastive_decode
from jaxlm.decode.rows import fork as fork
from jaxlm.decode.rows import gather as gather
from jaxlm.decode.rows import release as release
from jaxlm.decode.rows import repeat as repeat
from jaxlm.decode.samplers import Categorical as Categorical
from jaxlm.decode.samplers import Greedy as Greedy
from jaxlm.decode.samplers import Mirostat2 as Mirostat2
from jaxlm.decode.samplers import Sampler as Sampler
from jaxlm.decode.samplers import Temperature as Temperature
from jaxlm.decode.samplers import bias_array as bias_array
from jaxlm.decode.state import DecodeState as DecodeState
from jaxlm.decode.state import compact as compact
from jaxlm.decode.state import decode as decode
from jaxlm.decode.state import decode_step as decode_step
from jaxlm.decode.state import extend as extend
from jaxlm.decode.state import prefill as prefill
from jaxlm.decode.stop import Stop as Stop
from jaxlm.decode.stop import stop_rule as stop_rule
from jaxlm.decode.text import text_rule as text_rule
from jaxlm.decode.vocabulary import token_bytes as token_bytes
