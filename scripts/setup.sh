# Other scripts source this file. It makes .venv with what a user needs, and with the extras of
# pyproject.toml that the argument names: `. setup.sh dev`, or `. setup.sh ""` for none. It runs pip
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

# Names each package on the way. Modules are compiled when they are used, not all of them now.
install() {
    local what name
    .venv/bin/python -m pip install --disable-pip-version-check --no-compile -e "$1" |
        while read -r what name _; do
            case "$what $name" in
                "Collecting "*) echo "  ${name%%[<>=!~;[]*}" ;;
                "Installing collected") echo "  all are here: unpacking them" ;;
            esac
        done >&2
    return "${PIPESTATUS[0]}"
}

set_up() {
    local python wanted extras=$1
    wanted=$(cksum <pyproject.toml)
    if [ "$(cat ".venv/.set-up-${extras:-user}" 2>/dev/null)" != "$wanted" ]; then
        if ! [ -x .venv/bin/python ]; then
            python=$(find_python) || return 1
            echo "making .venv with $python ..." >&2
            "$python" -m venv .venv || return 1
        fi
        echo "installing into .venv, from the network or pip's cache:" >&2
        install ".${extras:+[$extras]}" || return 1
        for name in user "${extras:-user}"; do
            printf '%s' "$wanted" >".venv/.set-up-$name"
        done
    fi
    PATH="$PWD/.venv/bin:$PATH"
    export PATH
}

set_up "${1:-}" || exit 1
