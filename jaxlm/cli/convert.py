"""`jaxlm convert`: write a checkpoint anew, and prove that it computes the same."""

from typing import Annotated, Literal

import tyro

from jaxlm.cli.options import Names, note
from jaxlm.eval.verify import TEXTS, check_verifiable
from jaxlm.eval.verify import verify as compare_with_transformers
from jaxlm.hf.convert import convert

Source = Annotated[str, tyro.conf.arg(metavar="SOURCE")]
Folder = Annotated[str, tyro.conf.arg(metavar="FOLDER")]


def run(
    source: Source, folder: Folder, /,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    overwrite: bool = False, verify: bool = False, tolerance: float | None = None,
    text: tuple[str, ...] = (), revision: str | None = None, ignore_fields: Names = (),
    check_tokenizer: bool = True,
) -> int:
    """Read a checkpoint, check every tensor, and write a folder that transformers loads.

    Args:
      source: a model folder or a hub id such as org/name.
      folder: where the new checkpoint goes.
      dtype: of the new tensors; default their own.
      overwrite: replace the folder if it exists.
      verify: compare jaxlm on the new folder with transformers on the source (needs torch, and a
        language model; asked for before anything is converted).
      tolerance: largest difference of logits that passes; default 1e-2 where no weight was
        rounded. Top-1 agreement and KL have bounds of their own (jaxlm.eval.verify.BOUNDS).
      text: texts to compare on; default a few short ones.
      revision: of a hub id.
      ignore_fields: of config.json, unknown to jaxlm, that you know not to change the maths.
      check_tokenizer: refuse a tokenizer that looks like another model's.
    Returns: the exit code, 1 where the verification failed.
    """
    if verify:
        check_verifiable(source, revision)
    written = convert(source, folder, dtype, overwrite=overwrite, revision=revision,
                      ignore_fields=ignore_fields, check_tokenizer=check_tokenizer)
    print(f"wrote {written}")
    if not verify:
        return 0
    found = compare_with_transformers(
        written, text or TEXTS, reference=source, revision=revision, tolerance=tolerance
    )
    print(found)
    if found.passed:
        print("passed")
        return 0
    note(f"jaxlm: {written} does not compute what transformers does on {source}: "
         f"{'; '.join(found.faults)}. Do not use the folder before this is explained")
    return 1
