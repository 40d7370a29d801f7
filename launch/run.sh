# shellcheck shell=bash
# The steps of `up`: request the TPU, set up the workers, start the run, watch it, and retry according to its exit codes. Sourced by tpu.sh.

# Makes sure that a resource with these flags exists or is requested, whatever the state was before.
ensure_resource() {
  describe_or_die
  while :; do
    case $state in
      NONE) create_resource && return ;;
      ACTIVE | READY) refuse_other_type && billing=yes && info "${opt[name]} exists ($state)." && return ;;
      WAITING_FOR_RESOURCES | ACCEPTED | PROVISIONING | CREATING | STARTING | REPAIRING | RESTARTING)
        refuse_other_type
        billing=maybe
        info "${opt[name]} is already requested ($state)."
        return
        ;;
      SUSPENDED | FAILED | PREEMPTED | TERMINATED)
        info "${opt[name]} is $state${detail:+ ($detail)}: deleting and requesting it again, because a TPU in this state occupies its name and quota until it is deleted."
        delete_resource
        state=NONE
        ;;
      SUSPENDING | DELETING | STOPPING) wait_until_gone ;;
      STOPPED) die "${opt[name]} is stopped: start it (gcloud compute tpus tpu-vm start) or delete it: $(delete_hint)" ;;
      *) die "${opt[name]} is in an unknown state, $state: nothing was done." ;;
    esac
  done
}

wait_until_gone() {
  local until=$((SECONDS + $(seconds "${opt[max-wait]}")))
  while [[ $state == SUSPENDING || $state == DELETING || $state == STOPPING ]]; do
    ((SECONDS < until)) || { failure=75 && die "${opt[name]} was still $state after ${opt[max-wait]} (--max-wait)."; }
    info "${opt[name]} is $state, waiting"
    pause "${opt[poll]}"
    describe_or_die
  done
}

# Waits until the TPU is ready. Returns 1 and sets why if the request failed or was preempted.
wait_ready() {
  local until=$((SECONDS + $(seconds "${opt[max-wait]}"))) before='' errors=0
  while :; do
    describe
    [[ $state == "$before" ]] || info "$(date +%T) ${opt[name]}: $state"
    before=$state
    case $state in
      ACTIVE | READY) billing=yes && return ;;
      FAILED | SUSPENDED | SUSPENDING | PREEMPTED | TERMINATED | STOPPED | STOPPING)
        why="${opt[name]} is $state${detail:+: $detail}"
        return 1
        ;;
      NONE | DELETING) die "${opt[name]} is deleted or being deleted ($state): a TPU that someone else deleted is not created again." ;;
      ERROR)
        if is_denied "$detail" || ((++errors > 10)); then die "cannot read the state of ${opt[name]}: $detail"; fi
        ;;
      *) errors=0 ;;
    esac
    ((SECONDS < until)) || { failure=75 && die "${opt[name]} was still $state after ${opt[max-wait]} (--max-wait). The request stays in the queue, and billing may start later. To delete it: $(delete_hint)"; }
    pause "${opt[poll]}"
  done
}

# For the subcommands that need an existing TPU.
find_workers() {
  describe_or_die
  case $state in
    ACTIVE | READY) billing=yes ;;
    NONE) die "${opt[name]} does not exist in ${opt[zone]}: create it with tpu.sh create, or list the TPUs with tpu.sh list." ;;
    *) die "${opt[name]} is $state, not ready: run tpu.sh wait." ;;
  esac
  if [[ -z ${opt[type]:-} ]]; then opt[type]=$found_type; fi
  check_type
  count_workers || die "$why"
}

setup_workers() {
  info "setup: Python and the pinned packages on $total workers (takes minutes on new workers)"
  with_retries copy_all "$here/worker.sh" "$here/requirements.txt" "$here/uv.txt" &&
    ask setup "${opt[python]:-}" && require_ok && require_equal_versions
}

# Copies only files that git tracks (with --dirty: or does not ignore), without files that look like secrets.
pack_source() {
  local file revision dirty='' kept=() skipped=()
  git -C "$root" rev-parse --verify -q HEAD >/dev/null || die "$root is not a git checkout: the launcher copies one exact commit."
  revision=$(git -C "$root" rev-parse HEAD)
  [[ -z $(git -C "$root" status --porcelain) ]] || dirty=1
  [[ -z $dirty || -n ${opt[dirty]:-}${opt[dry-run]:-} ]] ||
    die 'there are uncommitted changes: commit them, or copy them as they are with --dirty.'
  while IFS= read -r -d '' file; do
    [[ -f $root/$file && ! -L $root/$file ]] || continue
    if looks_secret "$file"; then skipped+=("$file"); else kept+=("$file"); fi
  done < <(git -C "$root" ls-files -z ${dirty:+--others --cached --exclude-standard})
  ((${#skipped[@]} == 0)) || warn "skipped files that look like secrets: $(join "${skipped[@]}")"
  printf '%s\0' "${kept[@]}" >"$scratch/files"
  tar -C "$root" --null -T "$scratch/files" -cf - | gzip -n >"$bundle/source.tgz" || die 'cannot pack the source.'
  (($(wc -c <"$bundle/source.tgz") < 200000000)) || die 'the source is larger than 200 MB: keep data out of the git checkout.'
  source_id=$revision
  if [[ -n $dirty ]]; then source_id=$revision+$(sha256 "$bundle/source.tgz" | cut -c1-8); fi
  describe_file source.tgz "${#kept[@]} files of $root at ${source_id:0:12}${source_id:40}"
}

# In a dry run: prints the content of a file that the next command copies.
describe_file() { [[ -z ${opt[dry-run]:-} ]] || printf '%s\n' "# $state_dir/bundle/$1: $2" | sed '2,$s/^/#   /'; }

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
  info "sync: source ${source_id:0:12}${source_id:40} to $total workers"
  with_retries copy_all "$state_dir/bundle/source.tgz" && ask unpack "$(sha256 "$bundle/source.tgz")" "$source_id" && require_ok
}

# Exits with the error of the first worker that reported ok=0.
require_ok() {
  local key
  [[ -z ${opt[dry-run]:-} ]] || return 0
  for key in $(workers); do
    [[ $(field "$key" ok) == 1 ]] || die "$(worker_name "$key"): $(field "$key" last)"
  done
}

# Exits if the workers differ: different versions can stall a pod, or train a different model than configured.
require_equal_versions() {
  local key what first
  [[ -z ${opt[dry-run]:-} ]] || return 0
  for what in source job python jax jaxlib libtpu flax orbax-checkpoint; do
    first=$(field "$(workers | head -n 1)" "$what")
    for key in $(workers); do
      [[ $(field "$key" "$what") == "$first" ]] ||
        die "the workers differ in $what: $first on $(worker_name "$(workers | head -n 1)"), $(field "$key" "$what") on $(worker_name "$key"): run tpu.sh setup and tpu.sh sync again, or delete the TPU."
    done
  done
}

# Writes job.sh, the script that every worker runs.
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
    printf 'exec "$PYTHON" -m simclr_jax %s\n' "$(posixq "${program[@]}")"
  } >"$bundle/job.sh"
}

# Whether all workers, according to their answers, are running exactly this run. Sets job (the checksum of job.sh) and running.
already_running() {
  local program=("${args[@]}") key
  if [[ " ${args[*]} " != *' --workdir='* ]]; then program+=("--workdir=${opt[workdir]}"); fi
  write_job
  job=$(sha256 "$bundle/job.sh" | cut -c1-16) running=0
  for key in $(workers); do
    [[ $(field "$key" state) == running ]] || continue
    running=$((running + 1))
    [[ $(field "$key" job) == "$job" ]] || die "$(worker_name "$key") is already running another run: follow that run with tpu.sh attach, or end it with tpu.sh stop."
  done
  ((running == total)) && info 'this run is already running on all workers.'
}

start_run() {
  local job running
  ask status "${opt[workdir]}" || return 1
  if already_running; then return; fi
  describe_file job.sh "$(<"$bundle/job.sh")"
  ((running == 0)) || stop_all KILL 0 || return 1
  with_retries copy_all "$state_dir/bundle/job.sh" || return 1
  [[ -z ${opt[env-file]:-} ]] || with_retries copy_all --as env "${opt[env-file]}" || return 1
  ask check && require_ok && require_equal_versions && ask start "$job" && require_ok || return 1
  info "run: started on $total workers"
}

stop_all() {  # stop_all SIGNAL REQUESTED: REQUESTED is 1 if an operator asked for the stop
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

# Counts the workers: running, ended, lost, never (not started), clean (exit code 0), asked (stopped by an operator). Sets step, the latest checkpoint.
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

# Watches the run until it ends. Sets outcome: finished, stopped, retry or failed; and why, culprit and code.
watch() {
  local errors=0 quiet_polls=0 partial_since=0 before='' news
  outcome='' why='' culprit='' code=0
  while :; do
    describe
    case $state in
      ACTIVE | READY) errors=0 ;;
      SUSPENDING | SUSPENDED | PREEMPTED | TERMINATED | FAILED)
        outcome=retry why="preempted: ${opt[name]} is $state"
        return
        ;;
      NONE | DELETING) billing='' && die "${opt[name]} was deleted during the run: a TPU that someone else deleted is not created again." ;;
      *)
        if is_denied "$detail" || ((++errors > 20)); then die "cannot read the state of ${opt[name]} ($state): $detail. The run continues; follow it with tpu.sh attach."; fi
        pause "${opt[poll]}"
        continue
        ;;
    esac
    if ! ask status "${opt[workdir]}"; then
      ((++quiet_polls < 3)) || { outcome=retry && why="${why:-the workers do not answer}" && return; }
      continue
    fi
    quiet_polls=0
    count_states
    key=$(workers | head -n 1)
    news="$running of $total workers running, checkpoint $step; $(field "$key" last)"
    [[ $news == "$before" ]] || info "$(date +%T) $news"
    before=$news
    if ((running == 0)); then
      judge
      return
    fi
    # When a worker dies, JAX's heartbeat timeout ends the others. Workers that still run after --grace would never end.
    if ((running < total)); then
      ((partial_since)) || partial_since=$SECONDS
      if ((SECONDS - partial_since > $(seconds "${opt[grace]}"))); then
        info "$((total - running)) of $total workers have ended, but the others still run after ${opt[grace]} s (--grace): killing them."
        ask stop KILL 0 || true
      fi
    fi
    pause "${opt[poll]}"
  done
}

# Derives outcome, culprit and why from the exit codes. The code with the highest rank is the cause: when one worker fails, its peers abort with 134.
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
  why="$(worker_name "$culprit"): exit code ${code/lost/unknown} ($(meaning "$code"))"
  case $worst in
    6) outcome=failed ;;
    5) killed=$((killed + 1)) && if ((killed > 1)); then outcome=failed why+=', the second time'; else outcome=retry; fi ;;
    *) outcome=retry ;;
  esac
  return 0
}

meaning() {
  case $1 in
    1) echo 'error; see the log' ;;
    2) echo 'invalid arguments or recipe' ;;
    3) echo 'the loss is not finite' ;;
    4) echo 'a step hung; see the stack traces in the log' ;;
    75) echo 'preempted; a checkpoint was saved' ;;
    130) echo 'stopped by Ctrl-C' ;;
    134) echo 'another worker died' ;;
    137) echo 'killed; out of memory?' ;;
    143 | 129) echo 'terminated before a checkpoint was saved' ;;
    lost) echo 'the machine went down' ;;
    *) echo 'unexpected' ;;
  esac
}

# Prints the latest checkpoint in the workdir.
checkpoint() {
  if [[ ${opt[workdir]} != gs://* ]]; then
    echo "$step"
    return
  fi
  local found
  found=$(gcloud storage ls "${opt[workdir]%/}/checkpoints/" 2>/dev/null </dev/null | sed -n 's|.*/\([0-9]\{1,18\}\)/$|\1|p' | sort -n | tail -n 1) || true
  echo "${found:-none}"
}

report() {  # prints why, and the last lines of the log of the culprit
  printf 'tpu.sh: %s\n' "$why" >&2
  [[ -n $culprit ]] || return 0
  printf '%s\n' "--- the last 30 lines of $(worker_name "$culprit")" >&2
  last_lines "$culprit" 30 >&2
  printf '%s\n' '---' >&2
}

# Requests the TPU, sets up the workers and starts the run. Returns 1 and sets why if a retry may help.
bring_up() {
  ensure_resource
  wait_ready || return 1
  count_workers && with_retries make_home || return 1
  local job running
  if [[ -z ${opt[dry-run]:-} ]] && already_running; then return; fi  # keep its packages and source
  setup_workers && sync_source && start_run
}

# Starts and watches the run, and retries as long as there are new checkpoints.
run_to_completion() {
  local tries=0 stalled=0 best=none now killed=0
  local outcome why culprit code step=none running ended lost clean asked never key
  while :; do
    outcome=retry culprit='' why=''
    if bring_up; then
      [[ -z ${opt[dry-run]:-} ]] || return 0
      watch
    fi
    case $outcome in
      finished) info "done: checkpoint $(checkpoint) in ${opt[workdir]}" && return 0 ;;
      stopped) info 'stopped as requested; continue the run with tpu.sh resume.' && return 75 ;;
      failed) report && return "$code" ;;
    esac
    report
    now=$(checkpoint)
    if [[ $now == none || $now == "$best" ]]; then stalled=$((stalled + 1)); else stalled=0; fi
    best=$now tries=$((tries + 1))
    if ((stalled >= opt[stall])); then
      printf 'tpu.sh: giving up: %s starts in a row without a new checkpoint (%s); see --stall.\n' "$stalled" "$now" >&2
      return 1
    fi
    if ((tries > opt[retries])); then
      printf 'tpu.sh: giving up after %s retries (--retries); rerun the same command to resume from checkpoint %s.\n' "${opt[retries]}" "$now" >&2
      return 75
    fi
    info "retry $tries of ${opt[retries]}, from checkpoint $now"
    pause "$(backoff "$tries")"
  done
}

finish() {  # after success or failure
  if [[ -n ${opt[autodelete]:-} ]]; then
    describe
    [[ $state == NONE ]] || delete_resource
  elif [[ -z ${opt[dry-run]:-} && -n $billing ]]; then
    info "${opt[name]} still exists and is billed. To delete it: $(delete_hint)"
  fi
}
