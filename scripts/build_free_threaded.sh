#!/usr/bin/env bash
# Builds a CPython without the GIL, and runs with it the tests that are to prove the guard there.
#
#   scripts/build_free_threaded.sh SOURCE PREFIX   build and install it, then run the tests
#   scripts/build_free_threaded.sh --tests PYTHON  run the tests with one that is there
#
# SOURCE is a tarball of CPython 3.14 or later (Python-3.14.2.tar.xz), or the folder of a source
# package (`apt-get source python3.14`). It needs a C compiler, make, and the headers of OpenSSL,
# zlib and libffi (`apt-get build-dep python3`). Until all of this has passed, free-threaded builds
# are declared nowhere: not in the classifiers, and not in docs/coverage.md.
set -euo pipefail
here=$(realpath "$(dirname "$0")/..")

fail() { echo "build_free_threaded: $*" >&2; exit 1; }

usage() { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }

# Prints the folder of the source, unpacked into $1 where it is a tarball.
source_in() {
    if [ -f "$2" ]; then
        tar -xf "$2" -C "$1" --strip-components 1 || fail "$2 cannot be unpacked"
        set -- "$1" "$1"
    fi
    [ -x "$2/configure" ] || fail "$2 has no configure: neither a tarball nor the source of CPython"
    (cd "$2" && pwd)
}

build() {
    local work source prefix
    prefix=$(realpath -m "$2")
    work=$(mktemp -d)
    # shellcheck disable=SC2064 # The name of now is meant.
    trap "rm -rf '$work'" EXIT
    mkdir "$work/source" "$work/build"
    source=$(source_in "$work/source" "$1")
    (
        cd "$work/build"
        "$source/configure" --prefix="$prefix" --disable-gil --with-ensurepip=install
        make -s -j"$(nproc)"
        make -s install
    )
}

run_tests() {
    local python=$1 venv
    "$python" -c 'import sys, sysconfig; sys.exit(not sysconfig.get_config_var("Py_GIL_DISABLED"))' ||
        fail "$python is no free-threaded build"
    venv=$(mktemp -d)
    "$python" -m venv "$venv"
    # Without the part in C, which is not declared to be safe there.
    CLOSEWAIT_GUARD_SPEEDUPS=0 "$venv/bin/python" -m pip install -q -e "${here}[test]"
    # A package in C that does not declare itself safe turns the GIL on, and makes this no proof.
    PYTHON_GIL=0 "$venv/bin/python" -c 'import sys; sys.exit(sys._is_gil_enabled())' ||
        fail "the GIL is on in spite of PYTHON_GIL=0"
    cd "$here"
    PYTHON_GIL=0 "$venv/bin/python" -m pytest -q -p no:cacheprovider \
        tests/test_harmless.py tests/test_cpython.py tests/capture tests/adversarial/test_races.py
    rm -rf "$venv"
}

case $#:${1:-} in
    2:--tests) run_tests "$2" ;;
    2:-*) usage ;;
    2:*)
        build "$1" "$2"
        run_tests "$2/bin/python3"
        ;;
    *) usage ;;
esac
