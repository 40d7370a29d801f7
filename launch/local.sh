#!/usr/bin/env bash
# A test of some minutes on this machine before a run on a pod: local.sh [cpu | gpu] [ARGUMENTS of simclr-jax pretrain].
#
#   cpu  the same program on 8 simulated devices (default)
#   gpu  on one GPU; an error if JAX does not find exactly one
# Pretrains on the bundled digits in a temporary folder, stops half-way and resumes.
set -Eeuo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
[[ -n ${PYTHON:-} || ! -x $root/.venv/bin/python ]] || python=$root/.venv/bin/python

die() {
  printf 'local.sh: %s\n' "$1" >&2
  exit "${2:-1}"
}

devices() { "$python" -c 'import jax; print(jax.default_backend(), jax.local_device_count())' 2>/dev/null; }

# exec, so that a signal to the background job reaches the program itself.
pretrain() {
  exec "$python" -m simclr_jax pretrain --config=simclr_digits "--workdir=$workdir/run" --config.steps=30 --config.batch_size=64 \
    --config.checkpoint_every_steps=10 --config.log_every_steps=1 --config.warmup_epochs=0 --config.knn_every_epochs=0 "$@"
}

kind=${1:-cpu}
shift || true
[[ $kind == cpu || $kind == gpu ]] || die "unknown device $kind: use cpu or gpu." 2
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
"$python" -c 'import jax' 2>/dev/null || die "JAX is not installed for $python: run make .venv/.installed, or set PYTHON."
case $kind in
  cpu)
    export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=8"
    [[ $(devices) == 'cpu 8' ]] || die 'JAX does not report 8 simulated devices on this CPU.'
    ;;
  gpu)
    export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
    [[ $(devices) == 'gpu 1' ]] || die "JAX must find exactly one GPU, but found: $(devices || echo nothing). Check nvidia-smi, and pip install 'jax[cuda12]'."
    ;;
esac

workdir=$(mktemp -d)
trap 'rm -rf "$workdir"' EXIT
(pretrain "$@") >"$workdir/log" 2>&1 &
program=$!
until [[ -s $workdir/run/metrics.jsonl ]] || ! kill -0 "$program" 2>/dev/null; do sleep 0.2; done
kill -TERM "$program" 2>/dev/null || true
code=0
wait "$program" || code=$?
cat "$workdir/log"
case $code in
  0 | 75) ;;
  *) die "the first part failed with exit code $code." "$code" ;;
esac
echo "--- stopped by SIGTERM with exit code $code; rerunning the same command"
(pretrain "$@") || die 'the run did not resume.' $?
echo "local.sh: success on $kind: $(devices)"
