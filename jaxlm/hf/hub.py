"""Fetching a hub id; imported names of huggingface_hub stay inside, since it is slow to import."""

import pathlib

from jaxlm.core.errors import CheckpointError

# the same weights again in their makers' own layout
OTHER_LAYOUTS = ["consolidated*", "original/*"]
PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "merges.txt", "*.jinja"]


def fetch(name: str, revision: str | None = None, only: str | None = None) -> pathlib.Path:
    """The local folder of a hub id, downloaded where needed; `only` one file of it, if named.

    HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are honoured by huggingface_hub itself.
    Raises: CheckpointError that says what works without a network.
    """
    from huggingface_hub import snapshot_download

    try:
        return pathlib.Path(
            snapshot_download(
                name, revision=revision, allow_patterns=[only] if only else PATTERNS,
                ignore_patterns=OTHER_LAYOUTS
            )
        )
    except Exception as error:  # the hub's errors have no common base beside Exception
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"cannot fetch {name!r} from the hub ({type(error).__name__}: {reason}). Without a "
            "network, pass a local folder, a hub id that is already in the cache, or the bundled "
            "model 'tiny'; for a private model set HF_TOKEN"
        ) from error
