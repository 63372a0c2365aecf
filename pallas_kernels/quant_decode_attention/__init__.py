"""One decode step's attention over packed codes and a full-precision tail."""

from pallas_kernels.quant_decode_attention.api import EMPTY_LSE as EMPTY_LSE
from pallas_kernels.quant_decode_attention.api import (
    quant_decode_attention as quant_decode_attention,
)
