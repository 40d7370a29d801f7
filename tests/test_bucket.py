"""A run whose workdir is in a bucket, against an emulator of Google Cloud Storage. `make test-faults`.

Orbax and TensorStore speak the real protocol over HTTP. So do the other files of the run, through gcsfs; where
TensorFlow is, epath would take its file system, which cannot be sent to an emulator.
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
  """The address of an emulator with the bucket `runs`."""
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  program = [sys.executable, '-m', 'gcp_storage_emulator', 'start', '--host=localhost']
  program += [f'--port={port}', '--in-memory', '--default-bucket=runs', '--quiet']
  address = f'http://localhost:{port}'
  with subprocess.Popen(program) as emulator:
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
  """Names of all objects in the bucket."""
  with urllib.request.urlopen(f'{address}/storage/v1/b/runs/o?maxResults=1000') as answer:
    return [item['name'] for item in json.load(answer).get('items', [])]


def records(address):
  url = f'{address}/download/storage/v1/b/runs/o/run%2Fmetrics.jsonl?alt=media'
  with urllib.request.urlopen(url) as answer:
    return [json.loads(line) for line in answer.read().decode().splitlines()]


def start(address, *words):
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
    [sys.executable, '-m', 'simclr_jax', *words],
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def pretrain(workdir):
  settings = {**TINY, 'steps': str(STEPS), 'checkpoint_every_steps': '1', 'log_every_steps': '1'}
  fields = [f'--config.{k}={v}' for k, v in settings.items()]
  return ['pretrain', '--config=simclr_digits', f'--workdir={workdir}', *fields]


def half_saved(address):
  """Steps that have been begun in the bucket, without the mark that they are whole."""
  names = objects(address)
  begun = {n.split('/')[2] for n in names if n.startswith('run/checkpoints/')}
  return [s for s in begun if f'run/checkpoints/{s}/commit_success.txt' not in names]


def test_killed_while_saving_in_a_bucket(bucket, tmp_path):
  """Breaks if half a checkpoint passes for a whole one, even the first; records are lost; or numbers are others."""
  for first in (True, False):
    job = start(bucket, *pretrain('gs://runs/run'))
    deadline = time.monotonic() + 240
    while not (half := half_saved(bucket)) or (half == ['1']) != first:
      assert time.monotonic() < deadline and job.poll() is None, job.communicate()[0][-3000:]
      time.sleep(0.05)
    job.send_signal(signal.SIGKILL)
    job.communicate()

  job = start(bucket, *pretrain('gs://runs/run'))
  output = job.communicate(timeout=240)[0]
  assert job.returncode == 0, output[-3000:]
  assert 'resuming gs://runs/run from step' in output
  assert not half_saved(bucket)
  found = records(bucket)
  events = [r['event'] for r in found if 'event' in r and r['event'] != 'killed']
  assert events == ['start'] * 3 + ['complete']

  local = start(bucket, *pretrain(tmp_path / 'run'))
  output = local.communicate(timeout=240)[0]
  assert local.returncode == 0, output[-3000:]
  expected = {r['step']: r['loss'] for r in common.records(tmp_path / 'run') if 'loss' in r}
  assert len(expected) == STEPS
  assert {r['step']: r['loss'] for r in found if 'loss' in r} == expected

  knn = start(bucket, 'knn', '--workdir=gs://runs/run')
  output = knn.communicate(timeout=240)[0]
  assert knn.returncode == 0 and 'pretrained' in output, output[-3000:]
  assert 'run/evaluation.json' in objects(bucket)
