"""What this machine has: versions, devices, memory, and an accelerator that jax does not use."""

import importlib.metadata
import os
import pathlib
import platform
from typing import Any

import jax

from jaxlm.core.errors import DeviceError

PACKAGES = ("jaxlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers",
            "tokenizers", "safetensors", "numpy", "libtpu", "jax-cuda12-plugin",
            "jax-cuda13-plugin")


def versions() -> dict[str, str]:
    """Installed versions of what matters here; absent packages are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def visible_accelerators() -> list[str]:
    """Accelerators that the machine shows, whether or not jax uses them."""
    found = []
    nvidia = ("/proc/driver/nvidia/version", "/dev/nvidia0")
    if any(pathlib.Path(path).exists() for path in nvidia):
        found.append("NVIDIA GPU")
    if list(pathlib.Path("/dev").glob("accel*")) or pathlib.Path("/dev/vfio/0").exists():
        found.append("TPU")
    return found


def report() -> dict[str, Any]:
    """Versions, devices with their memory in bytes, host memory, and advice where one applies."""
    devices = []
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        devices.append({
            "device": str(device), "kind": device.device_kind, "platform": device.platform,
            "bytes_in_use": stats.get("bytes_in_use"), "bytes_limit": stats.get("bytes_limit"),
        })
    return {
        "versions": versions(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "host_bytes": host_memory(),
        "backend": jax.default_backend(),
        "processes": jax.process_count(),
        "devices": devices,
        "compilation_cache": getattr(jax.config, "jax_compilation_cache_dir", None),
        "advice": advice(),
    }


def advice() -> list[str]:
    """What to do about an accelerator that is there but unused."""
    if jax.default_backend() != "cpu":
        return []
    extras = {"NVIDIA GPU": "pip install 'jaxlm[cuda12]' (or cuda13, by `nvidia-smi`)",
              "TPU": "pip install 'jaxlm[tpu]'"}
    forced = os.environ.get("JAX_PLATFORMS")
    why = f"JAX_PLATFORMS={forced} is set" if forced else "jax was installed without it"
    return [f"{name} is visible but jax uses the CPU: {why}; {extras[name]}"
            for name in visible_accelerators()]


def require(platform_name: str) -> list[Any]:
    """The devices of one platform (`cpu`, `gpu`, `tpu`).

    Raises: DeviceError when there is none, with what was found and what to install.
    """
    try:
        return jax.devices(platform_name)
    except RuntimeError as error:
        hints = "; ".join(advice()) or "no such accelerator is visible on this machine"
        raise DeviceError(
            f"asked for {platform_name!r}, but jax has only {jax.default_backend()!r} devices: "
            f"{hints}. Everything also runs on 'cpu'."
        ) from error


def host_memory() -> int | None:
    """Total memory of the host in bytes, where the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def enable_compilation_cache(folder: str | os.PathLike | None = None) -> pathlib.Path:
    """Keep compiled programs on disk, so that the second start is quick.

    Args: folder: default `$JAXLM_CACHE`, else `jaxlm/xla` in the user's cache folder.
    """
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    path = pathlib.Path(folder or os.environ.get("JAXLM_CACHE") or
                        pathlib.Path(base) / "jaxlm" / "xla")
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path
