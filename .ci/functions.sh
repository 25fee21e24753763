# What .ci/run and .ci/matrix share; to be sourced.

# python_of VERSION: prints the path of that Python, from the PATH or pyenv, or says that it is missing.
python_of() {
    if command -v "python$1" > /dev/null && "python$1" -c "" 2> /dev/null; then
        command -v "python$1"
        return
    fi
    local root found
    root=${PYENV_ROOT:-$HOME/.pyenv}
    found=$(ls -d "$root/versions/$1".*/bin/python 2> /dev/null | sort -V | tail -n 1)
    if [ -z "$found" ]; then
        echo "Python $1 is missing: install it as python$1 on the PATH, or by \`pyenv install $1\`." >&2
        return 1
    fi
    echo "$found"
}

# fresh_environment FOLDER VERSION [PIP ARGUMENT...]: makes and enters a virtual environment with the
# package and what its tests need.
fresh_environment() {
    local python
    python=$(python_of "$2") || return 1
    "$python" -m venv "$1" || return 1
    source "$1/bin/activate"
    pip install --quiet -e ".[test]" "${@:3}"
}
