# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Sourced by the scripts beside it: makes .venv when it is missing and installs this checkout into it, editable, with the
# tested versions. A second call costs nothing: a stamp says what was installed. Where packages come from is pip's own
# configuration (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, ...).
#
# Two variables choose others than python3 and the tested torch: PYTHON, an interpreter, and TORCH, a release or `newest`.
# With TORCH, the place is not .venv but one for both versions, such as .venv-3.10-torch-2.6.0.

set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
CONSTRAINTS="$ROOT/launch/constraints.txt"
export PIP_DISABLE_PIP_VERSION_CHECK=1
# Packages are installed without bytecode: to compile all of it takes as long as the rest, and most is never used. Python compiles
# a module when it is first imported, and has to be free to keep the result: else each process would compile it again.
unset PYTHONDONTWRITEBYTECODE

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Runs a command with its output in a log file. Shows elapsed seconds on a terminal, and the log when the command fails.
run_logged() {
    local what="$1" log="$2" begin=$SECONDS
    shift 2
    printf '%s ...' "$what"
    "$@" >"$log" 2>&1 </dev/null &
    local job=$!
    while kill -0 "$job" 2>/dev/null; do
        if [[ -t 1 ]]; then printf '\r%s ... %d s ' "$what" $((SECONDS - begin)); fi
        sleep 0.5
    done
    if wait "$job"; then
        if [[ -t 1 ]]; then printf '\r%s ...' "$what"; fi
        printf ' done in %d s\n' $((SECONDS - begin))
    else
        printf ' failed\n'
        cat "$log" >&2
        die "$what: failed; the log above is also in $log"
    fi
}

# choose_versions PYTHON: sets VENV and makes it when it is missing; with TORCH, sets CONSTRAINTS to what goes with that.
choose_versions() {
    local python="$1" version found
    command -v "$python" >/dev/null || die "$python is not on the PATH; install Python 3.10 or newer, or set PYTHON"
    version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "$("$python" --version) at $(command -v "$python") is too old; shardckpt needs 3.10 or newer (set PYTHON to one)"
    if [[ -n "${TORCH:-}" ]]; then
        [[ "$TORCH" =~ ^(newest|[0-9]+(\.[0-9]+)+)$ ]] ||
            die "TORCH is $TORCH, which is neither a release, such as 2.6.0, nor the word newest"
        VENV="$ROOT/.venv-$version-torch-$TORCH"
    fi
    if [[ ! -x "$VENV/bin/python" ]]; then
        "$python" -m venv "$VENV" || die "cannot make $VENV; on Debian and Ubuntu: apt install python3-venv"
    elif [[ -n "${PYTHON:-}" ]]; then
        found="$("$VENV/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
        [[ "$found" == "$version" ]] ||
            die "$VENV holds Python $found, and PYTHON asks for $version; delete it, or set TORCH, too, for a place beside it"
    fi
    if [[ -n "${TORCH:-}" ]]; then
        CONSTRAINTS="$VENV/constraints.txt"
        # releases of torch ask for certain releases of sympy
        grep -vE '^(torch|sympy)==' "$ROOT/launch/constraints.txt" >"$CONSTRAINTS"
        if [[ "$TORCH" != newest ]]; then printf 'torch==%s\n' "$TORCH" >>"$CONSTRAINTS"; fi
    fi
}

# install_into_venv EXTRA: VENV holds shardckpt[EXTRA] afterwards.
install_into_venv() {
    local extra="$1" stamp wanted
    choose_versions "${PYTHON:-python3}"
    stamp="$VENV/installed-$extra"
    wanted="$(cat "$ROOT/setup.cfg" "$ROOT/pyproject.toml" "$CONSTRAINTS" | cksum) $ROOT"
    if [[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]]; then
        run_logged "Installing shardckpt[$extra] into ${VENV##*/}" "$VENV/install.log" "$VENV/bin/python" -m pip install \
            --no-compile --editable "${ROOT}[$extra]" --constraint "$CONSTRAINTS"
        printf '%s\n' "$wanted" >"$stamp"
    fi
}

# What DeepSpeed needs to run; its own setup would pull them in unpinned, and needs torch and these to be built.
DEEPSPEED_NEEDS=(setuptools wheel einops hjson msgpack ninja numpy packaging psutil py-cpuinfo pydantic tqdm)

# install_deepspeed: VENV holds DeepSpeed afterwards, without compiled ops, or a line says that its tests will be skipped.
# Its setup imports torch, so it is built after torch is there and in no environment of its own.
install_deepspeed() {
    local stamp="$VENV/installed-deepspeed" log="$VENV/install-deepspeed.log" wanted
    wanted="$(cksum <"$CONSTRAINTS") ${DEEPSPEED_NEEDS[*]}"
    if [[ "$(cat "$stamp" 2>/dev/null)" == "$wanted" ]]; then return; fi
    if (
        set -e
        run_logged "Installing what DeepSpeed needs into ${VENV##*/}" "$log" "$VENV/bin/python" -m pip install \
            --no-compile --constraint "$CONSTRAINTS" "${DEEPSPEED_NEEDS[@]}"
        run_logged "Building DeepSpeed into ${VENV##*/}" "$log" env DS_BUILD_OPS=0 DS_ACCELERATOR=cpu "$VENV/bin/python" -m pip install \
            --no-compile --no-build-isolation --no-deps --constraint "$CONSTRAINTS" deepspeed
    ); then
        printf '%s\n' "$wanted" >"$stamp"
    else
        printf 'DeepSpeed cannot be installed here: the log above says why. Its tests are skipped.\n' >&2
    fi
}
