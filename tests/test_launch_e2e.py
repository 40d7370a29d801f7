"""launch/tpu.sh end to end, on a fake Google Cloud whose two workers are processes of this machine.

The workers really train, as one run of two processes: the request is granted, the TPU is preempted during the run and recreated, and
the run resumes from its checkpoint and finishes. Takes minutes: `make test-faults`.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from test_launch import Cloud

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 60
ARGS = [
  'pretrain', '--config=simclr_digits', f'--config.steps={STEPS}', '--config.batch_size=32', '--config.image_size=16',
  '--config.warmup_epochs=0', '--config.checkpoint_every_steps=10', '--config.log_every_steps=1', '--config.knn_every_epochs=0',
]  # fmt: skip

pytestmark = pytest.mark.faults


@pytest.fixture
def cloud(tmp_path):
  """A fake Google Cloud for a checkout of the whole project; two processes of this machine are the pod."""
  checkout = tmp_path / 'checkout'
  checkout.mkdir()
  for name in ('launch', 'simclr_jax', 'configs'):
    shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns('__pycache__'))
  git = ['git', '-C', str(checkout), '-c', 'user.name=a', '-c', 'user.email=a@b.c']
  for command in (['init', '-q'], ['add', '.'], ['commit', '-qm', 'all']):
    subprocess.run([*git, *command], check=True)
  made = Cloud(tmp_path, checkout)
  made.env['TF_CPP_MIN_LOG_LEVEL'] = '3'
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  pod = {
    'JAX_PLATFORMS': 'cpu',
    'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
    'JAX_NUM_PROCESSES': '2',
  }
  made.write('env.json', {f'0.{w}': {**pod, 'JAX_PROCESS_ID': str(w)} for w in range(2)})
  return made


def metrics(workdir):
  """Loss by step; for recomputed steps, the last value."""
  path = workdir / 'metrics.jsonl'
  rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
  return {row['step']: row['loss'] for row in rows if 'loss' in row and 'step' in row}


def test_preempted_pod_finishes(cloud, tmp_path):
  """The launcher restarts a run after a preemption, and the losses are equal to those of an uninterrupted run."""
  workdir = tmp_path / 'shared' / 'run'
  workdir.parent.mkdir()
  argv = [
    'up',
    '--name=pod',
    '--zone=us-central2-b',
    '--project=my-project',
    '--type=v4-16',
    '--spot',
    '--yes',
  ]
  argv += [
    '--poll=1',
    '--backoff=1',
    f'--python={sys.executable}',
    f'--workdir={workdir}',
    '--',
    *ARGS,
  ]
  launcher = cloud.start(argv)
  resource = cloud.world / 'resources' / 'pod.json'
  hosts = cloud.world / 'HOST' / 'pod'
  try:
    wait_for(lambda: max(metrics(workdir), default=0) >= 12, launcher)
    # As on Google Cloud: a notice, then SIGTERM to all processes, then the machine is deleted.
    resource.write_text(
      json.dumps(
        {**json.loads(resource.read_text()), 'timeline': ['SUSPENDING'] * 15 + ['SUSPENDED']}
      )
    )
    for process in hosts.glob('*/simclr_jax_runs/pod/process'):
      os.kill(int(process.read_text().split()[0]), signal.SIGTERM)
    out, err = launcher.communicate(timeout=400)
  finally:
    launcher.kill()
    for process in hosts.glob('*/simclr_jax_runs/pod/process'):
      with contextlib.suppress(ProcessLookupError):
        os.kill(int(process.read_text().split()[0]), signal.SIGKILL)
  print(err)
  assert launcher.returncode == 0, err
  assert (
    'preempted: pod is SUSPEND' in err
    and 'retry 1 of 10, from checkpoint' in err
    and f'checkpoint {STEPS}' in err
  )
  assert [command for command in cloud.commands() if command in ('create', 'delete')] == [
    'create',
    'delete',
    'create',
  ]
  logs = [path.read_text() for path in hosts.glob('*/simclr_jax_runs/pod/log')]
  assert len(logs) == 2

  uninterrupted = tmp_path / 'uninterrupted'
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(cloud.checkout)}
  env['XLA_FLAGS'] = '--xla_force_host_platform_device_count=2'
  subprocess.run(
    [sys.executable, '-m', 'simclr_jax', *ARGS, f'--workdir={uninterrupted}'],
    env=env,
    check=True,
    stdout=subprocess.DEVNULL,
  )
  actual, expected = metrics(workdir), metrics(uninterrupted)
  assert sorted(actual) == sorted(expected) and max(actual) == STEPS
  np.testing.assert_allclose(
    [actual[s] for s in sorted(actual)], [expected[s] for s in sorted(actual)], rtol=1e-4
  )


def wait_for(condition, process, seconds=300):
  deadline = time.monotonic() + seconds
  while not condition():
    assert process.poll() is None, process.communicate()[1]
    assert time.monotonic() < deadline
    time.sleep(0.2)
