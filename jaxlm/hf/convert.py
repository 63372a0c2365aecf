"""One checkpoint to another: checked, cast, and written as a folder that transformers loads."""

import os
import pathlib
from collections.abc import Sequence

from jaxlm.core.errors import ConfigError
from jaxlm.hf.bundle import load, save

DTYPES = ("float32", "bfloat16", "float16")


def convert(
    source: str | os.PathLike, folder: str | os.PathLike, dtype: str | None = None, *,
    overwrite: bool = False, revision: str | None = None, ignore_fields: Sequence[str] = (),
    check_tokenizer: bool = True,
) -> pathlib.Path:
    """Read `source`, every tensor checked, and write it to `folder` as safetensors.

    Args:
      source: a model folder or hub id.
      dtype: of the new tensors, one of DTYPES; default their own.
      ignore_fields, check_tokenizer: as `load` takes them.
    Returns: the folder.
    Raises: what `load` and `save` raise; ConfigError for another dtype. float16 ends at 65,504: a
      larger weight is an error, not an infinity.
    """
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"dtype is {dtype!r}; expected one of {DTYPES}, or None for their own")
    bundle = load(source, dtype="own" if dtype is None else dtype, revision=revision,
                  ignore_fields=ignore_fields, check_tokenizer=check_tokenizer)
    return save(bundle, folder, overwrite=overwrite)
