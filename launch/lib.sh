# shellcheck shell=bash
# Messages, quoting and the checks of flags and arguments. Sourced by tpu.sh.

info() { [[ -n ${opt[quiet]:-} ]] || printf '%s\n' "$*" >&2; }
warn() { printf 'tpu.sh: warning: %s\n' "$*" >&2; }
die() { printf 'tpu.sh: %s\n' "$*" >&2; exit "${failure:-1}"; }  # with exit code 1, or $failure
usage_error() { printf 'tpu.sh: %s\n' "$*" >&2; exit 2; }  # invalid usage

# Quotes the arguments for any POSIX shell, so that nothing in them is expanded or executed. `printf %q` and
# ${x@Q} write $'...', which dash does not support.
posixq() {
  local LC_ALL=C arg out=
  for arg in "$@"; do
    if [[ $arg =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      out+=" $arg"
    else
      out+=" '${arg//\'/\'\\\'\'}'"
    fi
  done
  printf %s "${out# }"
}

# Prints a path on this machine as an absolute path: no program takes it for a flag or, because of a colon, for another machine.
local_path() { if [[ $1 == /* ]]; then printf %s "$1"; else printf %s "$PWD/$1"; fi; }

sha256() { if command -v sha256sum >/dev/null; then sha256sum "$@"; else shasum -a 256 "$@"; fi | cut -d' ' -f1; }

# Sleeps in the background, so that the traps for Ctrl-C and kill run at once.
pause() {
  sleep "$1" &
  sleeper=$!
  wait "$sleeper" || true
  sleeper=
}

# The delay in seconds before retry $1: exponential backoff up to 5 minutes, with a jitter of 25 %.
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

# --- checks: each message names the flag, the error and the fix

check_name() {
  [[ -n ${opt[name]:-} ]] || usage_error '--name=NAME (or TPU_NAME) is required: a name of your choice for the TPU.'
  [[ ${opt[name]} =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
    usage_error "--name=$(posixq "${opt[name]}") must have at most 63 lower-case letters, digits and hyphens; the first must be a letter, and the last must not be a hyphen."
}

check_location() {
  [[ -n ${opt[zone]:-} ]] || usage_error '--zone=ZONE (or TPU_ZONE) is required, such as us-central2-b.'
  [[ ${opt[zone]} =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] ||
    usage_error "--zone=$(posixq "${opt[zone]}") is not a zone: zones look like us-central2-b."
  [[ -z ${opt[project]:-} || ${opt[project]} =~ ^([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]$ ]] ||
    usage_error "--project=$(posixq "${opt[project]}") is not a project ID: project IDs have 6 to 30 lower-case letters, digits and hyphens."
}

# Sets family, chips and hosts (both per slice) from --type. The number in a type counts TensorCores for v2 to v4 and v5p, chips for v5e and v6e.
check_type() {
  [[ -n ${opt[type]:-} ]] || usage_error '--type=TYPE (or TPU_TYPE) is required, such as v4-32 or v6e-8.'
  [[ ! ${opt[type],,} =~ ^(tpu7x?|v7x?|ironwood) ]] ||
    usage_error "--type=$(posixq "${opt[type]}"): TPU7x (Ironwood) is available on Google Kubernetes Engine only, not as a TPU VM; see the section on Kubernetes in docs/launch.md."
  opt[type]=${opt[type]/#v5e-/v5litepod-}  # the name in Google's documentation -> the name in gcloud
  if [[ ${opt[type]} =~ ^(v2|v3|v4|v5p)-([1-9][0-9]{0,4})$ ]] && ((BASH_REMATCH[2] % 8 == 0)); then
    chips=$((BASH_REMATCH[2] / 2)) hosts=$((BASH_REMATCH[2] / 8))
  elif [[ ${opt[type]} =~ ^(v5litepod|v6e)-(1|4|8|16|32|64|128|256)$ ]]; then
    chips=${BASH_REMATCH[2]} hosts=$((chips > 8 ? chips / 4 : 1))
  else
    usage_error "--type=$(posixq "${opt[type]}") is not a TPU type: give v2-, v3-, v4- or v5p- with a multiple of 8 (TensorCores), or v5litepod- or v6e- with 1, 4, 8, 16, ... 256 (chips)."
  fi
  family=${BASH_REMATCH[1]}
}

check_numbers() {
  local key
  for key in num-slices retries stall lines; do
    [[ ${opt[$key]} =~ ^[0-9]{1,4}$ ]] || usage_error "--$key=$(posixq "${opt[$key]}") must be an integer from 0 to 9999."
  done
  ((${opt[num-slices]} >= 1)) || usage_error '--num-slices must be at least 1.'
  ((${opt[stall]} >= 1)) || usage_error '--stall must be at least 1.'
  for key in poll backoff; do
    [[ ${opt[$key]} =~ ^[0-9]{1,5}(\.[0-9]+)?$ ]] || usage_error "--$key=$(posixq "${opt[$key]}") must be a number of seconds."
  done
  for key in valid-until max-run-duration max-wait grace; do
    [[ -z ${opt[$key]:-} || ${opt[$key]} =~ ^[0-9]{1,7}[smhd]?$ ]] ||
      usage_error "--$key=$(posixq "${opt[$key]}") must be a number of seconds, or a number with s, m, h or d, such as 6h."
  done
  [[ -z ${opt[worker]:-} || ${opt[worker]} =~ ^(all|[0-9]{1,4}(\.[0-9]{1,4})?)$ ]] ||
    usage_error "--worker=$(posixq "${opt[worker]}") must be NUMBER, SLICE.NUMBER or all."
}

check_tier() {
  local key chosen=()
  for key in spot best-effort reserved flex-start; do [[ -z ${opt[$key]:-} ]] || chosen+=("--$key"); done
  ((${#chosen[@]} <= 1)) || usage_error "${chosen[*]} are mutually exclusive: choose one."
  [[ -z ${opt[flex-start]:-} || -n ${opt[max-run-duration]:-} ]] ||
    usage_error '--flex-start needs --max-run-duration, at most 7d: how long you need the TPU.'
  if [[ -n ${opt[no-queue]:-} ]]; then
    ((${opt[num-slices]} == 1)) || usage_error '--num-slices above 1 needs a queued resource: remove --no-queue.'
    for key in best-effort flex-start valid-until max-run-duration; do
      [[ -z ${opt[$key]:-} ]] || usage_error "--$key needs a queued resource: remove --no-queue."
    done
  fi
  [[ -z ${opt[internal-ip]:-} || -z ${opt[iap]:-} ]] || usage_error '--internal-ip --iap are mutually exclusive: choose one.'
}

# Values that are passed to gcloud unchanged, or as part of a KEY=VALUE,... list.
check_values() {
  local key
  for key in network subnet service-account version disk; do
    [[ -z ${opt[$key]:-} || ${opt[$key]} =~ ^[A-Za-z0-9][A-Za-z0-9@._:/-]*$ ]] ||
      usage_error "--$key=$(posixq "${opt[$key]}") may contain letters, digits and @._:/- only."
  done
  [[ -z ${opt[labels]:-} || ${opt[labels]} =~ ^[a-z][-_a-z0-9]*=[-_a-z0-9]*(,[a-z][-_a-z0-9]*=[-_a-z0-9]*)*$ ]] ||
    usage_error "--labels=$(posixq "${opt[labels]}") must be KEY=VALUE,... in lower-case letters, digits, _ and -."
  [[ -z ${opt[python]:-} || ${opt[python]} =~ ^/[A-Za-z0-9_./+-]+$ ]] ||
    usage_error "--python=$(posixq "${opt[python]}") must be the absolute path of a Python interpreter on the workers."
}

check_workdir() {
  local dir=${opt[workdir]:-}
  [[ -n $dir ]] || usage_error '--workdir=gs://BUCKET/FOLDER (or TPU_WORKDIR) is required: checkpoints are saved there, and the run resumes from them.'
  [[ ! $dir =~ [[:cntrl:]] ]] || usage_error '--workdir contains a control character.'
  [[ ! $dir =~ (^|/)\.\.(/|$) ]] || usage_error "--workdir=$(posixq "$dir") must not contain '..'."
  if [[ $dir == gs://* ]]; then
    [[ ! $dir =~ [][*?] ]] || usage_error "--workdir=$(posixq "$dir") must not contain * ? [ or ], which gcloud expands."
    [[ $dir =~ ^gs://[a-z0-9][-a-z0-9._]*/[^/] ]] || usage_error "--workdir=$(posixq "$dir") must be gs://BUCKET/FOLDER, not the bucket itself."
  else
    [[ $dir == /?* && $dir =~ ^/[^/]+/+[^/] ]] || usage_error "--workdir=$(posixq "$dir") must be gs://BUCKET/FOLDER, or an absolute path at least two levels deep."
  fi
}

# Warns about a workdir that may be deleted with the VM, or that only one worker can see.
warn_workdir() {
  [[ ${opt[workdir]} != gs://* ]] || return 0
  ((hosts * ${opt[num-slices]} == 1)) ||
    warn "--workdir=${opt[workdir]} must be on a file system that all workers share (Filestore, gcsfuse); gs:// is always shared."
  warn "if ${opt[workdir]} is on the TPU VM's own disk, a preemption or deletion also deletes the checkpoints; checkpoints in gs:// are kept."
}

check_env() {
  local pair key
  for pair in "${env_pairs[@]}"; do
    key=${pair%%=*}
    [[ $pair == *=* && $key =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || usage_error "--env=$(posixq "$pair") must be KEY=VALUE; KEY may contain letters, digits and _ only."
    ! is_secret_name "$key" ||
      usage_error "--env=$key=...: $key looks like a secret, and command-line arguments are visible to all users; put the secret into a file of KEY=VALUE lines, chmod 600 the file, and give --env-file=FILE."
  done
  [[ -n ${opt[env-file]:-} ]] || return 0
  opt[env-file]=$(local_path "${opt[env-file]}")
  [[ -f ${opt[env-file]} && -r ${opt[env-file]} ]] || usage_error "--env-file=$(posixq "${opt[env-file]}"): no such file, or not readable."
  local mode
  mode=$(stat -L -c %a "${opt[env-file]}" 2>/dev/null || stat -L -f %Lp "${opt[env-file]}")
  [[ $mode == ?00 ]] || usage_error "--env-file=$(posixq "${opt[env-file]}") can be read by others (mode $mode): chmod 600 the file."
  local line
  while IFS= read -r line || [[ -n $line ]]; do
    [[ -z $line || $line == \#* || $line =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] ||
      usage_error "--env-file=$(posixq "${opt[env-file]}"): a line is not KEY=VALUE (the line is not shown, because it may contain a secret)."
  done <"${opt[env-file]}"
}

# The arguments of `simclr-jax`: a command and its options, with a single --workdir.
check_args() {
  local arg
  ((${#args[@]})) || usage_error 'a simclr-jax command is required after --: tpu.sh up ... -- pretrain --config=simclr_imagenet --data=gs://...'
  [[ ${args[0]} =~ ^[a-z][a-z0-9-]*$ ]] || usage_error "$(posixq "${args[0]}") is not a simclr-jax command: the first argument after -- must be a command, such as pretrain."
  for arg in "${args[@]}"; do
    case $arg in
      --workdir=*)
        [[ -z ${opt[workdir]:-} || ${opt[workdir]} == "${arg#*=}" ]] ||
          usage_error "two workdirs: $(posixq "${opt[workdir]}") and $(posixq "${arg#*=}"); give only one."
        opt[workdir]=${arg#*=}
        ;;
      --workdir) usage_error '--workdir VALUE after --: write --workdir=VALUE, or move --workdir before the --.' ;;
      # Only the key is printed: the value may be the secret.
      --*=*) ! is_secret_name "$(tr '.-' '__' <<<"${arg%%=*}")" || usage_error "${arg%%=*}=...: ${arg%%=*} looks like a secret; put the secret into the --env-file." ;;
    esac
  done
}
