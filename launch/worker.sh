#!/usr/bin/env bash
# The part of tpu.sh that runs on the workers of a TPU: worker.sh SUBCOMMAND ARGUMENTS, in the folder of one run.
#
# Every subcommand prints one line, "@simclr-jax worker=N key=value ... last=text", with exit code 0: any other exit code comes
# from the connection. The files of a run: log, process (process ID and start time), rc (the exit code, once the run has ended) and
# stopped (if an operator stopped the run).
# shellcheck disable=SC2329  # the last lines call the subcommands by name
set -Eeuo pipefail
umask 077
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

here=$PWD
venvs=$(dirname "$here")/venvs

# The index of this worker in its slice: from the environment, the VM's metadata, or the host name that Google Cloud assigns.
worker_number() {
  local number=${TPU_WORKER_ID:-} url=http://metadata.google.internal/computeMetadata/v1/instance/attributes
  [[ -n $number || ! -f number ]] || number=$(<number)
  [[ -n $number ]] || number=$(curl -sf -m 3 -H 'Metadata-Flavor: Google' "$url/agent-worker-number" 2>/dev/null) || true
  [[ -n $number ]] || number=$(hostname | sed -n 's/.*-w-\([0-9]*\)$/\1/p')
  [[ $number =~ ^[0-9]+$ ]] || number=0
  echo "$number" >number
  echo "$number"
}

# A single write, so that the lines of several workers do not mix.
answer() { printf '@simclr-jax worker=%s %s\n' "$(worker_number)" "$*"; }

printable() { tr -cd '[:print:]' | cut -c1-300; }

fail() {
  answer "ok=0 last=$(printable <<<"$*")"
  exit 0
}

sha256() { sha256sum "$1" | cut -d' ' -f1; }

# --- setup: installs Python and the pinned packages, or uses the interpreter $1, which must have the packages

setup() {
  local python=$1
  if [[ -z $python ]]; then
    local venv
    venv=$venvs/$(sha256 requirements.txt | cut -c1-16)
    [[ -f $venv/.complete ]] || install_packages "$venv" >setup.log 2>&1 </dev/null ||
      fail "installation failed: $(tail -n 1 setup.log) (see $here/setup.log)"
    python=$venv/bin/python
  fi
  [[ -x $python ]] || fail "$python does not exist"
  echo "$python" >python
  versions
}

install_packages() {
  local venv=$1 python exact=(--require-hashes)
  # Some packages have no wheel. The pinned setuptools builds their wheels, not the newest setuptools.
  sed -n '/^setuptools==/,/[^\\]$/p' requirements.txt >setuptools.txt
  mkdir -p "$venvs"
  exec 9>"$venvs/lock"
  flock 9
  [[ ! -f $venv/.complete ]] || return 0
  rm -rf "$venv"
  if python=$(find_python); then
    "$python" -m venv "$venv" || return 1
    "$venv/bin/python" -m pip install --no-cache-dir --no-deps "${exact[@]}" --only-binary=:all: -r setuptools.txt || return 1
    "$venv/bin/python" -m pip install --no-cache-dir "${exact[@]}" --no-build-isolation -r requirements.txt || return 1
  else
    # Ubuntu 22.04 has Python 3.10. uv installs a newer Python and verifies its checksum.
    python3 -m pip install --no-cache-dir --target uv --upgrade "${exact[@]}" --only-binary=:all: -r uv.txt || return 1
    uv/bin/uv venv --managed-python --python 3.12 "$venv" || return 1
    uv/bin/uv pip install --no-cache --python "$venv/bin/python" "${exact[@]}" --no-deps -r setuptools.txt || return 1
    uv/bin/uv pip install --no-cache --python "$venv/bin/python" "${exact[@]}" --no-build-isolation -r requirements.txt || return 1
  fi
  touch "$venv/.complete"
}

find_python() {
  local name
  for name in python3.13 python3.12 python3.11 python3; do
    "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
    echo "$name"
    return
  done
  return 1
}

# Prints what must be equal on all workers. No package is imported, because importing jax could occupy the TPU.
versions() {
  local found source=none job=none
  [[ ! -f python ]] || found=$("$(<python)" - <<'PY'
import importlib.metadata, platform
names = ('jax', 'jaxlib', 'libtpu', 'flax', 'orbax-checkpoint')
def version(name):
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return 'none'
print(f'python={platform.python_version()}', *(f'{name}={version(name)}' for name in names))
PY
) || fail "$(<python) cannot be run"
  [[ ! -f source.id ]] || source=$(<source.id)
  [[ ! -f job.sh ]] || job=$(sha256 job.sh | cut -c1-16)
  answer "ok=1 source=$source job=$job ${found:-python=none}"
}

# --- sync: unpacks the archive with checksum $1 as the source with ID $2

unpack() {
  [[ $(sha256 source.tgz) == "$1" ]] || fail 'the source archive is corrupt: run tpu.sh sync again'
  local tree=source-${1:0:16}
  [[ $(readlink source 2>/dev/null) == "$tree" ]] || ! alive || fail 'a run with another source is running on this worker: run tpu.sh stop first'
  if [[ ! -d $tree ]]; then
    rm -rf new-source
    mkdir new-source
    tar -xzf source.tgz -C new-source || fail 'cannot unpack the source (disk full?)'
    mv new-source "$tree"
  fi
  ln -sfn "$tree" source
  echo "$2" >source.id
  rm -f source.tgz
  answer "ok=1 source=$2"
}

# --- the run

start_time_of() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }

# Whether the process in the file `process` is running. The start time distinguishes that process from a later one with the same ID.
alive() {
  local pid start_time
  [[ -f process ]] || return 1
  read -r pid start_time <process || return 1
  [[ $start_time == "$(start_time_of "$pid")" && -n $start_time ]]
}

# Prints the other processes that use the TPU. The launcher reports them and does not kill them.
holders() {
  local link pid
  compgen -G '/dev/accel[0-9]*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null || return 0
  find /proc/[0-9]*/fd -lname '/dev/accel[0-9]*' -o -lname '/dev/vfio/[0-9]*' 2>/dev/null | while read -r link; do
    pid=${link#/proc/}
    pid=${pid%%/*}
    echo "process $pid ($(tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | cut -c1-60))"
  done | sort -u | head -n 3 | tr '\n' ' '
}

check() {
  local held
  if alive; then
    answer "ok=1 state=running job=$(sha256 job.sh | cut -c1-16)"
    return
  fi
  held=$(holders)
  [[ -z $held ]] || fail "the TPU is in use by ${held% }: end that process with tpu.sh exec -- kill PID"
  versions
}

start() {
  if alive; then
    answer 'ok=1 state=running'
    return
  fi
  [[ $(sha256 job.sh | cut -c1-16) == "$1" ]] || fail 'job.sh differs from the job.sh that tpu.sh sent'
  [[ ! -f env ]] || chmod 600 env
  rm -f rc stopped process
  local attempt=1
  [[ ! -f attempt ]] || attempt=$(($(<attempt) + 1))
  echo "$attempt" >attempt
  setsid nohup bash "$here/worker.sh" supervise >>log 2>&1 </dev/null &
  local i
  for ((i = 0; i < 100; i++)); do
    [[ ! -f process && ! -f rc ]] || break
    sleep 0.1
  done
  [[ -f process || -f rc ]] || fail "the run did not start: $(tail -n 1 log)"
  answer "ok=1 state=running attempt=$attempt"
}

# Not called over ssh: the parent process of the program, in its own session. It survives the end of the connection. It also survives
# a SIGTERM to all processes, so that it can record the exit code of the program.
supervise() {
  local child code signalled
  trap 'signalled=1' TERM HUP INT
  printf '=== attempt %s, %s, source %s\n' "$(<attempt)" "$(date -u +%FT%TZ)" "$(cat source.id 2>/dev/null || echo none)"
  load_env
  PYTHON=$(<python) SOURCE=$(readlink -f source) sh "$here/job.sh" </dev/null &
  child=$!
  echo "$child $(start_time_of "$child")" >process.new
  mv process.new process
  while
    signalled=
    code=0
    wait "$child" || code=$?
    [[ -n $signalled ]]
  do :; done
  printf '=== exit code %s, %s\n' "$code" "$(date -u +%FT%TZ)"
  echo "$code" >rc.new
  mv rc.new rc
}

# Exports KEY=VALUE lines literally: nothing is expanded.
load_env() {
  local line
  [[ -f env ]] || return 0
  while IFS= read -r line || [[ -n $line ]]; do
    [[ $line =~ ^([A-Za-z_][A-Za-z0-9_]*)=(.*)$ ]] || continue
    export "${BASH_REMATCH[1]}=${BASH_REMATCH[2]}"
  done <./env
}

# Prints the latest checkpoint in the folder $1 on this machine; tpu.sh itself reads gs://.
latest_step() {
  local step best=none
  for step in "$1"/checkpoints/*; do
    step=${step##*/}
    [[ $step =~ ^[0-9]+$ ]] || continue
    ((10#$step > ${best/none/-1})) && best=$((10#$step))
  done
  echo "$best"
}

status() {
  local state=never code=none
  if alive; then
    state=running
  elif [[ -f rc ]]; then
    state=ended code=$(<rc)
  elif [[ -f process ]]; then
    state=lost  # neither running nor ended: the machine went down, or the parent process was killed too
  fi
  local stopped=0 step=none attempt=0 job=none
  [[ ! -f stopped ]] || stopped=1
  [[ $1 == gs://* || -z $1 ]] || step=$(latest_step "$1")
  [[ ! -f attempt ]] || attempt=$(<attempt)
  [[ ! -f job.sh ]] || job=$(sha256 job.sh | cut -c1-16)
  answer "ok=1 state=$state rc=$code stopped=$stopped step=$step attempt=$attempt job=$job last=$(tail -n 1 log 2>/dev/null | printable)"
}

# $1 is the signal. $2 is 1 if an operator asked for the stop, so that the stop is not taken for a preemption.
stop() {
  local pid start_time state=idle
  if alive; then
    read -r pid start_time <process
    [[ $2 == 0 ]] || touch stopped
    # The process of job.sh has become the program (exec). Children of the program are in the process group of the parent.
    kill -s "$1" "$pid" 2>/dev/null || true
    state=signalled
  fi
  answer "ok=1 state=$state"
}

log() { tail -n "$1" log 2>/dev/null || echo '(no log yet)'; }

# Prints the log from byte offset $1, until the run ends.
follow() {
  local size pid=0 start_time
  size=$(stat -c %s log 2>/dev/null || echo 0)
  if (($1 > size)); then set -- 0; fi  # a new VM has a new log
  if alive; then
    read -r pid start_time <process
    tail -c "+$(($1 + 1))" -f --pid="$pid" log
  else
    tail -c "+$(($1 + 1))" log
  fi
}

case $1 in
  setup | versions | unpack | check | start | supervise | status | stop | log | follow)
    "$@"
    exit  # bash must not read further: this file may be replaced before the run ends
    ;;
  *) fail "worker.sh: unknown subcommand $1" ;;
esac
