"""Writing full-precision tokens into packed codes, in place."""

from pallas_kernels.quant_flush.api import quant_flush as quant_flush
