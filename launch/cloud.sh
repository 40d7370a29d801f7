# shellcheck shell=bash
# All that is said to Google Cloud, and the answers. Sourced by tpu.sh.

# One call that changes something or talks to workers. With --dry-run it is printed instead.
cloud() {
  if [[ -n ${opt[dry-run]:-} ]]; then
    printf '%s\n' "$(posixq gcloud "$@")"
    return
  fi
  [[ -z ${opt[verbose]:-} ]] || printf '+ %s\n' "$(posixq gcloud "$@")" >&3  # the operator, also where errors are collected
  gcloud "$@" </dev/null 3>&-
}

need_gcloud() {
  [[ -n ${opt[dry-run]:-} ]] && return
  command -v gcloud >/dev/null ||
    die 'gcloud is not installed here: https://cloud.google.com/sdk/docs/install (--dry-run works without).'
  local account
  account=$(gcloud auth list --filter=status:ACTIVE '--format=value(account)' 2>/dev/null </dev/null) || true
  [[ -n $account ]] || die 'gcloud knows no account: gcloud auth login'
}

place() { where=("--zone=${opt[zone]}"); [[ -z ${opt[project]:-} ]] || where+=("--project=${opt[project]}"); }

# --- the resource

# Sets state (NONE where there is nothing, ERROR with why where gcloud does not say), found_type, nodes, detail.
describe() {
  local kind=(compute tpus queued-resources describe)
  local fields='state.state,tpu.nodeSpec[0].node.acceleratorType,tpu.nodeSpec[].nodeId.list(),state.failedData.error.message'
  if [[ -n ${opt[no-queue]:-} ]]; then
    kind=(compute tpus tpu-vm describe) fields='state,acceleratorType,name.basename(),health'
  fi
  local call=("${kind[@]}" "${opt[name]}" "${where[@]}" "--format=value[separator=\"|\"]($fields)")
  if [[ -n ${opt[dry-run]:-} ]]; then
    cloud "${call[@]}"
    state=$pretended found_type=${opt[type]:-} detail=
    pretend_nodes
    return
  fi
  local line names _
  if line=$(cloud "${call[@]}" 2>"$scratch/describe"); then
    IFS='|' read -r state found_type names detail _ <<<"$line|||"
    IFS=, read -ra nodes <<<"$names"
    [[ -n $state ]] || state=UNKNOWN
    return
  fi
  found_type='' nodes=() detail=$(tail -n 3 "$scratch/describe" | tr '\n' ' ')
  state=ERROR
  # "PERMISSION_DENIED: Location ... is not found" is not an absence: only the code counts.
  if grep -q 'NOT_FOUND: ' "$scratch/describe" && ! grep -q PERMISSION_DENIED "$scratch/describe"; then state=NONE; fi
}

pretend_nodes() {
  local i
  nodes=("${opt[name]}")
  ((${opt[num-slices]} == 1)) && return
  nodes=()
  for ((i = 0; i < ${opt[num-slices]}; i++)); do nodes+=("${opt[name]}-$i"); done
}

is_denied() { [[ $1 =~ PERMISSION_DENIED|UNAUTHENTICATED|invalid_grant|Reauthentication|gcloud\ auth\ login ]]; }

# The state, or the end: nothing is created, deleted or retried on an answer that is not understood.
describe_or_die() {
  describe
  [[ $state != ERROR ]] || die "cannot tell whether ${opt[name]} exists, so nothing was done: $detail"
}

runtime_version() {
  case $family in
    v6e) echo v2-alpha-tpuv6e ;;
    v5p) echo v2-alpha-tpuv5 ;;
    v5litepod) echo v2-alpha-tpuv5-lite ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

create_call() {
  local version=${opt[version]:-$(runtime_version)} alpha=()
  local labels="simclr-jax=${opt[name]}${opt[labels]:+,${opt[labels]}}"
  [[ $version == "$(runtime_version)" ]] || warn "--version=$version: Google names $(runtime_version) for ${opt[type]}."
  call=("${opt[name]}" "${where[@]}" "--accelerator-type=${opt[type]}" "--labels=$labels")
  if [[ -n ${opt[no-queue]:-} ]]; then
    call=(compute tpus tpu-vm create "${call[@]}" "--version=$version")
  else
    if ((${opt[num-slices]} > 1)); then
      call+=("--node-count=${opt[num-slices]}" "--node-prefix=${opt[name]}")
    else
      call+=("--node-id=${opt[name]}")
    fi
    [[ -z ${opt[valid-until]:-} ]] || call+=("--valid-until-duration=${opt[valid-until]}")
    # These are in gcloud alpha only.
    [[ -z ${opt[best-effort]:-} ]] || { alpha=(alpha) && call+=(--best-effort); }
    [[ -z ${opt[flex-start]:-} ]] || { alpha=(alpha) && call+=(--provisioning-model=flex-start); }
    [[ -z ${opt[max-run-duration]:-} ]] || { alpha=(alpha) && call+=("--max-run-duration=${opt[max-run-duration]}"); }
    # gcloud alpha asks for the standard model next to --spot unless told otherwise.
    [[ -z ${opt[spot]:-} || ${#alpha[@]} -eq 0 ]] || call+=(--provisioning-model=spot)
    call=("${alpha[@]}" compute tpus queued-resources create "${call[@]}" "--runtime-version=$version" --async)
  fi
  [[ -z ${opt[spot]:-} ]] || call+=(--spot)
  [[ -z ${opt[reserved]:-} ]] || call+=(--reserved)
  [[ -z ${opt[network]:-} ]] || call+=("--network=${opt[network]}")
  [[ -z ${opt[subnet]:-} ]] || call+=("--subnetwork=${opt[subnet]}")
  [[ -z ${opt[internal-ip]:-}${opt[iap]:-} ]] || call+=(--internal-ips)
  [[ -z ${opt[service-account]:-} ]] || call+=("--service-account=${opt[service-account]}")
  [[ -z ${opt[disk]:-} ]] || call+=("--data-disk=source=${opt[disk]},mode=read-write")
  call+=(--quiet)
}

create_resource() {
  local call=()
  create_call
  say "creating ${opt[name]}: $((chips * ${opt[num-slices]})) chips of ${opt[type]} in ${opt[zone]}; it bills from the moment it is there."
  billing=maybe
  if cloud "${call[@]}" 2>"$scratch/create"; then
    pretended=ACTIVE
    return
  fi
  if grep -q ALREADY_EXISTS "$scratch/create"; then
    say "${opt[name]} was created by somebody else in the meantime: looking again."
    describe_or_die
    [[ $state != NONE ]] || die "gcloud says both that ${opt[name]} exists and that it does not: try again in a minute."
    refuse_other_type
    return
  fi
  billing=
  die "could not create ${opt[name]}: $(tail -n 5 "$scratch/create" | tr '\n' ' ')"
}

refuse_other_type() {
  [[ -z ${opt[type]:-} || -z $found_type || $found_type == "${opt[type]}" ]] ||
    die "${opt[name]} exists in ${opt[zone]} and is a $found_type, not a ${opt[type]}: choose another --name, or delete it: $(delete_hint)"
}

delete_resource() {
  say "deleting ${opt[name]} ($state)"
  local call=(compute tpus queued-resources delete "${opt[name]}" "${where[@]}" --force --quiet)
  [[ -z ${opt[no-queue]:-} ]] || call=(compute tpus tpu-vm delete "${opt[name]}" "${where[@]}" --quiet)
  if ! cloud "${call[@]}" 2>"$scratch/delete" && ! grep -q 'NOT_FOUND: ' "$scratch/delete"; then
    die "could not delete ${opt[name]}, so it may still bill: $(tail -n 3 "$scratch/delete" | tr '\n' ' ')"
  fi
  billing='' pretended=NONE
}

delete_hint() {
  local words=("$0" delete "--name=${opt[name]}" "${where[@]}")
  [[ -z ${opt[no-queue]:-} ]] || words+=(--no-queue)
  posixq "${words[@]}"
}

# --- the workers

# Sets workers_of (by slice) from what the cloud says; in a dry run from the table of types.
count_workers() {
  local s line call
  workers_of=()
  for s in "${!nodes[@]}"; do
    call=(compute tpus tpu-vm describe "${nodes[s]}" "${where[@]}" '--format=value(networkEndpoints.len())')
    if [[ -n ${opt[dry-run]:-} ]]; then
      cloud "${call[@]}"
      line=$hosts
    else
      line=$(cloud "${call[@]}" 2>"$scratch/count") || true
    fi
    [[ $line =~ ^[1-9][0-9]*$ ]] || { why="cannot count the workers of ${nodes[s]}: $(tail -n 1 "$scratch/count" 2>/dev/null)"; return 1; }
    workers_of[s]=$line
  done
  total=0
  for line in "${workers_of[@]}"; do total=$((total + line)); done
  ((total > 0)) || { why="${opt[name]} has no nodes"; return 1; }
}

# The words that lead to the workers $2 of slice $1, by verb $3 (ssh or scp). What is copied is put behind.
reach() {
  local flag="--$3-flag=-o"
  if [[ -n ${opt[no-queue]:-} ]]; then
    call=(compute tpus tpu-vm "$3")
    [[ -z ${opt[iap]:-} ]] || call=(alpha "${call[@]}")  # not in gcloud's stable tpu-vm ssh
    words=("${where[@]}" "--worker=$2")
  else
    call=(compute tpus queued-resources "$3")
    words=("${where[@]}" "--node=$1" "--worker=$2")
  fi
  [[ -z ${opt[internal-ip]:-} ]] || words+=(--internal-ip)
  [[ -z ${opt[iap]:-} ]] || words+=(--tunnel-through-iap)
  words+=("${flag}ConnectTimeout=30" "${flag}ServerAliveInterval=30" --quiet)
}

# Runs the shell string $3 on workers $2 of slice $1.
remote() {
  local call words
  reach "$1" "$2" ssh
  cloud "${call[@]}" "${opt[name]}" "${words[@]}" "--command=$3"
}

# Copies files ${@:2} into this run's folder on all the workers of slice $1; --as NAME FILE gives it another name.
copy() {
  local call words s=$1 name=
  shift
  if [[ $1 == --as ]]; then
    name=$2
    shift 2
  fi
  reach "$s" all scp
  cloud "${call[@]}" "$@" "${opt[name]}:$home/$name" "${words[@]}"
}

# Repeats what a broken connection may have cut short. gcloud itself reconnects ten times before it gives up, and may answer 0
# without having reached anybody (a node that it cannot prepare is left out): so the caller counts the answers.
persist() {
  local try
  for ((try = 1; ; try++)); do
    if "$@" 2>"$scratch/ssh"; then return; fi
    if is_denied "$(<"$scratch/ssh")"; then die "gcloud may not: $(tail -n 3 "$scratch/ssh" | tr '\n' ' ')"; fi
    why="${why:-$(tail -n 2 "$scratch/ssh" | tr '\n' ' ')}"
    ((try < ssh_tries)) || return 1
    say "no connection to ${opt[name]} (try $try of $ssh_tries): $why"
    why=
    pause "$(backoff "$try")"
  done
}

# Asks all the workers: worker.sh VERB WORDS. The answers are in reply[SLICE.WORKER], and why says who did not answer.
ask() {
  local command
  command="bash $home/worker.sh $(posixq "$@")"
  why=
  persist ask_once "$command"
}

# Says a command to all workers. Sets reply, and fresh: how many have no worker.sh yet.
hear() {
  local s line out=()
  reply=() fresh=0
  for s in "${!nodes[@]}"; do
    if [[ -n ${opt[dry-run]:-} ]]; then
      remote "$s" all "$1"
      continue
    fi
    mapfile -t out < <(remote "$s" all "$1")
    for line in "${out[@]}"; do
      [[ $line != @fresh ]] || fresh=$((fresh + 1))
      [[ ! $line =~ ^@simclr-jax\ worker=([0-9]+)\ (.*)$ ]] || reply[$s.${BASH_REMATCH[1]}]=${BASH_REMATCH[2]}
    done
  done
}

ask_once() {
  local s key fresh
  hear "$1"
  [[ -z ${opt[dry-run]:-} ]] || return 0
  ((${#reply[@]} == total)) && return
  local silent=()
  for s in "${!nodes[@]}"; do
    for ((key = 0; key < workers_of[s]; key++)); do [[ -n ${reply[$s.$key]:-} ]] || silent+=("$(worker_name "$s.$key")"); done
  done
  why="${#reply[@]} of $total workers answered, not $(join "${silent[@]}"). $(tail -n 2 "$scratch/ssh" | tr '\n' ' ')"
  why+='(gcloud needs its key in the agent: ssh-add ~/.ssh/google_compute_engine)'
  return 1
}

copy_all() {
  local s
  for s in "${!nodes[@]}"; do copy "$s" "$@" || return 1; done
}

# The first thing that is said to a VM, where worker.sh may not be yet. Sets reply where it is.
make_home() {
  local fresh
  local command="umask 077; mkdir -p $home && if test -f $home/worker.sh; then bash $home/worker.sh status ''; else echo @fresh; fi"
  hear "$command"
  [[ -z ${opt[dry-run]:-} ]] && ((fresh + ${#reply[@]} != total)) || return 0
  why="$((fresh + ${#reply[@]})) of $total workers answered (gcloud needs its key in the agent: ssh-add ~/.ssh/google_compute_engine). $(tail -n 2 "$scratch/ssh" | tr '\n' ' ')"
  return 1
}

field() {  # field SLICE.WORKER NAME: one value of that worker's answer
  local text=" ${reply[$1]:-} "
  case $2 in
    last) [[ $text =~ \ last=(.*)\ $ ]] ;;
    *) [[ $text =~ \ $2=([^\ ]*)\  ]] ;;
  esac && printf %s "${BASH_REMATCH[1]}" || true
}

workers() { printf '%s\n' "${!reply[@]}" | sort -t. -k1,1n -k2,2n; }

worker_name() {
  if ((${#nodes[@]} > 1)); then echo "worker ${1#*.} of slice ${1%.*}"; else echo "worker ${1#*.}"; fi
}

join() { local IFS=,; local all="$*"; printf %s "${all//,/, }"; }

last_lines() { remote "${1%.*}" "${1#*.}" "bash $home/worker.sh log $2" 2>/dev/null || echo '(its log cannot be read)'; }
