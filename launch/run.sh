# shellcheck shell=bash
# The parts of `up`: a TPU that is there, workers that are equal, a run that is watched, judged and repeated. Sourced by tpu.sh.

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
