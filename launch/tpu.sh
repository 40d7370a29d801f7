#!/usr/bin/env bash
# One command from a laptop to a TPU: tpu.sh up --name=... --zone=... --type=v4-32 --workdir=gs://... -- pretrain --config=...
#
# lib.sh checks what was given, cloud.sh speaks to gcloud, run.sh has the parts of `up`, worker.sh is what runs on the TPU. docs/launch.md explains.
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "tpu.sh: bash 4.4 or newer is needed, this is $BASH_VERSION (on macOS: brew install bash, then bash launch/tpu.sh ...)." >&2
  exit 2
fi
set -Eeuo pipefail
shopt -s inherit_errexit
exec 3>&2

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")

# What the command line, the environment, the file and the memory of a name may set.
with_value=(name project zone type version num-slices valid-until max-run-duration network subnet service-account labels disk
  workdir env-file python retries stall backoff poll max-wait grace worker lines)
switches=(spot best-effort reserved flex-start no-queue internal-ip iap autodelete dirty)
moods=(dry-run yes quiet verbose json force follow)  # command line only
declare -A opt=() reply=()
declare -a args=() env_pairs=() nodes=() workers_of=() where=()
state='' found_type='' detail='' why='' family='' chips=0 hosts=0 total=0
billing='' pretended=NONE scratch='' lock='' sleeper='' home='' memory='' bundle='' ssh_tries=5 verb=help

# shellcheck source=launch/lib.sh
. "$here/lib.sh"
# shellcheck source=launch/cloud.sh
. "$here/cloud.sh"
# shellcheck source=launch/run.sh
. "$here/run.sh"

help() {
  cat <<'TEXT'
tpu.sh VERB [FLAGS] [-- WORDS]: runs simclr-jax on Cloud TPUs. docs/launch.md has the whole story.

  up      create, wait, setup, sync, run, watch; recreate and resume after a preemption. -- WORDS of simclr-jax
  doctor  look whether gcloud, account, project, zone, type, bucket and ssh key will do
  create | wait | setup | sync | run -- WORDS | attach        the parts of up, one by one
  status [--json] | logs [-f] [--worker=N|all] | list | fetch [FOLDER] | exec -- COMMAND
  stop [--force]   let the run save and end (--force: kill what is left after --grace)
  resume           run the same words again, on the same workdir
  delete [--yes]   end the billing

Where and what   --name --zone --project --type=v4-32 --num-slices=1 --version (default: by type)
How it is paid   --spot | --best-effort | --reserved | --flex-start, --valid-until=6h --max-run-duration=2d --no-queue
Around it        --network --subnet --internal-ip | --iap --service-account --labels=k=v,... --disk (a data disk)
The run          --workdir=gs://BUCKET/FOLDER --env=KEY=VALUE (repeat) --env-file=FILE (secrets, mode 600) --python=PATH --dirty
Patience         --retries=10 --stall=3 --backoff=15 --poll=30 --max-wait=24h --grace=300 --autodelete
This terminal    --dry-run --yes --quiet --verbose --json --lines=100
Flag, else TPU_NAME and so on in the environment, else tpu.conf here (FLAG = VALUE lines), else what the name was made with.
TEXT
}

# --- what was given

contains() { local x=$1 y; shift; for y in "$@"; do [[ $x != "$y" ]] || return 0; done; return 1; }

parse() {
  verb=${1:-help}
  shift || true
  local word key
  while (($#)); do
    word=$1
    shift
    case $word in
      --) args=("$@") && return ;;
      -f) opt[follow]=1 ;;
      -h | --help) verb=help ;;
      --env=*) env_pairs+=("${word#*=}") ;;
      --env)
        (($#)) || wrong '--env needs KEY=VALUE.'
        env_pairs+=("$1") && shift
        ;;
      --*)
        key=${word#--} key=${key%%=*}
        if contains "$key" "${switches[@]}" "${moods[@]}"; then
          [[ $word != *=* ]] || wrong "--$key takes no value."
          opt[$key]=1
        elif ! contains "$key" "${with_value[@]}"; then
          wrong "no flag --$key$(resembling "$key"); tpu.sh help lists them, and words for simclr-jax go after --."
        elif [[ $word == *=* ]]; then
          opt[$key]=${word#*=}
        else
          (($#)) || wrong "--$key needs a value."
          opt[$key]=$1 && shift
        fi
        [[ -n ${opt[$key]} ]] || wrong "--$key is empty."
        ;;
      *)
        [[ $verb == fetch && ${#args[@]} -eq 0 ]] || wrong "$(posixq "$word") is not understood: flags start with --, and words for simclr-jax go after --."
        args=("$word")
        ;;
    esac
  done
}

resembling() {
  local key
  for key in "${with_value[@]}" "${switches[@]}" "${moods[@]}" env; do
    if [[ $key == "$1"* || $1 == "$key"* || $key == *"$1" ]]; then
      printf ' (is --%s meant?)' "$key"
      return
    fi
  done
}

from_environment() {
  local key name
  for key in name project zone type workdir; do
    name=TPU_${key^^}
    [[ -n ${opt[$key]:-} || -z ${!name:-} ]] || opt[$key]=${!name}
  done
}

# FLAG = VALUE lines; nothing in it is executed.
from_file() {
  local file=$1 line key value n=0
  [[ -f $file ]] || return 0
  while IFS= read -r line || [[ -n $line ]]; do
    n=$((n + 1))
    [[ ! $line =~ ^[[:space:]]*(#.*)?$ ]] || continue
    [[ $line =~ ^[[:space:]]*([a-z-]+)[[:space:]]*=[[:space:]]*(.*[^[:space:]])[[:space:]]*$ ]] ||
      wrong "$file, line $n: FLAG = VALUE is expected."
    key=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
    contains "$key" "${with_value[@]}" "${switches[@]}" || wrong "$file, line $n: there is no flag $key."
    contains "$key" "${with_value[@]}" || [[ $value == 1 ]] || wrong "$file, line $n: $key = 1, or leave it out."
    [[ -n ${opt[$key]:-} ]] || opt[$key]=$value
  done <"$file"
}

from_gcloud() {
  command -v gcloud >/dev/null || return 0
  [[ -z ${opt[dry-run]:-} ]] || return 0
  [[ -n ${opt[project]:-} ]] || opt[project]=$(gcloud config get-value project 2>/dev/null </dev/null | grep -v '^(unset)$' || true)
  [[ -n ${opt[zone]:-} ]] || opt[zone]=$(gcloud config get-value compute/zone 2>/dev/null </dev/null | grep -v '^(unset)$' || true)
}

defaults() {
  local pair
  for pair in num-slices=1 retries=10 stall=3 backoff=15 poll=30 max-wait=24h grace=300 lines=100; do
    [[ -n ${opt[${pair%%=*}]:-} ]] || opt[${pair%%=*}]=${pair#*=}
  done
}

resolve() {
  from_environment
  from_file tpu.conf
  if [[ $verb != list && $verb != doctor ]]; then check_name; fi
  # A name and a place of its own in memory: what the TPU was made with, the words of its run.
  if [[ -n ${opt[name]:-} ]]; then
    [[ ${opt[name]} =~ ^[a-z0-9-]+$ ]] || check_name
    memory=${SIMCLR_JAX_STATE:-${XDG_STATE_HOME:-$HOME/.local/state}/simclr_jax}/${opt[name]}
    home=simclr_jax_runs/${opt[name]}
    # What is made is what is asked for now; the others ask for what was made.
    [[ $verb == up || $verb == create ]] || from_file "$memory/flags"
    bundle=$memory/bundle
    if [[ -n ${opt[dry-run]:-} ]]; then bundle=$scratch; else (umask 077 && mkdir -p "$bundle"); fi
  fi
  defaults
  check_numbers
  check_tier
  check_words
}

remember() {
  [[ -z ${opt[dry-run]:-} ]] || return 0
  local key
  mkdir -p "$memory"
  for key in project zone type num-slices no-queue internal-ip iap workdir python env-file; do
    [[ -z ${opt[$key]:-} ]] || printf '%s = %s\n' "$key" "${opt[$key]}"
  done >"$memory/flags.new"
  mv "$memory/flags.new" "$memory/flags"
  ((${#args[@]} == 0)) || printf '%s\0' "${args[@]}" >"$memory/words"
  ((${#env_pairs[@]} == 0)) || printf '%s\0' "${env_pairs[@]}" >"$memory/env"
}

# --- one launcher a name, and what is left behind

enter() {
  scratch=$(mktemp -d)
  trap leave EXIT
  trap 'interrupted 130' INT
  trap 'interrupted 143' TERM HUP
}

take_lock() {
  [[ -z ${opt[dry-run]:-} ]] || return 0
  local owner
  mkdir -p "$memory"
  if ! mkdir "$memory/lock" 2>/dev/null; then
    owner=$(cat "$memory/lock/pid" 2>/dev/null || echo 0)
    if [[ $owner =~ ^[1-9][0-9]*$ ]] && kill -0 "$owner" 2>/dev/null; then
      die "another tpu.sh (process $owner) is at work on ${opt[name]}: let it end, or end it; status, logs and stop work meanwhile."
    fi
    rm -rf "$memory/lock"  # its owner is gone
    mkdir "$memory/lock" 2>/dev/null || die "another tpu.sh has just started on ${opt[name]}."
  fi
  echo $$ >"$memory/lock/pid"
  lock=$memory/lock
}

leave() {
  [[ -z $sleeper ]] || kill "$sleeper" 2>/dev/null || true
  [[ -z $lock ]] || rm -rf "$lock"
  [[ -z $scratch ]] || rm -rf "$scratch"
}

interrupted() {
  trap '' INT TERM HUP
  printf '\n' >&2
  if [[ -n $billing ]]; then
    {
      printf 'tpu.sh: interrupted. %s in %s (%s x %s) is left as it is: what runs goes on, and it bills until it is deleted.\n' \
        "${opt[name]}" "${opt[zone]}" "${opt[num-slices]}" "${opt[type]:-?}"
      printf '  watch:  %s\n  delete: %s\n' "$(posixq "$0" attach "--name=${opt[name]}")" "$(delete_hint)"
    } >&2
  else
    printf 'tpu.sh: interrupted; nothing was created.\n' >&2
  fi
  exit "$1"
}

confirm() {
  [[ -z ${opt[dry-run]:-}${opt[yes]:-} ]] || return 0
  [[ -t 0 ]] || wrong "$1 Nobody can be asked here: give --yes."
  local reply_to=
  read -r -p "$1 Type $2 to go on: " reply_to
  [[ $reply_to == "$2" ]] || die 'not confirmed, nothing was done.'
}

show_plan() {
  local tier='on demand' key
  for key in spot best-effort reserved flex-start; do [[ -z ${opt[$key]:-} ]] || tier=$key; done
  say "name      ${opt[name]}"
  say "where     ${opt[zone]}, project ${opt[project]:-as gcloud has it}"
  say "TPU       ${opt[num-slices]} x ${opt[type]}: $((chips * ${opt[num-slices]})) chips on $((hosts * ${opt[num-slices]})) hosts, $tier, runtime ${opt[version]:-$(runtime_version)}"
  [[ -z ${opt[workdir]:-} ]] || say "workdir   ${opt[workdir]}"
  ((${#args[@]} == 0)) || say "runs      simclr-jax $(posixq "${args[@]}")"
  for key in "${env_pairs[@]}"; do say "env       ${key%%=*}"; done
  [[ -z ${opt[env-file]:-} ]] || say "secrets   from ${opt[env-file]}, not shown"
}

# --- the verbs

begin() {  # of the verbs about one TPU
  resolve
  need_gcloud
  from_gcloud
  check_place
  place
}

prepare() {  # of those that start a run
  [[ $verb != resume ]] || recall
  check_args
  check_workdir
  check_env
}

recall() {
  [[ -f $memory/words ]] || die "nothing was run under the name ${opt[name]} from here: tpu.sh run -- WORDS."
  ((${#args[@]})) || mapfile -t -d '' args <"$memory/words"
  if ((${#env_pairs[@]} == 0)) && [[ -f $memory/env ]]; then mapfile -t -d '' env_pairs <"$memory/env"; fi
}

do_up() {
  begin
  check_type
  prepare
  show_plan
  warn_workdir
  confirm "This creates $((chips * ${opt[num-slices]})) TPU chips, which are billed." "${opt[name]}"
  take_lock
  remember
  local result=0
  persevere || result=$?
  finish
  return "$result"
}

do_create() {
  begin
  check_type
  show_plan
  confirm "This creates $((chips * ${opt[num-slices]})) TPU chips, which are billed." "${opt[name]}"
  take_lock
  remember
  ensure
}

do_wait() {
  begin
  if [[ -n ${opt[dry-run]:-} ]]; then pretended=ACTIVE; fi
  wait_ready || die "$why"
  say "${opt[name]} is ready."
}

on_workers() {
  begin
  if [[ -n ${opt[dry-run]:-} ]]; then pretended=ACTIVE; fi
  find_workers
}

do_setup() { on_workers && take_lock && { { persist make_home && setup_workers; } || die "$why"; }; }
do_sync() { on_workers && take_lock && { sync_source || die "$why"; }; }

do_run() {
  resolve
  prepare
  on_workers
  show_plan
  warn_workdir
  take_lock
  remember
  start_run || die "$why"
  say "it goes on without this terminal: $(posixq "$0" attach "--name=${opt[name]}")"
}
do_resume() { do_run; }

do_attach() {
  local outcome why='' culprit code step=none running ended lost clean asked never key killed=1 result=0
  on_workers
  [[ -n ${opt[workdir]:-} ]] || opt[workdir]=
  ask status "${opt[workdir]}" || die "$why"
  count_states
  ((never < total)) || die "nothing has been run on ${opt[name]}: tpu.sh run -- WORDS."
  watch
  case $outcome in
    finished) say 'done.' ;;
    stopped) say 'stopped as asked; tpu.sh resume goes on.' && result=75 ;;
    failed) report && result=$code ;;
    *) report && say 'tpu.sh up (the same words) goes on from the last checkpoint.' && result=75 ;;
  esac
  finish
  return "$result"
}

do_status() {
  local step=none running=0 ended=0 lost=0 clean=0 asked=0 never=0 key
  begin
  describe_or_die
  if [[ $state == ACTIVE || $state == READY ]]; then
    find_workers
    ask status "${opt[workdir]:-}" || warn "$why"
    count_states
  fi
  if [[ -n ${opt[json]:-} ]]; then status_json && return; fi
  printf '%s: %s%s\n' "${opt[name]}" "$state" "${detail:+ ($detail)}"
  for key in $(workers); do
    [[ -z $key ]] || printf '%s: %s, exit code %s, attempt %s, checkpoint %s: %s\n' "$(worker_name "$key")" "$(field "$key" state)" \
      "$(field "$key" rc)" "$(field "$key" attempt)" "$(field "$key" step)" "$(field "$key" last)"
  done
}

json_string() {
  local s=${1//\\/\\\\}
  printf '"%s"' "${s//\"/\\\"}"
}

status_json() {
  local key comma='' code n
  printf '{"name": %s, "zone": %s, "type": %s, "state": %s, "workers": [' "$(json_string "${opt[name]}")" \
    "$(json_string "${opt[zone]}")" "$(json_string "$found_type")" "$(json_string "$state")"
  for key in $(workers); do
    [[ -n $key ]] || continue
    code=$(field "$key" rc) n=$(field "$key" step)
    printf '%s{"slice": %s, "worker": %s, "state": %s, "exit_code": %s, "checkpoint": %s, "last": %s}' "$comma" "${key%.*}" "${key#*.}" \
      "$(json_string "$(field "$key" state)")" "${code/none/null}" "${n/none/null}" "$(json_string "$(field "$key" last)")"
    comma=', '
  done
  printf ']}\n'
}

do_logs() {
  on_workers
  local which=${opt[worker]:-0} s w
  if [[ -n ${opt[follow]:-} ]]; then
    [[ $which != all ]] || wrong 'logs -f follows one worker: --worker=N.'
    follow_log "$(slice_of "$which")" "${which#*.}"
    return
  fi
  for s in "${!nodes[@]}"; do
    for ((w = 0; w < workers_of[s]; w++)); do
      [[ $which == all || "$s.$w" == "$(slice_of "$which").${which#*.}" ]] || continue
      [[ $which != all ]] || printf '=== %s\n' "$(worker_name "$s.$w")"
      remote "$s" "$w" "bash $home/worker.sh log ${opt[lines]}"
    done
  done
}

slice_of() { if [[ $1 == *.* ]]; then echo "${1%.*}"; else echo 0; fi; }

# What has come so far is kept in a file, whose size is where to go on after the connection broke.
follow_log() {
  local file=$memory/log.$1.$2 try=0 code size
  mkdir -p "$memory"
  : >"$file"
  while :; do
    size=$(wc -c <"$file")
    code=0
    remote "$1" "$2" "bash $home/worker.sh follow $((size))" 2>"$scratch/ssh" | tee -a "$file" || code=$?
    ((code != 0)) || return 0
    (($(wc -c <"$file") == size)) || try=0
    ((++try <= ssh_tries)) || die "the log of worker $2 cannot be followed: $(tail -n 2 "$scratch/ssh" | tr '\n' ' ')"
    pause "$(backoff "$try")"
  done
}

do_stop() {
  local step running=0 ended lost clean asked never result=0
  on_workers
  say "asking the run on $total workers to save and end"
  stop_all TERM 1 || result=$?
  if ((result == 2)) && [[ -n ${opt[force]:-} ]]; then
    say "$running workers were still at it after ${opt[grace]} s: killing them."
    result=0
    stop_all KILL 1 || result=$?
  fi
  case $result in
    0) say "stopped. ${opt[name]} still bills: $(delete_hint)" ;;
    2) die "$running workers still run after ${opt[grace]} s (--grace): wait, or stop --force." ;;
    *) die "$why" ;;
  esac
}

do_exec() {
  local s code=0
  ((${#args[@]})) || wrong 'which command? tpu.sh exec -- COMMAND WORDS.'
  on_workers
  for s in "${!nodes[@]}"; do
    remote "$s" "${opt[worker]:-all}" "$(posixq "${args[@]}")" || code=$?
  done
  return "$code"
}

do_fetch() {
  begin
  local to=${args[0]:-runs/${opt[name]}}
  check_workdir
  mkdir -p -- "$to"
  if [[ ${opt[workdir]} == gs://* ]]; then
    cloud storage rsync --recursive "${opt[workdir]%/}" "$to"
  else
    on_workers
    local call words
    reach 0 0 scp
    cloud "${call[@]}" --recurse "${opt[name]}:${opt[workdir]%/}" "$to" "${words[@]}"
  fi
  say "fetched to $to"
}

do_delete() {
  begin
  describe_or_die
  if [[ -n ${opt[dry-run]:-} ]]; then state=ACTIVE; fi
  if [[ $state == NONE ]]; then
    say "there is no ${opt[name]} in ${opt[zone]}: nothing to delete."
    return
  fi
  confirm "This deletes ${opt[name]} ($state, $found_type) in ${opt[zone]} and all that is on its disks." "${opt[name]}"
  delete_resource
  say "${opt[name]} is deleted."
}

do_list() {
  resolve
  need_gcloud
  from_gcloud
  check_place
  place
  local columns='name.basename(),state.state,tpu.nodeSpec[0].node.acceleratorType'
  cloud compute tpus queued-resources list "${where[@]}" '--filter=tpu.nodeSpec.node.labels.simclr-jax:*' "--format=value($columns)"
  cloud compute tpus tpu-vm list "${where[@]}" '--filter=labels.simclr-jax:*' '--format=value(name.basename(),state,acceleratorType)'
}

do_doctor() {
  local bad=0 account key
  look() {  # look WHAT MEND COMMAND...
    local what=$1 mend=$2
    shift 2
    if "$@" >"$scratch/look" 2>&1 </dev/null; then printf 'ok    %s\n' "$what"; else
      printf 'FAIL  %s: %s\n' "$what" "$mend" && bad=1
    fi
  }
  resolve
  look 'bash, git, tar, ssh' 'install what is missing' type git tar gzip ssh awk
  look 'gcloud' 'https://cloud.google.com/sdk/docs/install' command -v gcloud
  ((bad == 0)) || return 1
  from_gcloud
  account=$(gcloud auth list --filter=status:ACTIVE '--format=value(account)' 2>/dev/null </dev/null || true)
  look "account ${account:-none}" 'gcloud auth login' test -n "$account"
  look "project ${opt[project]:-none}" 'gcloud config set project PROJECT, or --project' test -n "${opt[project]:-}"
  look "zone ${opt[zone]:-none}" 'gcloud config set compute/zone ZONE, or --zone' test -n "${opt[zone]:-}"
  ((bad == 0)) || return 1
  check_place
  place
  look 'TPU API' 'gcloud services enable tpu.googleapis.com, or ask for the role TPU Admin' gcloud compute tpus queued-resources list "${where[@]}" --limit=1
  if [[ -n ${opt[type]:-} ]]; then
    check_type
    gcloud compute tpus accelerator-types list "${where[@]}" '--format=value(type)' >"$scratch/types" 2>/dev/null </dev/null || true
    look "${opt[type]} in ${opt[zone]}" "not offered there; offered: $(head -c 300 "$scratch/types" | tr '\n' ' ')" grep -qx -- "${opt[type]}" "$scratch/types"
    printf 'note  %s chips: see the quota of %s chips in %s at https://console.cloud.google.com/iam-admin/quotas\n' \
      "$((chips * ${opt[num-slices]}))" "$family" "${opt[zone]}"
  fi
  if [[ -n ${opt[workdir]:-} ]]; then
    check_workdir
    key=${opt[workdir]%/}/.doctor
    [[ ${opt[workdir]} != gs://* ]] || look "${opt[workdir]} can be written" 'create the bucket, or ask for the role Storage Object User' doctor_bucket "$key"
  fi
  look 'ssh key in the agent' 'ssh-add ~/.ssh/google_compute_engine (gcloud makes the key at the first ssh)' ssh-add -l
  return "$bad"
}

doctor_bucket() { echo ok | gcloud storage cp - "$1" && gcloud storage rm "$1"; }

parse "$@"
case $verb in
  help | -h | --help) help ;;
  doctor | create | wait | status | setup | sync | run | logs | attach | stop | resume | up | fetch | exec | delete | list)
    enter
    "do_$verb"
    ;;
  *) wrong "no verb $(posixq "$verb"): doctor, up, create, wait, setup, sync, run, attach, status, logs, stop, resume, fetch, exec, delete, list, help." ;;
esac
