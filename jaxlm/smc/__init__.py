"""Sequential Monte Carlo over any state-space model: it knows nothing of language models.

`filter` (weights carried, resampling below a threshold, unbiased evidence), `gibbs` (conditional
SMC, ancestor sampling, replica swaps), `entropic` (tempered early steps), `resample`, `weights`.
"""

from jaxlm.smc.entropic import temperature as temperature
from jaxlm.smc.filter import Info as Info
from jaxlm.smc.filter import Model as Model
from jaxlm.smc.filter import State as State
from jaxlm.smc.filter import init as init
from jaxlm.smc.filter import run as run
from jaxlm.smc.filter import step as step
from jaxlm.smc.gibbs import GibbsInfo as GibbsInfo
from jaxlm.smc.gibbs import GibbsState as GibbsState
from jaxlm.smc.gibbs import swap as swap
from jaxlm.smc.gibbs import sweep as sweep
from jaxlm.smc.resample import ancestors as ancestors
from jaxlm.smc.weights import effective_size as effective_size
from jaxlm.smc.weights import normalise as normalise
from jaxlm.smc.weights import standard_error as standard_error
