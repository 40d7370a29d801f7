#!/usr/bin/env bash
# One command from a laptop to a TPU: tpu.sh up --name=... --zone=... --type=v4-32 --workdir=gs://... -- pretrain --config=...
#
# lib.sh checks what was given, cloud.sh speaks to gcloud, worker.sh is what runs on the TPU. docs/launch.md explains.
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

# --- the parts

# Whatever the state is, afterwards there is a resource that was asked for with these flags.
ensure() {
  describe_or_die
  while :; do
    case $state in
      NONE) create_resource && return ;;
      ACTIVE | READY) refuse_other_type && billing=yes && say "${opt[name]} is there ($state)." && return ;;
      WAITING_FOR_RESOURCES | ACCEPTED | PROVISIONING | CREATING | STARTING | REPAIRING | RESTARTING)
        refuse_other_type
        billing=maybe
        say "${opt[name]} has been asked for already ($state)."
        return
        ;;
      SUSPENDED | FAILED | PREEMPTED | TERMINATED)
        say "${opt[name]} is $state${detail:+ ($detail)}: it keeps its name and quota until it is deleted, so it is deleted and asked for again."
        delete_resource
        state=NONE
        ;;
      SUSPENDING | DELETING | STOPPING) wait_to_go ;;
      STOPPED) die "${opt[name]} is stopped; start it (gcloud compute tpus tpu-vm start) or delete it: $(delete_hint)" ;;
      *) die "${opt[name]} is in a state that is not known here, $state: nothing was done." ;;
    esac
  done
}

wait_to_go() {
  local until=$((SECONDS + $(seconds "${opt[max-wait]}")))
  while [[ $state == SUSPENDING || $state == DELETING || $state == STOPPING ]]; do
    ((SECONDS < until)) || { failure=75 && die "${opt[name]} was still $state after ${opt[max-wait]} (--max-wait)."; }
    say "${opt[name]} is $state, waiting"
    pause "${opt[poll]}"
    describe_or_die
  done
}

# Until the TPU is there. Returns 1, with why, when it will not come.
wait_ready() {
  local until=$((SECONDS + $(seconds "${opt[max-wait]}"))) before='' errors=0
  while :; do
    describe
    [[ $state == "$before" ]] || say "$(date +%T) ${opt[name]}: $state"
    before=$state
    case $state in
      ACTIVE | READY) billing=yes && return ;;
      FAILED | SUSPENDED | SUSPENDING | PREEMPTED | TERMINATED | STOPPED | STOPPING)
        why="${opt[name]} is $state${detail:+: $detail}"
        return 1
        ;;
      NONE | DELETING) die "${opt[name]} is gone or going ($state): somebody deleted it, so it is not created again." ;;
      ERROR)
        if is_denied "$detail" || ((++errors > 10)); then die "the state of ${opt[name]} cannot be read: $detail"; fi
        ;;
      *) errors=0 ;;
    esac
    ((SECONDS < until)) || { failure=75 && die "${opt[name]} was still $state after ${opt[max-wait]} (--max-wait). It stays in the queue and may start to bill: $(delete_hint)"; }
    pause "${opt[poll]}"
  done
}

# For the verbs that need a TPU that is there.
find_workers() {
  describe_or_die
  case $state in
    ACTIVE | READY) billing=yes ;;
    NONE) die "there is no ${opt[name]} in ${opt[zone]}: tpu.sh create makes it, tpu.sh list shows what there is." ;;
    *) die "${opt[name]} is $state, not ready: tpu.sh wait." ;;
  esac
  if [[ -z ${opt[type]:-} ]]; then opt[type]=$found_type; fi
  check_type
  count_workers || die "$why"
}

setup_workers() {
  say "setup: Python and the pinned packages on $total workers (minutes on new ones)"
  persist copy_all "$here/worker.sh" "$here/requirements.txt" "$here/uv.txt" &&
    ask setup "${opt[python]:-}" && all_well && agree
}

# Only what git knows goes to the workers, without what looks like a key.
pack_source() {
  local file revision dirty='' kept=() left=()
  git -C "$root" rev-parse --verify -q HEAD >/dev/null || die "$root is no git checkout: the launcher ships one exact revision."
  revision=$(git -C "$root" rev-parse HEAD)
  [[ -z $(git -C "$root" status --porcelain) ]] || dirty=1
  [[ -z $dirty || -n ${opt[dirty]:-}${opt[dry-run]:-} ]] ||
    die 'there are changes that no commit has: commit them, or ship them as they are with --dirty.'
  while IFS= read -r -d '' file; do
    [[ -f $root/$file && ! -L $root/$file ]] || continue
    if looks_secret "$file"; then left+=("$file"); else kept+=("$file"); fi
  done < <(git -C "$root" ls-files -z ${dirty:+--others --cached --exclude-standard})
  ((${#left[@]} == 0)) || warn "not shipped, as they look like secrets: $(join "${left[@]}")"
  printf '%s\0' "${kept[@]}" >"$scratch/files"
  tar -C "$root" --null -T "$scratch/files" -cf - | gzip -n >"$bundle/source.tgz" || die 'the source cannot be packed.'
  (($(wc -c <"$bundle/source.tgz") < 200000000)) || die 'the source is larger than 200 MB: keep data out of the git checkout.'
  source_id=$revision
  if [[ -n $dirty ]]; then source_id=$revision+$(sha256 "$bundle/source.tgz" | cut -c1-8); fi
  describe_file source.tgz "${#kept[@]} files of $root at ${source_id:0:12}${source_id:40}"
}

# In a dry run: what a file would be that the next command copies.
describe_file() { [[ -z ${opt[dry-run]:-} ]] || printf '%s\n' "# $memory/bundle/$1: $2" | sed '2,$s/^/#   /'; }

looks_secret() {
  case /$1 in
    */.git/* | */.env | */.env.* | *.env | *.pem | *.key | *.p12 | *.pfx | */id_rsa* | */id_ed25519* | */.netrc | */.npmrc | */.pypirc | */gcloud/* | */.aws/* | */.ssh/*) return 0 ;;
    *.json) grep -qs -e '"private_key"' -e '"refresh_token"' -e '"client_secret"' "$root/$1" ;;
    *) grep -qsI -e '^-----BEGIN [A-Z ]*PRIVATE KEY-----' "$root/$1" ;;
  esac
}

sync_source() {
  local source_id
  pack_source
  say "sync: source ${source_id:0:12}${source_id:40} to $total workers"
  persist copy_all "$memory/bundle/source.tgz" && ask unpack "$(sha256 "$bundle/source.tgz")" "$source_id" && all_well
}

# A worker that says ok=0 says why.
all_well() {
  local key
  [[ -z ${opt[dry-run]:-} ]] || return 0
  for key in $(workers); do
    [[ $(field "$key" ok) == 1 ]] || die "$(worker_name "$key"): $(field "$key" last)"
  done
}

# Unequal versions stall a pod, or train something else than it says.
agree() {
  local key what first
  [[ -z ${opt[dry-run]:-} ]] || return 0
  for what in source job python jax jaxlib libtpu flax orbax-checkpoint; do
    first=$(field "$(workers | head -n 1)" "$what")
    for key in $(workers); do
      [[ $(field "$key" "$what") == "$first" ]] ||
        die "the workers differ in $what: $first on $(worker_name "$(workers | head -n 1)"), $(field "$key" "$what") on $(worker_name "$key"); setup and sync again, or delete the TPU."
    done
  done
}

# The script of the run, as every worker gets it.
write_job() {
  local pair
  {
    echo '# Written by tpu.sh.'
    printf 'export %s=%s\n' JAX_COORDINATOR_PORT "$(posixq "${JAX_COORDINATOR_PORT:-8476}")" PYTHONUNBUFFERED 1
    for pair in TFDS_DATA_DIR LIBTPU_INIT_ARGS; do
      [[ -z ${!pair:-} ]] || printf 'export %s=%s\n' "$pair" "$(posixq "${!pair}")"
    done
    # shellcheck disable=SC2016
    printf 'export PYTHONPATH="$SOURCE"\n'
    for pair in "${env_pairs[@]}"; do printf 'export %s=%s\n' "${pair%%=*}" "$(posixq "${pair#*=}")"; done
    # shellcheck disable=SC2016
    printf 'exec "$PYTHON" -m simclr_jax %s\n' "$(posixq "${words[@]}")"
  } >"$bundle/job.sh"
}

# Whether all the workers, as they answered, are at this very run. Sets job, its number, and running.
under_way() {
  local words=("${args[@]}") key
  if [[ " ${args[*]} " != *' --workdir='* ]]; then words+=("--workdir=${opt[workdir]}"); fi
  write_job
  job=$(sha256 "$bundle/job.sh" | cut -c1-16) running=0
  for key in $(workers); do
    [[ $(field "$key" state) == running ]] || continue
    running=$((running + 1))
    [[ $(field "$key" job) == "$job" ]] || die "$(worker_name "$key") is at another run already: tpu.sh attach follows it, tpu.sh stop ends it."
  done
  ((running == total)) && say 'the run is under way already.'
}

start_run() {
  local job running
  ask status "${opt[workdir]}" || return 1
  if under_way; then return; fi
  describe_file job.sh "$(<"$bundle/job.sh")"
  ((running == 0)) || stop_all KILL 0 || return 1
  persist copy_all "$memory/bundle/job.sh" || return 1
  [[ -z ${opt[env-file]:-} ]] || persist copy_all --as env "${opt[env-file]}" || return 1
  ask check && all_well && agree && ask start "$job" && all_well || return 1
  say "run: started on $total workers"
}

stop_all() {  # signal, and whether an operator wants it
  ask stop "$1" "$2" || return 1
  [[ -z ${opt[dry-run]:-} ]] || return 0
  local until=$((SECONDS + $(seconds "${opt[grace]}")))
  while :; do
    ask status '' || return 1
    count_states
    ((running == 0)) && return
    ((SECONDS < until)) || return 2
    pause "${opt[poll]}"
  done
}

# Sets running, ended, lost, clean (ended with 0) and asked (stopped by an operator), in workers; step and news.
count_states() {
  local key n
  running=0 ended=0 lost=0 clean=0 asked=0 never=0 step=none
  for key in $(workers); do
    case $(field "$key" state) in running) running=$((running + 1)) ;; ended) ended=$((ended + 1)) ;; lost) lost=$((lost + 1)) ;; *) never=$((never + 1)) ;; esac
    [[ $(field "$key" rc) != 0 ]] || clean=$((clean + 1))
    [[ $(field "$key" stopped) != 1 ]] || asked=$((asked + 1))
    n=$(field "$key" step)
    if [[ $n =~ ^[0-9]+$ ]] && [[ $step == none || $n -gt $step ]]; then step=$n; fi
  done
}

# Watches until the run has ended. Sets outcome: finished, stopped, again (worth another try) or failed, with why, culprit, code.
watch() {
  local errors=0 quiet_polls=0 limping=0 before='' news
  outcome='' why='' culprit='' code=0
  while :; do
    describe
    case $state in
      ACTIVE | READY) errors=0 ;;
      SUSPENDING | SUSPENDED | PREEMPTED | TERMINATED | FAILED)
        outcome=again why="preempted: ${opt[name]} is $state"
        return
        ;;
      NONE | DELETING) billing='' && die "${opt[name]} was deleted while it ran: it is not created again." ;;
      *)
        if is_denied "$detail" || ((++errors > 20)); then die "the state of ${opt[name]} cannot be read ($state): $detail. The run goes on: tpu.sh attach."; fi
        pause "${opt[poll]}"
        continue
        ;;
    esac
    if ! ask status "${opt[workdir]}"; then
      ((++quiet_polls < 3)) || { outcome=again && why="${why:-the workers do not answer}" && return; }
      continue
    fi
    quiet_polls=0
    count_states
    key=$(workers | head -n 1)
    news="$running of $total run, checkpoint $step; $(field "$key" last)"
    [[ $news == "$before" ]] || say "$(date +%T) $news"
    before=$news
    if ((running == 0)); then
      judge
      return
    fi
    # A dead peer ends the others by jax's heartbeats; who is left after the grace never will.
    if ((running < total)); then
      ((limping)) || limping=$SECONDS
      if ((SECONDS - limping > $(seconds "${opt[grace]}"))); then
        say "$((total - running)) of $total workers have ended and the rest has not for ${opt[grace]} s: ending it."
        ask stop KILL 0 || true
      fi
    fi
    pause "${opt[poll]}"
  done
}

# What the exit codes together mean. The cause comes first: when one worker fails, its peers abort with 134.
judge() {
  local key rc worst=-1 rank
  ((asked == 0 || clean == total)) || { outcome=stopped && return; }
  ((clean < total)) || { outcome=finished && return; }
  for key in $(workers); do
    rc=$(field "$key" rc)
    [[ $(field "$key" state) == ended ]] || rc=lost
    case $rc in
      0) rank=0 ;;
      134) rank=1 ;;
      75 | 143 | 129) rank=2 ;;
      lost | never) rank=3 ;;
      4) rank=4 ;;
      137) rank=5 ;;
      *) rank=6 ;;
    esac
    if ((rank > worst)); then worst=$rank culprit=$key code=$rc; fi
  done
  why="$(worker_name "$culprit") ended with $code ($(meaning "$code"))"
  case $worst in
    6) outcome=failed ;;
    5) killed=$((killed + 1)) && if ((killed > 1)); then outcome=failed why+=', the second time'; else outcome=again; fi ;;
    *) outcome=again ;;
  esac
  return 0
}

meaning() {
  case $1 in
    1) echo 'failed; the reason is in the log' ;;
    2) echo 'wrong recipe or words' ;;
    3) echo 'the loss is not finite' ;;
    4) echo 'a step hung, see the stacks in the log' ;;
    75) echo 'preempted, after saving' ;;
    130) echo 'stopped by Ctrl-C' ;;
    134) echo 'another worker died' ;;
    137) echo 'killed: out of memory?' ;;
    143 | 129) echo 'ended by the machine, before saving' ;;
    lost) echo 'no exit code: the machine went down' ;;
    *) echo 'unexpected' ;;
  esac
}

# The newest checkpoint, from where it is.
checkpoint() {
  if [[ ${opt[workdir]} != gs://* ]]; then
    echo "$step"
    return
  fi
  local found
  found=$(gcloud storage ls "${opt[workdir]%/}/checkpoints/" 2>/dev/null </dev/null | sed -n 's|.*/\([0-9]\{1,18\}\)/$|\1|p' | sort -n | tail -n 1) || true
  echo "${found:-none}"
}

report() {  # what failed, with the last lines of the worker that did
  printf 'tpu.sh: %s\n' "$why" >&2
  [[ -n $culprit ]] || return 0
  printf '%s\n' "--- the last 30 lines of $(worker_name "$culprit")" >&2
  last_lines "$culprit" 30 >&2
  printf '%s\n' '---' >&2
}

# From nothing to a run on all the workers. Returns 1, with why, where another try may help.
bring_up() {
  ensure
  wait_ready || return 1
  count_workers && persist make_home || return 1
  local job running
  if [[ -z ${opt[dry-run]:-} ]] && under_way; then return; fi  # with the packages and the source that it has
  setup_workers && sync_source && start_run
}

# Runs, and again as long as it gets somewhere.
persevere() {
  local tries=0 stalled=0 best=none now killed=0
  local outcome why culprit code step=none running ended lost clean asked never key
  while :; do
    outcome=again culprit='' why=''
    if bring_up; then
      [[ -z ${opt[dry-run]:-} ]] || return 0
      watch
    fi
    case $outcome in
      finished) say "done: checkpoint $(checkpoint) in ${opt[workdir]}" && return 0 ;;
      stopped) say "stopped as asked; tpu.sh resume goes on." && return 75 ;;
      failed) report && return "$code" ;;
    esac
    report
    now=$(checkpoint)
    if [[ $now == none || $now == "$best" ]]; then stalled=$((stalled + 1)); else stalled=0; fi
    best=$now tries=$((tries + 1))
    if ((stalled >= opt[stall])); then
      printf 'tpu.sh: given up: %s starts in a row without a new checkpoint (%s), see --stall.\n' "$stalled" "$now" >&2
      return 1
    fi
    if ((tries > opt[retries])); then
      printf 'tpu.sh: given up after %s retries (--retries); the same command goes on from checkpoint %s.\n' "${opt[retries]}" "$now" >&2
      return 75
    fi
    say "retry $tries of ${opt[retries]}, from checkpoint $now"
    pause "$(backoff "$tries")"
  done
}

finish() {  # after the end, good or bad
  if [[ -n ${opt[autodelete]:-} ]]; then
    describe
    [[ $state == NONE ]] || delete_resource
  elif [[ -z ${opt[dry-run]:-} && -n $billing ]]; then
    say "${opt[name]} is still there and bills: $(delete_hint)"
  fi
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
