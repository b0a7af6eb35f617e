#!/bin/sh
# Makes the virtual environment .venv and installs everything into it with one pip command; a second run does nothing
# while the stamp still matches. RECSYS_EMBED_DEVICE=cpu|cuda overrides the choice of builds, PYTHON the interpreter,
# RECSYS_EMBED_VENV the folder.
set -eu
cd "$(dirname "$0")/.."
venv=${RECSYS_EMBED_VENV:-.venv}
cpu_index=${RECSYS_EMBED_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
in_range='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'
die() { printf 'setup: %s\n' "$1" >&2; exit 1; }
works() { "$1" -c "$in_range" >/dev/null 2>&1; }
trap 'printf "\nsetup: interrupted; run it again to start over\n" >&2; exit 130' INT TERM

device=${RECSYS_EMBED_DEVICE:-}
if [ -z "$device" ]; then
  device=cpu
  if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then device=cuda; fi
fi
case $device in cpu | cuda) ;; *) die "RECSYS_EMBED_DEVICE must be cpu or cuda; got '$device'" ;; esac

peers=tests/requirements-peers.txt
# The folder is part of the key: an editable install and the scripts' first lines point at it.
key="$(cat pyproject.toml packaging/*/pyproject.toml ops/cpu/* scripts/setup.sh $peers 2>/dev/null | cksum) $device $(pwd)"
if works "$venv/bin/python" && [ "$(cat "$venv/.setup-done" 2>/dev/null)" = "$key" ]; then exit 0; fi

# Wheels may be half unpacked where an earlier run was cut off, which pip would take for installed: start over.
if [ -e "$venv/.setup-started" ] || { [ -e "$venv/pyvenv.cfg" ] && ! works "$venv/bin/python"; }; then rm -rf "$venv"; fi
if ! [ -e "$venv/bin/python" ]; then
  py=
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
    if works "$candidate"; then py=$candidate && break; fi
  done
  [ -n "$py" ] || die "needs Python 3.11, 3.12 or 3.13, found none${PYTHON:+ (PYTHON=$PYTHON)}; install one or set PYTHON"
  "$py" -c 'import venv, ensurepip' 2>/dev/null || die "$py cannot make virtual environments; install its venv package"
fi
[ "$device" = cpu ] && need=3 || need=10
free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
[ "$free" -ge "$need" ] || die "no space: the $device install needs $need GiB, $free GiB are free in $(pwd)"
[ -e "$venv/bin/python" ] || "$py" -m venv "$venv" || die "could not make $venv"
rm -f "$venv/.setup-done"
: >"$venv/.setup-started"

set -- "torch==2.13.0"
if [ "$device" = cpu ]; then
  [ "$(uname -sm)" != "Linux x86_64" ] || set -- "$@" ./packaging/fbgemm-gpu-cpu-shim
  # pip retries an unreachable index for every package, hence the probe; the alarm also ends a hanging name look-up.
  if "$venv/bin/python" -c 'import signal, sys, urllib.request as u; signal.alarm(3); u.urlopen(sys.argv[1], timeout=3)' \
    "$cpu_index/torch/" >/dev/null 2>&1; then set -- "$@" --extra-index-url "$cpu_index"; fi
fi
log=$venv/setup.log
rm -f "$log"
echo "setup: installing the $device builds into $venv (about 1.8 GB on disk for cpu, 8 GB for cuda; log in $log)"
if ! "$venv/bin/python" -m pip --disable-pip-version-check install --log "$log" "$@" -e '.[all,dev]'; then
  why=$(grep -o -m 1 'No space left on device' "$log" || grep -o -m 1 'No matching distribution found for .*' "$log" || true)
  if grep -q 'from versions: none' "$log"; then why="no package index answers, or none has this for the Python used: $why"; fi
  if grep -q -E 'NewConnectionError|NameResolutionError|ConnectTimeout|Network is unreachable' "$log"; then why="no network"; fi
  die "the install failed: ${why:-see the lines above}; log in $log; run it again to start over"
fi
if ! conflicts=$("$venv/bin/python" -m pip --disable-pip-version-check check); then
  # Where this venv had the libraries of $peers already, they lack what they ask for, as they are meant to.
  left=$({ cat "$peers" 2>/dev/null || true; echo --; printf '%s\n' "$conflicts"; } | awk -F '[^A-Za-z0-9._-]' \
    '$0 == "--" { past = 1; next } past && !($1 in theirs) { print } !past { theirs[$1] }')
  [ -z "$left" ] || { printf '%s\n' "$left"; die "installed packages disagree (lines above)"; }
fi
# After the check, since these come without what they ask for; tests and examples do without them.
if [ -e "$peers" ] && ! "$venv/bin/python" -m pip --disable-pip-version-check -q install --no-deps -r "$peers"; then
  echo "setup: the libraries of $peers did not install; what compresses their models will be skipped"
fi
rm -f "$venv/.setup-started"
printf '%s\n' "$key" >"$venv/.setup-done"
