"""`jaxlm convert`: write a checkpoint anew, and prove that it computes the same."""

from typing import Annotated, Literal

import tyro

from jaxlm.core.errors import CheckpointError
from jaxlm.eval.verify import TEXTS
from jaxlm.eval.verify import verify as compare_with_transformers
from jaxlm.hf.convert import convert

Source = Annotated[str, tyro.conf.arg(metavar="SOURCE")]
Folder = Annotated[str, tyro.conf.arg(metavar="FOLDER")]


def run(
    source: Source, folder: Folder, /,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    overwrite: bool = False, verify: bool = False, tolerance: float | None = None,
    text: tuple[str, ...] = (), revision: str | None = None,
) -> None:
    """Read a checkpoint, check every tensor, and write a folder that transformers loads.

    Args:
      source: a model folder or a hub id such as org/name.
      folder: where the new checkpoint goes.
      dtype: of the new tensors; default their own.
      overwrite: replace the folder if it exists.
      verify: compare jaxlm on the new folder with transformers on the source (needs torch).
      tolerance: largest difference of logits that passes; default 1e-3, or none with --dtype.
      text: texts to compare on; default a few short ones.
      revision: of a hub id.
    """
    written = convert(source, folder, dtype, overwrite=overwrite, revision=revision)
    print(f"wrote {written}")
    if not verify:
        return
    found = compare_with_transformers(
        written, text or TEXTS, reference=source, revision=revision
    )
    print(found)
    limit = 1e-3 if tolerance is None and dtype is None else tolerance
    if limit is not None and not found.max_logit_error <= limit:
        raise CheckpointError(
            f"{written}: logits differ by {found.max_logit_error:.2e} from transformers' on "
            f"{source}; expected at most {limit:g}. Do not use the folder before this is explained"
        )
