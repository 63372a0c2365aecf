"""Kernels over packed 2-, 4- and 8-bit key and value codes; needs jax and numpy only.

One folder an operation: `api.py` (dispatch), `reference.py`, `xla.py`, `tpu.py`, `gpu.py`,
`specs.py`.
"""
