#!/usr/bin/env bash
# make_env.sh FOLDER: a virtual environment with pip, from the first Python that is new enough.
# PYTHON=... chooses another. Works where Python ships without ensurepip (Debian), if a pip is there.
set -euo pipefail
folder=${1:?usage: make_env.sh FOLDER}

new_enough() {
  "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

found=
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python}; do
  if new_enough "$candidate"; then found=$candidate; break; fi
done
if [ -z "$found" ]; then
  echo "make_env.sh: needs Python 3.11 or later; tried: ${PYTHON:-python3, python3.11 to 3.14}." \
       "Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2
  exit 1
fi

echo "make_env.sh: $("$found" --version) -> $folder" >&2
# Without ensurepip (Debian's python3 without python3-venv) the pip of that Python serves.
if ! said=$("$found" -m venv --clear "$folder" 2>&1); then
  if ! more=$({ "$found" -m venv --clear --without-pip "$folder" &&
                "$found" -m pip --python "$folder/bin/python" install --quiet pip; } 2>&1); then
    rm -rf "$folder"
    printf '%s\n' "$said" "$more" "make_env.sh: $found can neither make an environment with pip nor" \
      "put one there: install python3-venv (apt install python3-venv) or pip for it, or name" \
      "another Python: make PYTHON=/path/to/python3.12 ..." >&2
    exit 1
  fi
fi
