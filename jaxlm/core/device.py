"""What this machine has: versions, devices, memory, and an accelerator that jax does not use."""

import importlib.metadata
import os
import pathlib
import platform
from typing import Any

import jax

from jaxlm import __version__
from jaxlm.core.errors import ConfigError, DeviceError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers",
            "tokenizers", "safetensors", "numpy", "libtpu", "jax-cuda12-plugin",
            "jax-cuda13-plugin")
EXTRAS = {"NVIDIA GPU": "pip install 'jax[cuda12]' (or cuda13, by `nvidia-smi`)",
          "TPU": "pip install 'jax[tpu]'"}


def versions() -> dict[str, str]:
    """jaxlm's own version and those of what matters to it; absent packages are left out."""
    found = {"python": platform.python_version(), "jaxlm": __version__}
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


def backend() -> str:
    """The platform that jax uses by default: "cpu", "gpu" or "tpu".

    Raises: DeviceError where jax has none, since `JAX_PLATFORMS` names one that does not work.
    """
    try:
        return jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # the second where the plugin is not installed
        asked = getattr(jax.config, "jax_platforms", None)
        why = f"JAX_PLATFORMS={asked} asks for what is not here" if asked else "none started"
        said = str(error).partition("\n")[0].partition(" (set JAX_")[0]
        seen = [f"{name} is visible: {EXTRAS[name]}" for name in visible_accelerators()]
        raise DeviceError(
            f"jax has no device: {why}{said and f' ({said})'}; "
            f"{'; '.join(seen) or 'no accelerator is visible on this machine'}. Everything also "
            "runs on 'cpu': unset JAX_PLATFORMS, or set it to cpu"
        ) from error


def report() -> dict[str, Any]:
    """Versions, devices with their memory in bytes, host memory, and advice where one applies.

    Where jax has no device, "backend" is None and the advice says why.
    """
    try:
        name, count, local = backend(), jax.process_count(), jax.local_devices()
    except DeviceError:
        name, count, local = None, 1, []
    devices = []
    for device in local:
        stats = device.memory_stats() or {}
        devices.append({
            "device": str(device), "kind": device.device_kind, "platform": device.platform,
            "bytes_in_use": stats.get("bytes_in_use"), "bytes_limit": stats.get("bytes_limit"),
        })
    return {
        "versions": versions(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "host_bytes": host_memory(),
        "backend": name,
        "processes": count,
        "devices": devices,
        "compilation_cache": getattr(jax.config, "jax_compilation_cache_dir", None),
        "advice": advice(),
    }


def advice() -> list[str]:
    """What to do about an accelerator that is there but unused, or asked for but not there."""
    try:
        if backend() != "cpu":
            return []
    except DeviceError as error:
        return [str(error)]
    forced = os.environ.get("JAX_PLATFORMS")
    why = f"JAX_PLATFORMS={forced} is set" if forced else "jax was installed without it"
    return [f"{name} is visible but jax uses the CPU: {why}; {EXTRAS[name]}"
            for name in visible_accelerators()]


def require(platform_name: str | jax.Device | None = None) -> list[Any]:
    """The devices of one platform (`cpu`, `gpu`, `tpu`); None: whatever jax uses; of a device, it.

    Raises: DeviceError when there is none, with what was found and what to install; ConfigError
      for what names no platform.
    """
    default = backend()
    if isinstance(platform_name, jax.Device):
        return [platform_name]
    if platform_name is not None and not isinstance(platform_name, str):
        raise ConfigError(f"device is {platform_name!r}; expected 'cpu', 'gpu', 'tpu' or a "
                          "jax.Device")
    try:
        return jax.devices(platform_name)
    except RuntimeError as error:
        hints = "; ".join(advice()) or "no such accelerator is visible on this machine"
        raise DeviceError(
            f"asked for {platform_name!r}, but jax has only {default!r} devices: "
            f"{hints}. Everything also runs on 'cpu'."
        ) from error


def host_memory() -> int | None:
    """Total memory of the host in bytes, where the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def host_memory_left(root: str | os.PathLike = "/") -> int | None:
    """Bytes of the host that are free or freed at need, no more than a container's limit leaves.

    Where the system does not tell, all that the host has.
    """
    def pairs(name: str) -> dict[str, int]:
        lines = (pathlib.Path(root) / name).read_text().replace(":", " ").splitlines()
        return {line.split()[0]: int(line.split()[1]) for line in lines}

    try:
        left = pairs("proc/meminfo")["MemAvailable"] << 10
    except (OSError, KeyError, ValueError):
        return host_memory()
    try:  # cached files count as a container's too, but are let go at need
        limit = int((pathlib.Path(root) / "sys/fs/cgroup/memory.max").read_text())
        return min(left, max(limit - pairs("sys/fs/cgroup/memory.stat")["anon"], 0))
    except (OSError, KeyError, ValueError):  # no container, or one without a limit ("max")
        return left


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
