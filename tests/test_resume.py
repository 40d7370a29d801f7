"""Stopping costs nothing: a run that is killed anywhere goes on bit for bit.

Each run is the real command in a process of its own.
"""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from common import records
from conftest import TINY

STEPS = 20
SETTINGS = {
  **TINY,
  'checkpoint_every_steps': '10',
  'keep_checkpoints': '3',
  'augment.view1': 'simclr_crop(0.2, 1) | simclr_jitter(1, p=0.8) | grayscale(p=0.5) | simclr_blur(p=0.5)',
}


def command(workdir, **changes):
  settings = {**SETTINGS, **changes}
  return [
    sys.executable, '-m', 'simclr_jax', 'pretrain', '--config=simclr_digits', f'--workdir={workdir}',
    *(f'--config.{k}={v}' for k, v in settings.items()),
  ]  # fmt: skip


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Runs of this module."""
  return tmp_path_factory.mktemp('runs')


@pytest.fixture(scope='module')
def start():
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  return functools.partial(
    subprocess.Popen, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )


@pytest.fixture(scope='module')
def finish(start):
  """Runs a command to its end: (exit code, output)."""

  def run(*args, **kwargs):
    process = start(command(*args, **kwargs))
    output = process.communicate(timeout=300)[0]
    return process.returncode, output

  return run


@pytest.fixture(scope='module')
def uninterrupted(folder, finish):
  workdir = folder / 'uninterrupted'
  code, output = finish(workdir)
  assert code == 0, output
  return workdir


def leaves(workdir, step=STEPS):
  """CRC-32 of every parameter, optimizer slot and BatchNorm statistic in a checkpoint."""
  path = workdir / 'checkpoints' / str(step) / '_CHECKPOINT_METADATA'
  return json.loads(path.read_text())['custom_metadata']['crc32']


def interrupt(start, workdir, number, at_step):
  """Starts a run and sends a signal once `at_step` and the checkpoint before it are on disk."""
  process = start(command(workdir))
  deadline = time.monotonic() + 240
  while time.monotonic() < deadline and process.poll() is None:
    steps = [r['step'] for r in records(workdir)]
    if steps and max(steps) >= at_step and (workdir / 'checkpoints' / '10').is_dir():
      process.send_signal(number)
      break
    time.sleep(0.005)
  output = process.communicate(timeout=120)[0]
  return process.returncode, output


def assert_same(workdir, uninterrupted):
  assert records(workdir) == records(uninterrupted)
  assert [r['step'] for r in records(workdir)] == list(range(1, STEPS + 1))
  assert all('batch_hash' in r for r in records(workdir))
  assert leaves(workdir) == leaves(uninterrupted)
  assert len(leaves(workdir)) > 60


def test_killed_and_restarted_equals_uninterrupted(folder, start, finish, uninterrupted):
  """Breaks if anything that a step depends on is not in the checkpoint or not a function of the step."""
  workdir = folder / 'killed'
  code, output = interrupt(start, workdir, signal.SIGKILL, 12)
  assert code == -signal.SIGKILL, output
  assert max(r['step'] for r in records(workdir)) < STEPS
  code, output = finish(workdir)
  assert code == 0 and 'from step 10 of 20' in output, output
  assert_same(workdir, uninterrupted)


@pytest.mark.parametrize('number, expected', [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_save_and_resume(folder, start, finish, uninterrupted, number, expected):
  """Breaks if SIGTERM or Ctrl-C loses steps, prints a traceback, or exits as if done."""
  workdir = folder / number.name
  code, output = interrupt(start, workdir, number, 12)
  assert code == expected, output
  assert 'Traceback' not in output and f'{number.name}: saved step' in output
  saved = max(int(p.name) for p in (workdir / 'checkpoints').iterdir())
  assert 12 <= saved < STEPS
  code, output = finish(workdir)
  assert code == 0 and f'from step {saved} of 20' in output, output
  assert_same(workdir, uninterrupted)


def test_a_flipped_bit_is_found_and_the_older_checkpoint_used(folder, finish, uninterrupted):
  """Breaks if damaged weights are trained on, or block the run, or go unmentioned."""
  workdir = folder / 'flipped'
  code, output = finish(workdir)
  assert code == 0, output
  newest = workdir / 'checkpoints' / str(STEPS)
  data = max((p for p in newest.rglob('d/*') if p.is_file()), key=lambda p: p.stat().st_size)
  content = bytearray(data.read_bytes())
  content[len(content) // 2] ^= 1
  data.write_bytes(content)
  code, output = finish(workdir)
  assert code == 0, output
  assert 'checksum' in output or 'unreadable' in output
  assert 'corrupt-20' in output and 'from step 10 of 20' in output
  assert (workdir / 'checkpoints' / 'corrupt-20').is_dir()
  assert_same(workdir, uninterrupted)


def test_all_checkpoints_damaged_is_an_error(folder, finish):
  """Breaks if a run silently begins again at step 0 although it had checkpoints."""
  workdir = folder / 'all_damaged'
  assert finish(workdir)[0] == 0
  for manifest in (workdir / 'checkpoints').rglob('manifest.ocdbt'):
    manifest.write_bytes(b'garbage')
  for _ in range(2):
    code, output = finish(workdir)
    assert code == 1 and 'no checkpoint in' in output and 'Traceback' not in output, output


def test_empty_and_stray_files_are_survived(folder, finish, uninterrupted):
  """Breaks if an empty step folder passes as the newest checkpoint or stops later saves."""
  workdir = folder / 'stray'
  (workdir / 'checkpoints' / '15').mkdir(parents=True)
  (workdir / 'checkpoints' / 'notes').write_text('mine')
  code, output = finish(workdir)
  assert code == 2 and 'config.json is missing' in output, output
  (workdir / 'checkpoints' / '15').rmdir()
  assert finish(workdir)[0] == 0
  (workdir / 'checkpoints' / '99').mkdir()
  code, output = finish(workdir)
  assert code == 0 and 'complete' in output, output
  assert_same(workdir, uninterrupted)


def test_a_changed_recipe_is_refused(finish, uninterrupted):
  """Breaks if an old run goes on under another recipe, or the message omits field or values."""
  before = leaves(uninterrupted)
  code, output = finish(uninterrupted, temperature=0.3)
  assert code == 2 and 'temperature: 0.2 -> 0.3' in output and 'Traceback' not in output
  code, output = finish(uninterrupted, log_every_steps=7)  # of no consequence
  assert code == 0 and 'is complete' in output
  assert leaves(uninterrupted) == before


def test_a_run_that_never_saved_can_be_corrected(folder, finish):
  """Breaks if a first attempt that failed keeps its workdir from the corrected command."""
  workdir = folder / 'corrected'
  code, output = finish(workdir, optimizer='sgd', learning_rate=1e30, checkpoint_every_steps=20)
  assert code == 3 and 'there is no checkpoint yet' in output, output
  code, output = finish(workdir, steps=2)
  assert code == 0, output


def test_nan_stops_before_the_next_checkpoint(folder, finish):
  """Breaks if a diverged state overwrites a good checkpoint, or the exit code is a common one."""
  workdir = folder / 'nan'
  code, output = finish(
    workdir, optimizer='sgd', learning_rate=1e30, warmup_epochs=0, checkpoint_every_steps=1
  )
  assert code == 3 and 'training stopped before the next checkpoint' in output, output
  assert 'Traceback' not in output
  kept = [int(p.name) for p in (workdir / 'checkpoints').iterdir() if p.name.isdecimal()]
  bad = max(r['step'] for r in records(workdir))
  assert all(step < bad for step in kept)


def test_one_run_in_a_workdir(folder, start, finish):
  """Breaks if two processes write one workdir."""
  workdir = folder / 'shared'
  first = start(command(workdir))
  try:
    deadline = time.monotonic() + 120
    while not (workdir / 'config.json').exists() and time.monotonic() < deadline:
      time.sleep(0.05)
    code, output = finish(workdir)
    assert code == 2 and 'another run is using' in output
  finally:
    first.kill()
    first.communicate()


def test_unwritable_workdir(folder, finish):
  """Breaks if a workdir below a file fails late or with a traceback."""
  file = pathlib.Path(folder / 'file')
  file.write_text('')
  code, output = finish(file / 'run')
  assert code == 2 and 'cannot be written' in output and 'Traceback' not in output
