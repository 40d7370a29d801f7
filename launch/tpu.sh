#!/usr/bin/env bash
# One command from a laptop to a TPU: tpu.sh up --name=... --zone=... --type=v4-32 --workdir=gs://... -- pretrain --config=...
#
# lib.sh checks flags and arguments, cloud.sh calls gcloud, run.sh has the steps of `up`, worker.sh runs on the TPU VMs. Documentation: docs/launch.md.
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "tpu.sh: bash 4.4 or newer is required, this is $BASH_VERSION (on macOS: brew install bash, then bash launch/tpu.sh ...)." >&2
  exit 2
fi
set -Eeuo pipefail
shopt -s inherit_errexit
exec 3>&2

here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname -- "$here")

# Flags for the command line, tpu.conf and the saved flags of a TPU.
with_value=(name project zone type version num-slices valid-until max-run-duration network subnet service-account labels disk
  workdir env-file python retries stall backoff poll max-wait grace worker lines)
switches=(spot best-effort reserved flex-start no-queue internal-ip iap autodelete dirty)
cli_only=(dry-run yes quiet verbose json force follow)  # command line only
declare -A opt=() reply=()
declare -a args=() env_pairs=() nodes=() workers_of=() location=()
state='' found_type='' detail='' why='' family='' chips=0 hosts=0 total=0
billing='' dry_run_state=NONE scratch='' lock='' sleeper='' home='' state_dir='' bundle='' ssh_tries=5 subcommand=help

# shellcheck source=launch/lib.sh
. "$here/lib.sh"
# shellcheck source=launch/cloud.sh
. "$here/cloud.sh"
# shellcheck source=launch/run.sh
. "$here/run.sh"

help() {
  cat <<'TEXT'
tpu.sh COMMAND [FLAGS] [-- ARGUMENTS]: runs simclr-jax on Cloud TPUs. Documentation: docs/launch.md.

  up      create, wait, setup, sync, run, attach; recreates the TPU and resumes after a preemption. -- ARGUMENTS of simclr-jax
  doctor  check gcloud, account, project, zone, TPU type, bucket and SSH key
  create | wait | setup | sync | run -- ARGUMENTS | attach    the steps of up, one by one
  status [--json] | logs [-f] [--worker=N|all] | list | fetch [FOLDER] | exec -- COMMAND
  stop [--force]   save a checkpoint and end the run (--force: kill workers that still run after --grace)
  resume           rerun the last run with the same arguments and workdir
  delete [--yes]   delete the TPU, which ends the billing

TPU             --name --zone --project --type (such as v4-32) --num-slices=N (default: 1) --version (default: by type)
Provisioning    --spot | --best-effort | --reserved | --flex-start (default: on demand), --valid-until=6h --max-run-duration=2d --no-queue
Network, disk   --network --subnet --internal-ip | --iap --service-account --labels=k=v,... --disk (a data disk)
Run             --workdir=gs://BUCKET/FOLDER --env=KEY=VALUE (repeatable) --env-file=FILE (secrets, mode 600) --python=PATH --dirty
Retries         --retries=N (default: 10) --stall=N (default: 3) --backoff=SECONDS (default: 15)
Waiting         --poll=SECONDS (default: 30) --max-wait=DURATION (default: 24h) --grace=DURATION (default: 300)
Billing         --autodelete: delete the TPU after success or failure
Output          --dry-run --yes --quiet --verbose --json --lines=N (default: 100)
A flag is read from the command line, else from TPU_NAME and so on in the environment, else from tpu.conf in the current folder
(FLAG = VALUE lines), else from the flags saved when the TPU was created, else from the gcloud configuration.
TEXT
}

# --- flags and arguments

contains() { local x=$1 y; shift; for y in "$@"; do [[ $x != "$y" ]] || return 0; done; return 1; }

parse() {
  subcommand=${1:-help}
  shift || true
  local arg key
  while (($#)); do
    arg=$1
    shift
    case $arg in
      --) args=("$@") && return ;;
      -f) opt[follow]=1 ;;
      -h | --help) subcommand=help ;;
      --env=*) env_pairs+=("${arg#*=}") ;;
      --env)
        (($#)) || usage_error '--env needs KEY=VALUE.'
        env_pairs+=("$1") && shift
        ;;
      --*)
        key=${arg#--} key=${key%%=*}
        if contains "$key" "${switches[@]}" "${cli_only[@]}"; then
          [[ $arg != *=* ]] || usage_error "--$key takes no value."
          opt[$key]=1
        elif ! contains "$key" "${with_value[@]}"; then
          usage_error "unknown flag --$key$(similar_flag "$key"): tpu.sh help lists the flags, and arguments for simclr-jax go after --."
        elif [[ $arg == *=* ]]; then
          opt[$key]=${arg#*=}
        else
          (($#)) || usage_error "--$key needs a value."
          opt[$key]=$1 && shift
        fi
        [[ -n ${opt[$key]} ]] || usage_error "--$key is empty."
        ;;
      *)
        [[ $subcommand == fetch && ${#args[@]} -eq 0 ]] || usage_error "unexpected argument $(posixq "$arg"): flags start with --, and arguments for simclr-jax go after --."
        args=("$arg")
        ;;
    esac
  done
}

similar_flag() {
  local key
  for key in "${with_value[@]}" "${switches[@]}" "${cli_only[@]}" env; do
    if [[ $key == "$1"* || $1 == "$key"* || $key == *"$1" ]]; then
      printf ' (did you mean --%s?)' "$key"
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

# Reads FLAG = VALUE lines; nothing in the file is executed.
from_file() {
  local file=$1 line key value n=0
  [[ -f $file ]] || return 0
  while IFS= read -r line || [[ -n $line ]]; do
    n=$((n + 1))
    [[ ! $line =~ ^[[:space:]]*(#.*)?$ ]] || continue
    [[ $line =~ ^[[:space:]]*([a-z-]+)[[:space:]]*=[[:space:]]*(.*[^[:space:]])[[:space:]]*$ ]] ||
      usage_error "$file, line $n: expected FLAG = VALUE."
    key=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
    contains "$key" "${with_value[@]}" "${switches[@]}" || usage_error "$file, line $n: unknown flag $key."
    contains "$key" "${with_value[@]}" || [[ $value == 1 ]] || usage_error "$file, line $n: write $key = 1, or remove the line."
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
  if [[ $subcommand != list && $subcommand != doctor ]]; then check_name; fi
  # Each TPU name has a state folder: the flags that the TPU was created with, and the arguments of its last run.
  if [[ -n ${opt[name]:-} ]]; then
    [[ ${opt[name]} =~ ^[a-z0-9-]+$ ]] || check_name
    state_dir=$(local_path "${SIMCLR_JAX_STATE:-${XDG_STATE_HOME:-$HOME/.local/state}/simclr_jax}/${opt[name]}")
    home=simclr_jax_runs/${opt[name]}
    # up and create request the TPU with the flags given now. All other subcommands also read the saved flags.
    [[ $subcommand == up || $subcommand == create ]] || from_file "$state_dir/flags"
    bundle=$state_dir/bundle
    if [[ -n ${opt[dry-run]:-} ]]; then bundle=$scratch; else (umask 077 && mkdir -p "$bundle"); fi
  fi
  defaults
  check_numbers
  check_tier
  check_values
}

save_state() {
  [[ -z ${opt[dry-run]:-} ]] || return 0
  local key
  mkdir -p "$state_dir"
  for key in project zone type num-slices no-queue internal-ip iap workdir python env-file; do
    [[ -z ${opt[$key]:-} ]] || printf '%s = %s\n' "$key" "${opt[$key]}"
  done >"$state_dir/flags.new"
  mv "$state_dir/flags.new" "$state_dir/flags"
  ((${#args[@]} == 0)) || printf '%s\0' "${args[@]}" >"$state_dir/words"
  ((${#env_pairs[@]} == 0)) || printf '%s\0' "${env_pairs[@]}" >"$state_dir/env"
}

# --- one launcher per TPU name, and the cleanup

enter() {
  scratch=$(mktemp -d)
  trap clean_up EXIT
  trap 'interrupted 130' INT
  trap 'interrupted 143' TERM HUP
}

take_lock() {
  [[ -z ${opt[dry-run]:-} ]] || return 0
  local owner
  mkdir -p "$state_dir"
  if ! mkdir "$state_dir/lock" 2>/dev/null; then
    owner=$(cat "$state_dir/lock/pid" 2>/dev/null || echo 0)
    if [[ $owner =~ ^[1-9][0-9]*$ ]] && kill -0 "$owner" 2>/dev/null; then
      die "another tpu.sh (process $owner) is running for ${opt[name]}: wait for that process or end it; status, logs and stop work in the meantime."
    fi
    rm -rf "$state_dir/lock"  # the owner no longer runs
    mkdir "$state_dir/lock" 2>/dev/null || die "another tpu.sh has just started for ${opt[name]}."
  fi
  echo $$ >"$state_dir/lock/pid"
  lock=$state_dir/lock
}

clean_up() {
  [[ -z $sleeper ]] || kill "$sleeper" 2>/dev/null || true
  [[ -z $lock ]] || rm -rf -- "$lock"
  [[ -z $scratch ]] || rm -rf -- "$scratch"
}

interrupted() {
  trap '' INT TERM HUP
  printf '\n' >&2
  if [[ -n $billing ]]; then
    {
      printf 'tpu.sh: interrupted. %s in %s (%s x %s) is not changed: a started run continues, and the TPU is billed until it is deleted.\n' \
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
  [[ -t 0 ]] || usage_error "$1 There is no terminal to confirm this: give --yes."
  local reply_to=
  read -r -p "$1 Type $2 to confirm: " reply_to
  [[ $reply_to == "$2" ]] || die 'not confirmed: nothing was done.'
}

show_plan() {
  local tier='on demand' key
  for key in spot best-effort reserved flex-start; do [[ -z ${opt[$key]:-} ]] || tier=$key; done
  info "name      ${opt[name]}"
  info "zone      ${opt[zone]}, project ${opt[project]:-from the gcloud configuration}"
  info "TPU       ${opt[num-slices]} x ${opt[type]}: $((chips * ${opt[num-slices]})) chips on $((hosts * ${opt[num-slices]})) hosts, $tier, runtime ${opt[version]:-$(runtime_version)}"
  [[ -z ${opt[workdir]:-} ]] || info "workdir   ${opt[workdir]}"
  ((${#args[@]} == 0)) || info "command   simclr-jax $(posixq "${args[@]}")"
  for key in "${env_pairs[@]}"; do info "env       ${key%%=*}"; done
  [[ -z ${opt[env-file]:-} ]] || info "secrets   from ${opt[env-file]} (not shown)"
}

# --- the subcommands

select_tpu() {  # for the subcommands that need a TPU name
  resolve
  need_gcloud
  from_gcloud
  check_location
  set_location
}

check_run() {  # for the subcommands that start a run
  [[ $subcommand != resume ]] || load_last_run
  check_args
  check_workdir
  check_env
}

load_last_run() {
  [[ -f $state_dir/words ]] || die "no run of ${opt[name]} was started from this machine: start one with tpu.sh run -- ARGUMENTS."
  ((${#args[@]})) || mapfile -t -d '' args <"$state_dir/words"
  if ((${#env_pairs[@]} == 0)) && [[ -f $state_dir/env ]]; then mapfile -t -d '' env_pairs <"$state_dir/env"; fi
}

do_up() {
  select_tpu
  check_type
  check_run
  show_plan
  warn_workdir
  confirm "This creates $((chips * ${opt[num-slices]})) TPU chips, which are billed." "${opt[name]}"
  take_lock
  save_state
  local result=0
  run_to_completion || result=$?
  finish
  return "$result"
}

do_create() {
  select_tpu
  check_type
  show_plan
  confirm "This creates $((chips * ${opt[num-slices]})) TPU chips, which are billed." "${opt[name]}"
  take_lock
  save_state
  ensure_resource
}

do_wait() {
  select_tpu
  if [[ -n ${opt[dry-run]:-} ]]; then dry_run_state=ACTIVE; fi
  wait_ready || die "$why"
  info "${opt[name]} is ready."
}

on_workers() {
  select_tpu
  if [[ -n ${opt[dry-run]:-} ]]; then dry_run_state=ACTIVE; fi
  find_workers
}

do_setup() { on_workers && take_lock && { { with_retries make_home && setup_workers; } || die "$why"; }; }
do_sync() { on_workers && take_lock && { sync_source || die "$why"; }; }

do_run() {
  resolve
  check_run
  on_workers
  show_plan
  warn_workdir
  take_lock
  save_state
  start_run || die "$why"
  info "the run continues without this terminal. To follow it: $(posixq "$0" attach "--name=${opt[name]}")"
}
do_resume() { do_run; }

do_attach() {
  local outcome why='' culprit code step=none running ended lost clean asked never key killed=1 result=0
  on_workers
  [[ -n ${opt[workdir]:-} ]] || opt[workdir]=
  ask status "${opt[workdir]}" || die "$why"
  count_states
  ((never < total)) || die "no run was started on ${opt[name]}: start one with tpu.sh run -- ARGUMENTS."
  watch
  case $outcome in
    finished) info 'done.' ;;
    stopped) info 'stopped as requested; continue the run with tpu.sh resume.' && result=75 ;;
    failed) report && result=$code ;;
    *) report && info 'tpu.sh up with the same arguments resumes from the latest checkpoint.' && result=75 ;;
  esac
  finish
  return "$result"
}

do_status() {
  local step=none running=0 ended=0 lost=0 clean=0 asked=0 never=0 key
  select_tpu
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
    [[ $which != all ]] || usage_error 'logs -f follows one worker: --worker=N.'
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

# The part of the log received so far is kept in a file. After a lost connection, its size is the offset to continue from.
follow_log() {
  local file=$state_dir/log.$1.$2 try=0 code size
  mkdir -p "$state_dir"
  : >"$file"
  while :; do
    size=$(wc -c <"$file")
    code=0
    remote "$1" "$2" "bash $home/worker.sh follow $((size))" 2>"$scratch/ssh" | tee -a "$file" || code=$?
    ((code != 0)) || return 0
    (($(wc -c <"$file") == size)) || try=0
    ((++try <= ssh_tries)) || die "cannot follow the log of worker $2: $(tail -n 2 "$scratch/ssh" | tr '\n' ' ')"
    pause "$(backoff "$try")"
  done
}

do_stop() {
  local step running=0 ended lost clean asked never result=0
  on_workers
  info "asking the run on $total workers to save a checkpoint and exit"
  stop_all TERM 1 || result=$?
  if ((result == 2)) && [[ -n ${opt[force]:-} ]]; then
    info "$running workers still run after ${opt[grace]} s (--grace): killing them."
    result=0
    stop_all KILL 1 || result=$?
  fi
  case $result in
    0) info "stopped. ${opt[name]} is still billed. To delete it: $(delete_hint)" ;;
    2) die "$running workers still run after ${opt[grace]} s (--grace): wait, or run tpu.sh stop --force." ;;
    *) die "$why" ;;
  esac
}

do_exec() {
  local s code=0
  ((${#args[@]})) || usage_error 'a command is required: tpu.sh exec -- COMMAND ARGUMENTS.'
  on_workers
  for s in "${!nodes[@]}"; do
    remote "$s" "${opt[worker]:-all}" "$(posixq "${args[@]}")" || code=$?
  done
  return "$code"
}

do_fetch() {
  ((${#args[@]} <= 1)) || usage_error "fetch takes one folder: $(posixq "${args[@]}") are ${#args[@]}."
  select_tpu
  local to
  to=$(local_path "${args[0]:-runs/${opt[name]}}")
  check_workdir
  [[ -n ${opt[dry-run]:-} ]] || mkdir -p "$to"
  if [[ ${opt[workdir]} == gs://* ]]; then
    cloud storage rsync --recursive "${opt[workdir]%/}" "$to"
  else
    on_workers
    local call flags
    ssh_call 0 0 scp
    cloud "${call[@]}" --recurse "${opt[name]}:${opt[workdir]%/}" "$to" "${flags[@]}"
  fi
  info "fetched to $to"
}

do_delete() {
  select_tpu
  describe_or_die
  if [[ -n ${opt[dry-run]:-} ]]; then state=ACTIVE; fi
  if [[ $state == NONE ]]; then
    info "${opt[name]} does not exist in ${opt[zone]}: nothing to delete."
    return
  fi
  confirm "This deletes ${opt[name]} ($state, $found_type) in ${opt[zone]} and all data on its disks." "${opt[name]}"
  delete_resource
  info "${opt[name]} is deleted."
}

do_list() {
  resolve
  need_gcloud
  from_gcloud
  check_location
  set_location
  local columns='name.basename(),state.state,tpu.nodeSpec[0].node.acceleratorType'
  cloud compute tpus queued-resources list "${location[@]}" '--filter=tpu.nodeSpec.node.labels.simclr-jax:*' "--format=value($columns)"
  cloud compute tpus tpu-vm list "${location[@]}" '--filter=labels.simclr-jax:*' '--format=value(name.basename(),state,acceleratorType)'
}

do_doctor() {
  local bad=0 account key
  check_item() {  # check_item WHAT FIX COMMAND...
    local what=$1 fix=$2
    shift 2
    if "$@" >"$scratch/check" 2>&1 </dev/null; then printf 'ok    %s\n' "$what"; else
      printf 'FAIL  %s: %s\n' "$what" "$fix" && bad=1
    fi
  }
  resolve
  check_item 'bash, git, tar, ssh' 'install the missing programs' type git tar gzip ssh awk
  check_item 'gcloud' 'install it: https://cloud.google.com/sdk/docs/install' command -v gcloud
  ((bad == 0)) || return 1
  from_gcloud
  account=$(gcloud auth list --filter=status:ACTIVE '--format=value(account)' 2>/dev/null </dev/null || true)
  check_item "account ${account:-none}" 'gcloud auth login' test -n "$account"
  check_item "project ${opt[project]:-none}" 'gcloud config set project PROJECT, or --project' test -n "${opt[project]:-}"
  check_item "zone ${opt[zone]:-none}" 'gcloud config set compute/zone ZONE, or --zone' test -n "${opt[zone]:-}"
  ((bad == 0)) || return 1
  check_location
  set_location
  check_item 'TPU API' 'gcloud services enable tpu.googleapis.com, or request the IAM role TPU Admin' gcloud compute tpus queued-resources list "${location[@]}" --limit=1
  if [[ -n ${opt[type]:-} ]]; then
    check_type
    gcloud compute tpus accelerator-types list "${location[@]}" '--format=value(type)' >"$scratch/types" 2>/dev/null </dev/null || true
    check_item "${opt[type]} in ${opt[zone]}" "not available in this zone; available types: $(head -c 300 "$scratch/types" | tr '\n' ' ')" grep -qx -- "${opt[type]}" "$scratch/types"
    printf 'note  %s chips: check the quota of %s chips in %s at https://console.cloud.google.com/iam-admin/quotas\n' \
      "$((chips * ${opt[num-slices]}))" "$family" "${opt[zone]}"
  fi
  if [[ -n ${opt[workdir]:-} ]]; then
    check_workdir
    key=${opt[workdir]%/}/.doctor
    [[ ${opt[workdir]} != gs://* ]] || check_item "${opt[workdir]} is writable" 'create the bucket, or request the IAM role Storage Object User' doctor_bucket "$key"
  fi
  check_item 'SSH key in ssh-agent' 'ssh-add ~/.ssh/google_compute_engine (gcloud creates the key at the first ssh)' ssh-add -l
  return "$bad"
}

doctor_bucket() { echo ok | gcloud storage cp - "$1" && gcloud storage rm "$1"; }

parse "$@"
case $subcommand in
  help | -h | --help) help ;;
  doctor | create | wait | status | setup | sync | run | logs | attach | stop | resume | up | fetch | exec | delete | list)
    enter
    "do_$subcommand"
    ;;
  *) usage_error "unknown command $(posixq "$subcommand"): use doctor, up, create, wait, setup, sync, run, attach, status, logs, stop, resume, fetch, exec, delete, list or help." ;;
esac
