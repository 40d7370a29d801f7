# shellcheck shell=bash
# Words, quoting, checks of what was given. Sourced by tpu.sh.

say() { [[ -n ${opt[quiet]:-} ]] || printf '%s\n' "$*" >&2; }
warn() { printf 'tpu.sh: warning: %s\n' "$*" >&2; }
die() { printf 'tpu.sh: %s\n' "$*" >&2; exit "${failure:-1}"; }  # with exit code 1, or $failure
wrong() { printf 'tpu.sh: %s\n' "$*" >&2; exit 2; }  # wrong usage

# One word per argument for any POSIX shell: nothing in them is expanded or executed. `printf %q` and
# ${x@Q} write $'...', which dash does not read.
posixq() {
  local LC_ALL=C word out=
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      out+=" $word"
    else
      out+=" '${word//\'/\'\\\'\'}'"
    fi
  done
  printf %s "${out# }"
}

sha256() { if command -v sha256sum >/dev/null; then sha256sum "$@"; else shasum -a 256 "$@"; fi | cut -d' ' -f1; }

# Sleeps so that Ctrl-C and kill are answered at once.
pause() {
  sleep "$1" &
  sleeper=$!
  wait "$sleeper" || true
  sleeper=
}

# The pause before try number $1: doubled each time up to 5 minutes, give or take a quarter.
backoff() {
  local base=${opt[backoff]} n=$1
  awk -v base="$base" -v n="$n" -v r="$RANDOM" \
    'BEGIN { s = base * 2 ^ (n > 9 ? 9 : n - 1); if (s > 300) s = 300; printf "%.2f", s * (0.75 + r / 65536) }'
}

seconds() {  # 90, 90s, 30m, 6h, 2d
  local n=${1%[smhd]}
  case $1 in *m) n=$((n * 60)) ;; *h) n=$((n * 3600)) ;; *d) n=$((n * 86400)) ;; esac
  printf %s "$n"
}

is_secret_name() { [[ ${1^^} =~ (^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$) ]]; }

# --- checks: each says what is wrong, where, and the mend

check_name() {
  [[ -n ${opt[name]:-} ]] || wrong 'which TPU? Give --name=NAME (or TPU_NAME), a name of your choice.'
  [[ ${opt[name]} =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
    wrong "--name=$(posixq "${opt[name]}"): lower-case letters, digits and hyphens, at most 63, a letter first and no hyphen last."
}

check_place() {
  [[ -n ${opt[zone]:-} ]] || wrong 'which zone? Give --zone=ZONE (or TPU_ZONE), such as us-central2-b.'
  [[ ${opt[zone]} =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] ||
    wrong "--zone=$(posixq "${opt[zone]}") is no zone: they look like us-central2-b."
  [[ -z ${opt[project]:-} || ${opt[project]} =~ ^([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]$ ]] ||
    wrong "--project=$(posixq "${opt[project]}") is no project id: 6 to 30 lower-case letters, digits and hyphens."
}

# Sets family, chips (a slice) and hosts (a slice) of --type. Google counts TensorCores in v2 to v4 and v5p, chips in v5e and v6e.
check_type() {
  [[ -n ${opt[type]:-} ]] || wrong 'which TPU? Give --type=TYPE (or TPU_TYPE), such as v4-32 or v6e-8.'
  [[ ! ${opt[type],,} =~ ^(tpu7x?|v7x?|ironwood) ]] ||
    wrong "--type=$(posixq "${opt[type]}"): TPU7x (Ironwood) is offered by Google Kubernetes Engine only, not as a TPU VM; docs/launch.md says how to run there."
  opt[type]=${opt[type]/#v5e-/v5litepod-}  # the name on Google's pages -> the name that gcloud takes
  if [[ ${opt[type]} =~ ^(v2|v3|v4|v5p)-([1-9][0-9]{0,4})$ ]] && ((BASH_REMATCH[2] % 8 == 0)); then
    chips=$((BASH_REMATCH[2] / 2)) hosts=$((BASH_REMATCH[2] / 8))
  elif [[ ${opt[type]} =~ ^(v5litepod|v6e)-(1|4|8|16|32|64|128|256)$ ]]; then
    chips=${BASH_REMATCH[2]} hosts=$((chips > 8 ? chips / 4 : 1))
  else
    wrong "--type=$(posixq "${opt[type]}") is no TPU type: v2-, v3-, v4- or v5p- and a multiple of 8 (TensorCores), v5litepod- or v6e- and 1, 4, 8, 16 ... 256 (chips)."
  fi
  family=${BASH_REMATCH[1]}
}

check_numbers() {
  local key
  for key in num-slices retries stall lines; do
    [[ ${opt[$key]} =~ ^[0-9]{1,4}$ ]] || wrong "--$key=$(posixq "${opt[$key]}"): a whole number."
  done
  ((${opt[num-slices]} >= 1)) || wrong '--num-slices: at least 1.'
  ((${opt[stall]} >= 1)) || wrong '--stall: at least 1.'
  for key in poll backoff; do
    [[ ${opt[$key]} =~ ^[0-9]{1,5}(\.[0-9]+)?$ ]] || wrong "--$key=$(posixq "${opt[$key]}"): a number of seconds."
  done
  for key in valid-until max-run-duration max-wait grace; do
    [[ -z ${opt[$key]:-} || ${opt[$key]} =~ ^[0-9]{1,7}[smhd]?$ ]] ||
      wrong "--$key=$(posixq "${opt[$key]}"): a number and s, m, h or d, such as 6h."
  done
  [[ -z ${opt[worker]:-} || ${opt[worker]} =~ ^(all|[0-9]{1,4}(\.[0-9]{1,4})?)$ ]] ||
    wrong "--worker=$(posixq "${opt[worker]}"): a number, SLICE.NUMBER or all."
}

check_tier() {
  local key chosen=()
  for key in spot best-effort reserved flex-start; do [[ -z ${opt[$key]:-} ]] || chosen+=("--$key"); done
  ((${#chosen[@]} <= 1)) || wrong "${chosen[*]}: choose one."
  [[ -z ${opt[flex-start]:-} || -n ${opt[max-run-duration]:-} ]] ||
    wrong '--flex-start needs --max-run-duration, at most 7d: for how long the TPU is wanted.'
  if [[ -n ${opt[no-queue]:-} ]]; then
    ((${opt[num-slices]} == 1)) || wrong '--num-slices needs a queued resource: leave --no-queue out.'
    for key in best-effort flex-start valid-until max-run-duration; do
      [[ -z ${opt[$key]:-} ]] || wrong "--$key needs a queued resource: leave --no-queue out."
    done
  fi
  [[ -z ${opt[internal-ip]:-} || -z ${opt[iap]:-} ]] || wrong '--internal-ip --iap: choose one.'
}

# What may be given to gcloud in a list of KEY=VALUE,... or as a plain word.
check_words() {
  local key
  for key in network subnet service-account version disk; do
    [[ -z ${opt[$key]:-} || ${opt[$key]} =~ ^[A-Za-z0-9][A-Za-z0-9@._:/-]*$ ]] ||
      wrong "--$key=$(posixq "${opt[$key]}"): letters, digits and @._:/- only."
  done
  [[ -z ${opt[labels]:-} || ${opt[labels]} =~ ^[a-z][-_a-z0-9]*=[-_a-z0-9]*(,[a-z][-_a-z0-9]*=[-_a-z0-9]*)*$ ]] ||
    wrong "--labels=$(posixq "${opt[labels]}"): KEY=VALUE,... in lower-case letters, digits, _ and -."
  [[ -z ${opt[python]:-} || ${opt[python]} =~ ^/[A-Za-z0-9_./+-]+$ ]] ||
    wrong "--python=$(posixq "${opt[python]}"): the absolute path of an interpreter on the workers."
}

check_workdir() {
  local dir=${opt[workdir]:-}
  [[ -n $dir ]] || wrong 'where to? Give --workdir=gs://BUCKET/FOLDER (or TPU_WORKDIR): the run is saved and resumed there.'
  [[ ! $dir =~ [[:cntrl:]] ]] || wrong '--workdir has a control character in it.'
  [[ ! $dir =~ (^|/)\.\.(/|$) ]] || wrong "--workdir=$(posixq "$dir"): no '..' in it."
  if [[ $dir == gs://* ]]; then
    [[ $dir =~ ^gs://[a-z0-9][-a-z0-9._]*/[^/] ]] || wrong "--workdir=$(posixq "$dir"): gs://BUCKET/FOLDER, not the bucket itself."
  else
    [[ $dir == /?* && $dir =~ ^/[^/]+/+[^/] ]] || wrong "--workdir=$(posixq "$dir"): gs://BUCKET/FOLDER, or an absolute path at least two levels deep."
  fi
}

# A workdir that dies with the VM, or that one worker alone sees.
warn_workdir() {
  [[ ${opt[workdir]} != gs://* ]] || return 0
  ((hosts * ${opt[num-slices]} == 1)) ||
    warn "--workdir=${opt[workdir]} has to be one file system that all the workers share (Filestore, gcsfuse); gs:// always is."
  warn "if ${opt[workdir]} is on the TPU VM's own disk, a preemption or a delete takes the checkpoints with it; gs:// survives."
}

check_env() {
  local pair key
  for pair in "${env_pairs[@]}"; do
    key=${pair%%=*}
    [[ $pair == *=* && $key =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || wrong "--env=$(posixq "$pair"): KEY=VALUE, KEY of letters, digits and _."
    ! is_secret_name "$key" ||
      wrong "--env=$key=...: looks like a secret, and words of commands are seen by everybody; put it into a file of KEY=VALUE lines, chmod 600, and give --env-file=FILE."
  done
  [[ -n ${opt[env-file]:-} ]] || return 0
  [[ -f ${opt[env-file]} && -r ${opt[env-file]} ]] || wrong "--env-file=$(posixq "${opt[env-file]}"): no such file, or not readable."
  local mode
  mode=$(stat -L -c %a "${opt[env-file]}" 2>/dev/null || stat -L -f %Lp "${opt[env-file]}")
  [[ $mode == ?00 ]] || wrong "--env-file=$(posixq "${opt[env-file]}") can be read by others (mode $mode): chmod 600 it."
  local line
  while IFS= read -r line || [[ -n $line ]]; do
    [[ -z $line || $line == \#* || $line =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] ||
      wrong "--env-file=$(posixq "${opt[env-file]}"): a line is not KEY=VALUE (it is not shown, it may be a secret)."
  done <"${opt[env-file]}"
}

# The words for `simclr-jax`: a verb and its flags, with the one --workdir.
check_args() {
  local word
  ((${#args[@]})) || wrong 'what to run? Put the words of simclr-jax after two hyphens: tpu.sh up ... -- pretrain --config=simclr_imagenet --data=gs://...'
  [[ ${args[0]} =~ ^[a-z][a-z0-9-]*$ ]] || wrong "$(posixq "${args[0]}") is no verb of simclr-jax: the first word after -- is one, such as pretrain."
  for word in "${args[@]}"; do
    case $word in
      --workdir=*)
        [[ -z ${opt[workdir]:-} || ${opt[workdir]} == "${word#*=}" ]] ||
          wrong "two workdirs: $(posixq "${opt[workdir]}") and $(posixq "${word#*=}"); one is enough."
        opt[workdir]=${word#*=}
        ;;
      --workdir) wrong '--workdir VALUE after --: write --workdir=VALUE, or give it before the --.' ;;
      # The key alone is shown: the value would be the secret.
      --*=*) ! is_secret_name "$(tr '.-' '__' <<<"${word%%=*}")" || wrong "${word%%=*}=...: looks like a secret; put it into --env-file." ;;
    esac
  done
}
