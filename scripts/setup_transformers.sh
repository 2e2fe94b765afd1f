#!/usr/bin/env bash
# Makes .venv-torch, in which tests run stock transformers: version 5, and 4.57 in the folder version4.
# It is an environment of its own, because transformers imports PyTorch wherever both are installed,
# and because its version 4 needs older packages than this project.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

torch="torch>=2.13.0"
five="transformers>=5,<6"
four="transformers>=4.57,<5"

if [ "$(cat .venv-torch/.set-up 2>/dev/null)" != "$torch $five $four" ]; then
    echo "installing PyTorch and transformers into .venv-torch, for tests:" >&2
    rm -rf .venv-torch
    .venv/bin/python -m venv .venv-torch
    pip=(.venv-torch/bin/python -m pip install --disable-pip-version-check --no-compile --quiet)
    "${pip[@]}" "$torch" "$five"
    "${pip[@]}" --target .venv-torch/version4 "$four"
    printf '%s' "$torch $five $four" >.venv-torch/.set-up
fi
