#!/bin/sh
# Builds the engines of this bundle for the machine that it lies on, and measures them there:
#
#     sh build.sh
#
# Run it again, and it goes on where it stopped. The environment may say
#
#     PYTHON=python3.12   the interpreter, 3.10 or later, that finds the vendor's packages; python3 if not given
#     INSTALL=no          take that interpreter as it is: make no environment, install nothing
set -eu
cd "$(dirname "$0")"

TARGET=@TARGET@
GRAPHS='@GRAPHS@'
MODULE='@MODULE@'
PYTHON=${PYTHON:-python3}

fail() {
    printf 'error: %s\nhint:  %s\n' "$1" "$2" >&2
    exit 1
}

step() {
    printf '== %s\n' "$1" >&2
}

step 'checking the files'
command -v sha256sum >/dev/null || fail 'there is no sha256sum here to check the files with' 'sudo apt-get install coreutils'
if ! said=$(LC_ALL=C sha256sum -c SHA256SUMS 2>&1); then
    damaged=$(printf '%s\n' "$said" | sed -n 's/: FAILED.*//p' | head -n 3 | tr '\n' ' ')
    fail "this bundle is not as it was packed, look at ${damaged:-SHA256SUMS}" 'copy it to this machine again'
fi

command -v "$PYTHON" >/dev/null || fail "there is no $PYTHON here" 'give another: PYTHON=/usr/bin/python3 sh build.sh'
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$PYTHON is older than 3.10" 'give another: PYTHON=/usr/bin/python3.10 sh build.sh; JetPack 6 ships 3.10'

PATH=$PATH:/usr/local/cuda/bin # where JetPack keeps nvcc
export PATH
if [ "${INSTALL:-yes}" = no ]; then
    python=$PYTHON
else
    python=.venv/bin/python
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        step 'making an environment in .venv'
        "$PYTHON" -m venv --system-site-packages .venv || # JetPack's tensorrt is a package of the system
            fail "$PYTHON cannot make an environment" 'sudo apt-get install python3-venv'
    fi
fi
if [ -n "$MODULE" ]; then
    "$python" -c "import $MODULE" ||
        fail "$python does not find $MODULE" 'it comes with JetPack, for its own Python: sudo apt-get install nvidia-jetpack, and PYTHON=/usr/bin/python3'
    "$python" -c 'import pycuda' 2>/dev/null || command -v nvcc >/dev/null ||
        fail 'PyCUDA is built with nvcc, which is not here' 'sudo apt-get install nvidia-jetpack; nvcc is looked for on PATH and in /usr/local/cuda/bin'
fi
if [ "${INSTALL:-yes}" != no ] && ! cmp -s requirements.txt .venv/requirements.txt; then
    step 'installing packages into .venv; PyCUDA takes minutes, where it is among them'
    "$python" -m pip install --quiet --disable-pip-version-check --requirement requirements.txt ||
        fail 'the packages in requirements.txt could not be installed' 'see above; PyCUDA takes nvcc, g++ and python3-dev; without a network, install them another way and run INSTALL=no sh build.sh'
    cp requirements.txt .venv/requirements.txt
fi
command="PYTHONPATH=. $python -m vitedge"
if [ "${INSTALL:-yes}" != no ]; then
    command=.venv/bin/vitedge # runs in any folder
    cat >$command <<'END'
#!/bin/sh
bundle=$(cd "$(dirname "$0")/../.." && pwd)
PYTHONPATH=$bundle${PYTHONPATH:+:$PYTHONPATH} exec "$bundle/.venv/bin/python" -m vitedge "$@"
END
    chmod +x $command
fi

PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # the vitedge that lies here comes before any other
export PYTHONPATH
step 'examining this machine'
"$python" -m vitedge doctor || step 'a backend does not work here; that matters if it is the one that is built for'

engines=
for graph in $GRAPHS; do
    step "building $graph for $TARGET"
    engine=$("$python" -m vitedge build "$graph" --target "$TARGET")
    printf 'engine: %s\n' "$engine"
    engines="$engines $engine"
done

if [ -d images ]; then
    step 'measuring'
    # shellcheck disable=SC2086 # names of engines have no spaces
    "$python" -m vitedge bench $engines --images images --report report.html --json bench.json ||
        fail 'the engines are built, but were not measured: see above' "on the machine that runs them: $command bench$engines --images images"
else
    step 'no images are in this bundle, so nothing is measured'
fi
printf 'to run one: cd %s, then %s run %s --source 0\n' "$PWD" "$command" "${engines##* }"
