# Other scripts source this file. It makes .venv with everything that the project needs. It runs pip
# again only if pyproject.toml has changed.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

find_python() {
    local name
    for name in "${PYTHON:-}" python3.11 python3.12 python3.13 python3.14 python3 python; do
        if [ -n "$name" ] && "$name" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "need Python 3.11 or newer with venv; set PYTHON to its name" >&2
    return 1
}

set_up() {
    local python wanted
    wanted=$(cksum <pyproject.toml)
    if [ ! -f .venv/.set-up ] || [ "$(cat .venv/.set-up)" != "$wanted" ]; then
        python=$(find_python) || return 1
        echo "setting up .venv with $python" >&2
        "$python" -m venv .venv || return 1
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' || return 1
        printf '%s' "$wanted" >.venv/.set-up
    fi
    PATH="$PWD/.venv/bin:$PATH"
    export PATH
}

set_up || exit 1
