"""Set up jax before its first import, and find the data that some tests need."""

import gc
import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _configure_jax() -> None:
    """Eight CPU devices, quick compilation, a cache of it; what the environment says wins."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        flags += " --xla_force_host_platform_device_count=8"
    # Less processor time: the programs are small, and most of a test is their compilation.
    if "xla_backend_optimization_level" not in flags and "xla_gpu" not in flags:
        flags += " --xla_backend_optimization_level=0"
    # An XLA ends at once at a flag that it does not know.
    jaxlib = tuple(int(part) for part in version("jaxlib").split(".")[:2])
    # And less again: fusions are compiled the older way, which 0.11 has no more. So it is the
    # newest versions' tests that run the fusions which users get.
    if "xla_cpu_use_fusion_emitters" not in flags and "xla_gpu" not in flags and jaxlib < (0, 11):
        flags += " --xla_cpu_use_fusion_emitters=false"
    # Eight devices on two busy cores may meet late; XLA ends the process after 40 s of waiting.
    if "xla_cpu_collective_call_terminate" not in flags and jaxlib >= (0, 10):
        flags += " --xla_cpu_collective_call_terminate_timeout_seconds=300"
    os.environ["XLA_FLAGS"] = flags
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # libtpu only compiles here: two workers may load it at once, and no TPU need be looked for.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_compilation_cache()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def _compilation_cache() -> Path:
    """One folder per jaxlib and processor: XLA's CPU code does not carry over between either."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = platform.processor()
    processor = hashlib.sha256(features.encode()).hexdigest()[:8]
    base = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return base / "jaxlm-tests" / f"jaxlib{version('jaxlib')}-{processor}"


_configure_jax()


@pytest.fixture(scope="module", autouse=True)
def _few_mappings():
    """Every compiled program maps memory, and Linux allows a process some 65,000 mappings: a long
    run would end in a crash of the compiler."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 20_000:
        import jax

        jax.clear_caches()
        gc.collect()


def _folder(variable: str, default: Path, what: str, marker: str) -> Path:
    folder = Path(os.environ.get(variable, default)).expanduser()
    if not (folder / marker).exists():
        pytest.skip(f"{what} not found: no {marker} in {folder}; set {variable}")
    return folder


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The public data sets (experiments/get_data.py --out FOLDER; JAXLM_DATA=FOLDER)."""
    return _folder("JAXLM_DATA", ROOT.parent / "shared" / "data", "public data sets", "gsm8k")


@pytest.fixture(scope="session")
def models_dir(data_dir: Path) -> Path:
    """The small real checkpoints that stand beside the data sets."""
    if not (data_dir / "models").is_dir():
        pytest.skip(f"small checkpoints not found: no models in {data_dir}")
    return data_dir / "models"


@pytest.fixture(scope="session")
def goldens_dir() -> Path:
    """All reference vectors (JAXLM_GOLDENS=FOLDER); a small part is always at `golden_subset`."""
    default = ROOT.parent / "shared" / "goldens"
    return _folder("JAXLM_GOLDENS", default, "reference vectors", "squat_keys.npz")


@pytest.fixture(scope="session")
def golden_subset() -> Path:
    """The reference vectors committed with the tests."""
    return ROOT / "tests" / "data"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A tiny random Llama as a Hugging Face folder; do not write into it."""
    from tests.tiny import write_folder

    return write_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def bundle(tiny_folder):
    """The tiny model, loaded."""
    from jaxlm.hf.bundle import load

    return load(tiny_folder)
