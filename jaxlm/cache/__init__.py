"""Cache kinds: frozen descriptions with pure functions over one layer's state."""

from jaxlm.cache.base import CacheKind as CacheKind
from jaxlm.cache.base import init_caches as init_caches
from jaxlm.cache.compat import ReferenceKivi as ReferenceKivi
from jaxlm.cache.compat import ReferenceSquat as ReferenceSquat
from jaxlm.cache.dense import Dense as Dense
from jaxlm.cache.kivi import Kivi as Kivi
from jaxlm.cache.rotated import RotatedKivi as RotatedKivi
from jaxlm.cache.rotated import RotatedSquat as RotatedSquat
from jaxlm.cache.squat import Squat as Squat
from jaxlm.cache.turboquant import TurboQuant as TurboQuant
