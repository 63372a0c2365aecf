"""Install what was built into clean environments, use it outside the checkout: make check-wheel.

Checks what the wheel and the sdist hold, then runs `jaxlm info`, `generate`, `score` and `demo`
with the wheel, looking at what they print, and imports the package built from the sdist. The
argument is the folder of both files.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("jaxlm/__init__.py", "jaxlm/py.typed", "pallas_kernels/__init__.py",
          "pallas_kernels/py.typed")
LIMIT_MB = 15
COMMANDS = (  # and a pattern that their output holds
    (["jaxlm", "info"], r"jax +\d+\.\d+"),
    (["jaxlm", "generate", "tiny", "Q:12+30=\n", "--max-new-tokens", "16"], r"12\+30=42\nA:42\n"),
    (["jaxlm", "score", "tiny", "--text", "Q:12+30=\n12+30=42\nA:42\n", "--format", "tsv"],
     r"text 0\t23\t-0\.5"),
    (["jaxlm", "demo", "--out", "report"], r""),
)


def one(folder: Path, pattern: str) -> Path:
    """The only file that matches."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"check_wheel: expected one {pattern} in {folder}, found {found}: run make wheel")
    return found[0]


def check_contents(names: list[str], archive: Path) -> None:
    """Everything that is needed is in, nothing else came along, and it is small."""
    bundled = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "jaxlm" / "bundled").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    missing = [name for name in (*NEEDED, *bundled) if name not in names]
    stray = [name for name in names if "__pycache__" in name or name.startswith(".venv")]
    megabytes = archive.stat().st_size / 2**20
    if missing or stray or megabytes > LIMIT_MB:
        sys.exit(f"check_wheel: {archive}: {missing=} {stray=} {megabytes=:.1f} (<= {LIMIT_MB})")
    print(f"{archive.name}: {len(names)} files, {megabytes:.2f} MB")


def install(package: Path, folder: Path) -> Path:
    """A clean environment with the package; its bin folder."""
    subprocess.run([ROOT / "scripts/make_env.sh", folder], check=True)
    pip = [folder / "bin/python", "-m", "pip", "install", "--quiet", package]
    subprocess.run(pip, check=True)
    return folder / "bin"


def use(bin_folder: Path, commands: tuple[tuple[list[str], str], ...], cwd: Path) -> None:
    """Run commands where the checkout cannot be seen; each must print what its pattern finds."""
    hidden = ("PYTHONPATH", "JAXLM_DATA")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    for (name, *arguments), pattern in commands:
        print("$", name, *arguments, flush=True)
        done = subprocess.run([bin_folder / name, *arguments], cwd=cwd, env=environment,
                              stdout=subprocess.PIPE, text=True)
        print(done.stdout, flush=True)
        if done.returncode or not re.search(pattern, done.stdout):
            sys.exit(f"check_wheel: {name} {arguments} gave {done.returncode} and the above; "
                     f"expected 0 and {pattern!r}")


def main() -> None:
    """The command line."""
    folder = Path(sys.argv[1]).resolve()
    wheel, sdist = one(folder, "*.whl"), one(folder, "*.tar.gz")
    check_contents(zipfile.ZipFile(wheel).namelist(), wheel)
    with tarfile.open(sdist) as tar:
        check_contents([name.partition("/")[2] for name in tar.getnames()], sdist)
    with tempfile.TemporaryDirectory() as temporary:
        outside = Path(temporary)
        where = "import jaxlm, pallas_kernels; print(jaxlm.__version__, jaxlm.__file__)"
        bin_folder = install(sdist, outside / "from_sdist")
        found = (["python", "-c", where], re.escape(str(outside.resolve())))
        use(bin_folder, (found,), outside)
        bin_folder = install(wheel, outside / "from_wheel")
        use(bin_folder, (found, *COMMANDS), outside)
        if not list((outside / "report").glob("*.html")):
            sys.exit("check_wheel: `jaxlm demo --out report` wrote no page")
    print("check_wheel: both install and work outside the checkout")


if __name__ == "__main__":
    main()
