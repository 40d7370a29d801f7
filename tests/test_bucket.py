"""A run with its workdir in a bucket, on an emulator of Google Cloud Storage. `make test-faults`.

Orbax and TensorStore use the real protocol over HTTP. So does epath, for the other files of the run, through gcsfs:
the test disables its TensorFlow backend, which cannot connect to an emulator.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import common
import pytest
from conftest import TINY

pytest.importorskip('gcp_storage_emulator', reason="pip install '.[dev]'")
pytest.importorskip('gcsfs', reason="pip install '.[dev]'")
pytestmark = pytest.mark.faults

STEPS = 6


@pytest.fixture(scope='module')
def bucket():
  """The address of an emulator that has the bucket `runs`."""
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  command = [sys.executable, '-m', 'gcp_storage_emulator', 'start', '--host=localhost']
  command += [f'--port={port}', '--in-memory', '--default-bucket=runs', '--quiet']
  address = f'http://localhost:{port}'
  with subprocess.Popen(command) as emulator:
    try:
      for _ in range(100):
        try:
          urllib.request.urlopen(f'{address}/storage/v1/b/runs')
          break
        except OSError:
          time.sleep(0.2)
      yield address
    finally:
      emulator.terminate()


def objects(address):
  """The names of all objects in the bucket."""
  with urllib.request.urlopen(f'{address}/storage/v1/b/runs/o?maxResults=1000') as response:
    return [item['name'] for item in json.load(response).get('items', [])]


def records(address):
  """The records in metrics.jsonl of the run in the bucket."""
  url = f'{address}/download/storage/v1/b/runs/o/run%2Fmetrics.jsonl?alt=media'
  with urllib.request.urlopen(url) as response:
    return [json.loads(line) for line in response.read().decode().splitlines()]


def start(address, *arguments):
  """Starts the command with these arguments; returns the process."""
  env = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'STORAGE_EMULATOR_HOST': address,
    'TENSORSTORE_GCS_HTTP_URL': address,
    'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'x',
    'GCE_METADATA_ROOT': 'localhost:1',
    'EPATH_USE_TF': '0',
  }
  return subprocess.Popen(
    [sys.executable, '-m', 'simclr_jax', *arguments],
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def pretrain(workdir):
  """The arguments of a short training."""
  settings = {**TINY, 'steps': str(STEPS), 'checkpoint_every_steps': '1', 'log_every_steps': '1'}
  fields = [f'--config.{k}={v}' for k, v in settings.items()]
  return ['pretrain', '--config=simclr_digits', f'--workdir={workdir}', *fields]


def incomplete_checkpoints(address):
  """The steps whose checkpoints in the bucket have no commit marker yet."""
  names = objects(address)
  steps = {n.split('/')[2] for n in names if n.startswith('run/checkpoints/')}
  return [s for s in steps if f'run/checkpoints/{s}/commit_success.txt' not in names]


def test_killed_while_saving_in_a_bucket(bucket, tmp_path):
  """Breaks if an incomplete checkpoint is restored, even the first one; if records are lost; or if
  losses differ from a local run.
  """
  for first in (True, False):
    job = start(bucket, *pretrain('gs://runs/run'))
    deadline = time.monotonic() + 240
    while not (incomplete := incomplete_checkpoints(bucket)) or (incomplete == ['1']) != first:
      assert time.monotonic() < deadline and job.poll() is None, job.communicate()[0][-3000:]
      time.sleep(0.05)
    job.send_signal(signal.SIGKILL)
    job.communicate()

  job = start(bucket, *pretrain('gs://runs/run'))
  output = job.communicate(timeout=240)[0]
  assert job.returncode == 0, output[-3000:]
  assert 'resuming gs://runs/run from step' in output
  assert not incomplete_checkpoints(bucket)
  run_records = records(bucket)
  events = [r['event'] for r in run_records if 'event' in r and r['event'] != 'killed']
  assert events == ['start'] * 3 + ['complete']

  local = start(bucket, *pretrain(tmp_path / 'run'))
  output = local.communicate(timeout=240)[0]
  assert local.returncode == 0, output[-3000:]
  expected = {r['step']: r['loss'] for r in common.records(tmp_path / 'run') if 'loss' in r}
  assert len(expected) == STEPS
  assert {r['step']: r['loss'] for r in run_records if 'loss' in r} == expected

  knn = start(bucket, 'knn', '--workdir=gs://runs/run')
  output = knn.communicate(timeout=240)[0]
  assert knn.returncode == 0 and 'pretrained' in output, output[-3000:]
  assert 'run/evaluation.json' in objects(bucket)
