# shellcheck shell=bash
# All gcloud calls, and the parsing of their output. Sourced by tpu.sh.

# Runs a gcloud call that changes a resource or connects to workers. With --dry-run, the call is printed instead.
cloud() {
  if [[ -n ${opt[dry-run]:-} ]]; then
    printf '%s\n' "$(posixq gcloud "$@")"
    return
  fi
  [[ -z ${opt[verbose]:-} ]] || printf '+ %s\n' "$(posixq gcloud "$@")" >&3  # to the terminal, also where stderr is redirected
  gcloud "$@" </dev/null 3>&-
}

need_gcloud() {
  [[ -n ${opt[dry-run]:-} ]] && return
  command -v gcloud >/dev/null ||
    die 'gcloud is not installed: see https://cloud.google.com/sdk/docs/install (--dry-run works without gcloud).'
  local account
  account=$(gcloud auth list --filter=status:ACTIVE '--format=value(account)' 2>/dev/null </dev/null) || true
  [[ -n $account ]] || die 'gcloud has no active account: run gcloud auth login'
}

set_location() { location=("--zone=${opt[zone]}"); [[ -z ${opt[project]:-} ]] || location+=("--project=${opt[project]}"); }

# --- the resource

# Sets state (NONE if the resource does not exist, ERROR if gcloud fails for another reason), found_type, nodes and detail.
describe() {
  local kind=(compute tpus queued-resources describe)
  local fields='state.state,tpu.nodeSpec[0].node.acceleratorType,tpu.nodeSpec[].nodeId.list(),state.failedData.error.message'
  if [[ -n ${opt[no-queue]:-} ]]; then
    kind=(compute tpus tpu-vm describe) fields='state,acceleratorType,name.basename(),health'
  fi
  local call=("${kind[@]}" "${opt[name]}" "${location[@]}" "--format=value[separator=\"|\"]($fields)")
  if [[ -n ${opt[dry-run]:-} ]]; then
    cloud "${call[@]}"
    state=$dry_run_state found_type=${opt[type]:-} detail=
    dry_run_nodes
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
  # "PERMISSION_DENIED: Location ... is not found" does not mean that the resource is missing: only the error code NOT_FOUND does.
  if grep -q 'NOT_FOUND: ' "$scratch/describe" && ! grep -q PERMISSION_DENIED "$scratch/describe"; then state=NONE; fi
}

dry_run_nodes() {
  local i
  nodes=("${opt[name]}")
  ((${opt[num-slices]} == 1)) && return
  nodes=()
  for ((i = 0; i < ${opt[num-slices]}; i++)); do nodes+=("${opt[name]}-$i"); done
}

is_denied() { [[ $1 =~ PERMISSION_DENIED|UNAUTHENTICATED|invalid_grant|Reauthentication|gcloud\ auth\ login ]]; }

# Like describe, but exits on ERROR: without a known state, nothing is created, deleted or retried.
describe_or_die() {
  describe
  [[ $state != ERROR ]] || die "cannot determine whether ${opt[name]} exists, so nothing was done: $detail"
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
  [[ $version == "$(runtime_version)" ]] || warn "--version=$version: Google recommends $(runtime_version) for ${opt[type]}."
  call=("${opt[name]}" "${location[@]}" "--accelerator-type=${opt[type]}" "--labels=$labels")
  if [[ -n ${opt[no-queue]:-} ]]; then
    call=(compute tpus tpu-vm create "${call[@]}" "--version=$version")
  else
    if ((${opt[num-slices]} > 1)); then
      call+=("--node-count=${opt[num-slices]}" "--node-prefix=${opt[name]}")
    else
      call+=("--node-id=${opt[name]}")
    fi
    [[ -z ${opt[valid-until]:-} ]] || call+=("--valid-until-duration=${opt[valid-until]}")
    # These flags are in gcloud alpha only.
    [[ -z ${opt[best-effort]:-} ]] || { alpha=(alpha) && call+=(--best-effort); }
    [[ -z ${opt[flex-start]:-} ]] || { alpha=(alpha) && call+=(--provisioning-model=flex-start); }
    [[ -z ${opt[max-run-duration]:-} ]] || { alpha=(alpha) && call+=("--max-run-duration=${opt[max-run-duration]}"); }
    # With --spot but no --provisioning-model, gcloud alpha also requests the standard model.
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
  info "creating ${opt[name]}: $((chips * ${opt[num-slices]})) chips of ${opt[type]} in ${opt[zone]}; billing starts as soon as the TPU is active."
  billing=maybe
  if cloud "${call[@]}" 2>"$scratch/create"; then
    dry_run_state=ACTIVE
    return
  fi
  if grep -q ALREADY_EXISTS "$scratch/create"; then
    info "${opt[name]} was created by someone else in the meantime: checking its state again."
    describe_or_die
    [[ $state != NONE ]] || die "gcloud reports both that ${opt[name]} exists and that ${opt[name]} does not exist: rerun the same command in a minute."
    refuse_other_type
    return
  fi
  billing=
  die "could not create ${opt[name]}: $(tail -n 5 "$scratch/create" | tr '\n' ' ')"
}

refuse_other_type() {
  [[ -z ${opt[type]:-} || -z $found_type || $found_type == "${opt[type]}" ]] ||
    die "${opt[name]} exists in ${opt[zone]} and is a $found_type, not a ${opt[type]}: choose another --name, or delete the TPU: $(delete_hint)"
}

delete_resource() {
  info "deleting ${opt[name]} ($state)"
  local call=(compute tpus queued-resources delete "${opt[name]}" "${location[@]}" --force --quiet)
  [[ -z ${opt[no-queue]:-} ]] || call=(compute tpus tpu-vm delete "${opt[name]}" "${location[@]}" --quiet)
  if ! cloud "${call[@]}" 2>"$scratch/delete" && ! grep -q 'NOT_FOUND: ' "$scratch/delete"; then
    die "could not delete ${opt[name]}, so the TPU may still be billed: $(tail -n 3 "$scratch/delete" | tr '\n' ' ')"
  fi
  billing='' dry_run_state=NONE
}

delete_hint() {
  local hint=("$0" delete "--name=${opt[name]}" "${location[@]}")
  [[ -z ${opt[no-queue]:-} ]] || hint+=(--no-queue)
  posixq "${hint[@]}"
}

# --- the workers

# Sets workers_of (workers per slice) as gcloud reports them; in a dry run, from the TPU type.
count_workers() {
  local s line call
  workers_of=()
  for s in "${!nodes[@]}"; do
    call=(compute tpus tpu-vm describe "${nodes[s]}" "${location[@]}" '--format=value(networkEndpoints.len())')
    if [[ -n ${opt[dry-run]:-} ]]; then
      cloud "${call[@]}"
      line=$hosts
    else
      line=$(cloud "${call[@]}" 2>"$scratch/count") || true
    fi
    [[ $line =~ ^[1-9][0-9]*$ ]] || { why="cannot get the number of workers of ${nodes[s]}: $(tail -n 1 "$scratch/count" 2>/dev/null)"; return 1; }
    workers_of[s]=$line
  done
  total=0
  for line in "${workers_of[@]}"; do total=$((total + line)); done
  ((total > 0)) || { why="${opt[name]} has no nodes"; return 1; }
}

# Sets call and flags of `gcloud ... $3` (ssh or scp) for the workers $2 of slice $1. The caller adds the positional arguments.
ssh_call() {
  local flag="--$3-flag=-o"
  if [[ -n ${opt[no-queue]:-} ]]; then
    call=(compute tpus tpu-vm "$3")
    [[ -z ${opt[iap]:-} ]] || call=(alpha "${call[@]}")  # gcloud's stable tpu-vm ssh has no IAP
    flags=("${location[@]}" "--worker=$2")
  else
    call=(compute tpus queued-resources "$3")
    flags=("${location[@]}" "--node=$1" "--worker=$2")
  fi
  [[ -z ${opt[internal-ip]:-} ]] || flags+=(--internal-ip)
  [[ -z ${opt[iap]:-} ]] || flags+=(--tunnel-through-iap)
  flags+=("${flag}ConnectTimeout=30" "${flag}ServerAliveInterval=30" --quiet)
}

# Runs the shell command $3 on the workers $2 of slice $1.
remote() {
  local call flags
  ssh_call "$1" "$2" ssh
  cloud "${call[@]}" "${opt[name]}" "${flags[@]}" "--command=$3"
}

# Copies the files ${@:2} into the run's folder on all workers of slice $1; --as NAME FILE copies one file under another name.
copy() {
  local call flags s=$1 name=
  shift
  if [[ $1 == --as ]]; then
    name=$2
    shift 2
  fi
  ssh_call "$s" all scp
  cloud "${call[@]}" "$@" "${opt[name]}:$home/$name" "${flags[@]}"
}

# Retries a command that may have failed because of the connection. gcloud itself reconnects ten times before it fails. gcloud may
# return exit code 0 without having reached a worker (a node that gcloud cannot prepare is skipped): so the caller counts the answers.
with_retries() {
  local try
  for ((try = 1; ; try++)); do
    if "$@" 2>"$scratch/ssh"; then return; fi
    if is_denied "$(<"$scratch/ssh")"; then die "gcloud was denied access: $(tail -n 3 "$scratch/ssh" | tr '\n' ' ')"; fi
    why="${why:-$(tail -n 2 "$scratch/ssh" | tr '\n' ' ')}"
    ((try < ssh_tries)) || return 1
    info "connection to ${opt[name]} failed (attempt $try of $ssh_tries): $why"
    why=
    pause "$(backoff "$try")"
  done
}

# Runs worker.sh SUBCOMMAND ARGUMENTS on all workers. Sets reply[SLICE.WORKER] to the answers. If an answer is missing, why names the workers.
ask() {
  local command
  command="bash $home/worker.sh $(posixq "$@")"
  why=
  with_retries ask_once "$command"
}

# Runs a shell command on all workers. Sets reply, and fresh: the number of workers without worker.sh.
run_on_all() {
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
  run_on_all "$1"
  [[ -z ${opt[dry-run]:-} ]] || return 0
  ((${#reply[@]} == total)) && return
  local missing=()
  for s in "${!nodes[@]}"; do
    for ((key = 0; key < workers_of[s]; key++)); do [[ -n ${reply[$s.$key]:-} ]] || missing+=("$(worker_name "$s.$key")"); done
  done
  why="${#reply[@]} of $total workers answered; no answer from $(join "${missing[@]}"). $(tail -n 2 "$scratch/ssh" | tr '\n' ' ')"
  why+='(gcloud needs its SSH key in ssh-agent: ssh-add ~/.ssh/google_compute_engine)'
  return 1
}

copy_all() {
  local s
  for s in "${!nodes[@]}"; do copy "$s" "$@" || return 1; done
}

# The first command on a VM: creates the run's folder. Sets reply for the workers that already have worker.sh.
make_home() {
  local fresh
  local command="umask 077; mkdir -p $home && if test -f $home/worker.sh; then bash $home/worker.sh status ''; else echo @fresh; fi"
  run_on_all "$command"
  [[ -z ${opt[dry-run]:-} ]] && ((fresh + ${#reply[@]} != total)) || return 0
  why="$((fresh + ${#reply[@]})) of $total workers answered (gcloud needs its SSH key in ssh-agent: ssh-add ~/.ssh/google_compute_engine). $(tail -n 2 "$scratch/ssh" | tr '\n' ' ')"
  return 1
}

field() {  # field SLICE.WORKER NAME: prints one value from the answer of that worker
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

last_lines() { remote "${1%.*}" "${1#*.}" "bash $home/worker.sh log $2" 2>/dev/null || echo '(the log cannot be read)'; }
