"""The logical name of every parameter axis, by the last two parts of its path."""

from jaxlm.core.errors import ConfigError
from jaxlm.models.stack import STACK

AXES: dict[str, tuple[str, ...]] = {
    "embed/table": ("vocab", "embed"),
    "head/table": ("vocab", "embed"),
    "score/table": ("labels", "embed"),
    "score/bias": ("labels",),
    "inner/table": ("mlp", "embed"),
    "inner/bias": ("mlp",),
    "outer/table": ("labels", "mlp"),
    "outer/bias": ("labels",),
    "q/kernel": ("embed", "heads", "head_dim"),
    "k/kernel": ("embed", "kv_heads", "head_dim"),
    "v/kernel": ("embed", "kv_heads", "head_dim"),
    "o/kernel": ("heads", "head_dim", "embed"),
    "q/bias": ("heads", "head_dim"),
    "k/bias": ("kv_heads", "head_dim"),
    "v/bias": ("kv_heads", "head_dim"),
    "gate/kernel": ("embed", "mlp"),
    "up/kernel": ("embed", "mlp"),
    "down/kernel": ("mlp", "embed"),
}


def axes_of(path: str) -> tuple[str, ...]:
    """Axis names of the parameter at `path`; those of stacked layers lead with `layers`.

    >>> axes_of("layers_0/attn/q/kernel")
    ('embed', 'heads', 'head_dim')
    """
    if path.startswith(f"{STACK}/"):
        return ("layers", *axes_of(path.removeprefix(f"{STACK}/")))
    tail = "/".join(path.split("/")[-2:])
    if tail.endswith("/scale"):
        return ("norm",)
    if tail not in AXES:
        raise ConfigError(f"parameter {path!r} has no axis names; known endings: {sorted(AXES)}")
    return AXES[tail]
