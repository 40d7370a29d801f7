#!/usr/bin/env bash
# The part of tpu.sh that runs on the workers of a TPU: worker.sh VERB WORDS, in the folder of one run.
#
# Every verb answers with one line, "@simclr-jax worker=N key=value ... last=text", and ends with 0: any other exit code is
# the connection's. What a run leaves behind: log, process (its number and start time), rc once it has ended, stopped if it was asked to.
# shellcheck disable=SC2329  # the verbs are called by their names, in the last lines
set -Eeuo pipefail
umask 077
cd "$(dirname "${BASH_SOURCE[0]}")"

here=$PWD
venvs=$(dirname "$here")/venvs

# Of this worker in its slice: told by the environment, by the VM's metadata, or by the name that Google gives to hosts.
worker_number() {
  local number=${TPU_WORKER_ID:-} url=http://metadata.google.internal/computeMetadata/v1/instance/attributes
  [[ -n $number || ! -f number ]] || number=$(<number)
  [[ -n $number ]] || number=$(curl -sf -m 3 -H 'Metadata-Flavor: Google' "$url/agent-worker-number" 2>/dev/null) || true
  [[ -n $number ]] || number=$(hostname | sed -n 's/.*-w-\([0-9]*\)$/\1/p')
  [[ $number =~ ^[0-9]+$ ]] || number=0
  echo "$number" >number
  echo "$number"
}

# One write, so that the lines of many workers do not mix.
answer() { printf '@simclr-jax worker=%s %s\n' "$(worker_number)" "$*"; }

printable() { tr -cd '[:print:]' | cut -c1-300; }

give_up() {
  answer "ok=0 last=$(printable <<<"$*")"
  exit 0
}

sha256() { sha256sum "$1" | cut -d' ' -f1; }

# --- setup: python and the pinned packages, or the interpreter $1 that has them

setup() {
  local python=$1
  if [[ -z $python ]]; then
    local venv
    venv=$venvs/$(sha256 requirements.txt | cut -c1-16)
    [[ -f $venv/.complete ]] || install_packages "$venv" >setup.log 2>&1 </dev/null ||
      give_up "installing failed: $(tail -n 1 setup.log) (more in $here/setup.log)"
    python=$venv/bin/python
  fi
  [[ -x $python ]] || give_up "$python is not there"
  echo "$python" >python
  versions
}

install_packages() {
  local venv=$1 python exact=(--require-hashes)
  # A package or two is not built beforehand: the pinned setuptools does it, not whatever is newest.
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
    # Ubuntu 22.04 has Python 3.10. uv brings its own and knows its checksum.
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

# What has to be equal on all the workers. Nothing is imported: that would take the TPU.
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
) || give_up "$(<python) does not run"
  [[ ! -f source.id ]] || source=$(<source.id)
  [[ ! -f job.sh ]] || job=$(sha256 job.sh | cut -c1-16)
  answer "ok=1 source=$source job=$job ${found:-python=none}"
}

# --- sync: the archive whose checksum is $1 becomes the source tree $2

unpack() {
  [[ $(sha256 source.tgz) == "$1" ]] || give_up 'the copy of the source is damaged: sync again'
  local tree=source-${1:0:16}
  [[ $(readlink source 2>/dev/null) == "$tree" ]] || ! alive || give_up 'a run is under way here, with another source: stop it first'
  if [[ ! -d $tree ]]; then
    rm -rf new-source
    mkdir new-source
    tar -xzf source.tgz -C new-source || give_up 'the source cannot be unpacked (disk full?)'
    mv new-source "$tree"
  fi
  ln -sfn "$tree" source
  echo "$2" >source.id
  rm -f source.tgz
  answer "ok=1 source=$2"
}

# --- the run

started_at() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }

# Whether the program whose number is in the file runs: the start time tells it from a later process with its number.
alive() {
  local pid began
  [[ -f process ]] || return 1
  read -r pid began <process || return 1
  [[ $began == "$(started_at "$pid")" && -n $began ]]
}

# Others that hold the TPU. They are named and left alone.
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
  [[ -z $held ]] || give_up "the TPU is held by ${held}already, which was left alone: end it with tpu.sh exec -- kill PROCESS"
  versions
}

start() {
  if alive; then
    answer 'ok=1 state=running'
    return
  fi
  [[ $(sha256 job.sh | cut -c1-16) == "$1" ]] || give_up 'job.sh is another one than was sent'
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
  [[ -f process || -f rc ]] || give_up "it did not start: $(tail -n 1 log)"
  answer "ok=1 state=running attempt=$attempt"
}

# Not for ssh: the parent of the program, in a session of its own. It outlives the connection, and it outlives a SIGTERM to all
# processes to write down how the program took it.
supervise() {
  local child code signalled
  trap 'signalled=1' TERM HUP INT
  printf '=== attempt %s, %s, source %s\n' "$(<attempt)" "$(date -u +%FT%TZ)" "$(cat source.id 2>/dev/null || echo none)"
  load_env
  PYTHON=$(<python) SOURCE=$(readlink -f source) sh "$here/job.sh" </dev/null &
  child=$!
  echo "$child $(started_at "$child")" >process.new
  mv process.new process
  while
    signalled=
    code=0
    wait "$child" || code=$?
    [[ -n $signalled ]]
  do :; done
  printf '=== ended with %s, %s\n' "$code" "$(date -u +%FT%TZ)"
  echo "$code" >rc.new
  mv rc.new rc
}

# KEY=VALUE lines as they stand: nothing is expanded.
load_env() {
  local line
  [[ -f env ]] || return 0
  while IFS= read -r line || [[ -n $line ]]; do
    [[ $line =~ ^([A-Za-z_][A-Za-z0-9_]*)=(.*)$ ]] || continue
    export "${BASH_REMATCH[1]}=${BASH_REMATCH[2]}"
  done <./env
}

# The newest checkpoint in a folder $1 of this machine's own; tpu.sh looks after gs:// itself.
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
    state=lost  # neither alive nor ended: the machine went down, or somebody killed its parent too
  fi
  local stopped=0 step=none attempt=0 job=none
  [[ ! -f stopped ]] || stopped=1
  [[ $1 == gs://* || -z $1 ]] || step=$(latest_step "$1")
  [[ ! -f attempt ]] || attempt=$(<attempt)
  [[ ! -f job.sh ]] || job=$(sha256 job.sh | cut -c1-16)
  answer "ok=1 state=$state rc=$code stopped=$stopped step=$step attempt=$attempt job=$job last=$(tail -n 1 log 2>/dev/null | printable)"
}

# $1 is the signal, $2 whether an operator wants it: then it is not a preemption.
stop() {
  local pid began state=idle
  if alive; then
    read -r pid began <process
    [[ $2 == 0 ]] || touch stopped
    # job.sh has become the program; its own children, if any, are in the same group as the parent.
    kill -s "$1" "$pid" 2>/dev/null || true
    state=signalled
  fi
  answer "ok=1 state=$state"
}

log() { tail -n "$1" log 2>/dev/null || echo '(nothing logged yet)'; }

# The log from byte $1 on, until the run ends.
follow() {
  local size pid=0 began
  size=$(stat -c %s log 2>/dev/null || echo 0)
  if (($1 > size)); then set -- 0; fi  # another VM, another log
  if alive; then
    read -r pid began <process
    tail -c "+$(($1 + 1))" -f --pid="$pid" log
  else
    tail -c "+$(($1 + 1))" log
  fi
}

case $1 in
  setup | versions | unpack | check | start | supervise | status | stop | log | follow)
    "$@"
    exit  # read already: this file may be another one by the time a run ends
    ;;
  *) give_up "worker.sh knows no $1" ;;
esac
