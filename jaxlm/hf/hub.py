"""Fetching a hub id; imported names of huggingface_hub stay inside, since it is slow to import."""

import pathlib

from jaxlm.core.errors import CheckpointError
from jaxlm.hf.config import read_json
from jaxlm.hf.weights import INDEX, PICKLES, SINGLE

# the same weights again in their makers' own layout
OTHER_LAYOUTS = ["consolidated*", "original/*"]
PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "merges.txt", "*.jinja"]
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them


def fetch(name: str, revision: str | None = None, only: str | None = None) -> pathlib.Path:
    """The local folder of a hub id, downloaded where needed; `only` one file of it, if named.

    HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are honoured by huggingface_hub itself.
    Raises: CheckpointError that says what works without a network, what of a model is not in the
      cache, or what its repository lacks.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = pathlib.Path(
            snapshot_download(
                name, revision=revision, allow_patterns=[only] if only else PATTERNS,
                ignore_patterns=OTHER_LAYOUTS
            )
        )
    except Exception as error:  # the hub's errors have no common base beside Exception
        if type(error).__name__ == "IncompleteSnapshotError":  # of newer versions, offline
            raise CheckpointError(_partly(name, error)) from error
        raise CheckpointError(
            f"cannot fetch {name!r} from the hub ({_reason(error)}). Without a "
            "network, pass a local folder, a hub id that is already in the cache, or the bundled "
            "model 'tiny'; for a private model set HF_TOKEN"
        ) from error
    lost = [] if only else missing(folder)
    if lost:
        raise _incomplete(name, revision, folder, lost)
    return folder


def missing(folder: pathlib.Path) -> list[str]:
    """What a fetched folder lacks of a model, in words; empty where it is whole."""
    here = lambda name: (folder / name).exists()
    lost = [] if here("config.json") else ["config.json"]
    if not here(SINGLE):
        shards = read_json(folder / INDEX).get("weight_map") if here(INDEX) else None
        shards = set(map(str, shards.values())) if isinstance(shards, dict) else {SINGLE}
        lost += sorted(shard for shard in shards if not here(shard))
    if not any(map(here, TOKENIZERS)):
        lost.append(f"a tokenizer ({', '.join(TOKENIZERS)})")
    return lost


def _incomplete(
    name: str, revision: str | None, folder: pathlib.Path, lost: list[str]
) -> CheckpointError:
    """Why a fetched folder is no whole model: by the hub's own list where that can be had."""
    from huggingface_hub import list_repo_files

    what = lost[0] if len(lost) == 1 else f"{lost[0]} and {len(lost) - 1} more ({lost[-1]})"
    try:
        listed = list_repo_files(name, revision=revision)
    except Exception as error:
        return CheckpointError(_partly(name, error, f": {what} is not in {folder}"))
    pickles = [file for file in listed if file.endswith(PICKLES)]
    if SINGLE not in listed and INDEX not in listed:
        if pickles:
            return CheckpointError(
                f"{name!r} has its weights on the hub as {pickles[0]}, a pickle, which is never "
                "loaded because it can run code; name a revision with safetensors, or convert it "
                "with transformers' save_pretrained and pass that folder"
            )
        return CheckpointError(
            f"{name!r} has no weights on the hub that jaxlm reads; expected {SINGLE}, or {INDEX} "
            f"with its shards; got {', '.join(sorted(listed)[:8]) or 'no file'}"
        )
    if not set(TOKENIZERS) & set(listed):
        return CheckpointError(
            f"{name!r} has no tokenizer on the hub; expected one of {', '.join(TOKENIZERS)}. Put "
            f"the files of {folder} into a folder of your own, the tokenizer beside them"
        )
    return CheckpointError(f"{name!r} was fetched only in part: {what} is not in {folder}; load it "
                           "again")


def _partly(name: str, error: Exception, what: str = "") -> str:
    """What to say of a model whose rest cannot be fetched now."""
    return (f"{name!r} is only partly in the cache, and the hub cannot be asked for the rest "
            f"({_reason(error)}){what}. Load it once with a network, and with HF_HUB_OFFLINE unset "
            "where it is set: it loads without one from then on. Else pass a local folder, or the "
            "bundled model 'tiny'")


def _reason(error: Exception) -> str:
    """An error's kind and first line."""
    words = str(error).strip().splitlines() or [type(error).__name__]
    return f"{type(error).__name__}: {words[0]}"
