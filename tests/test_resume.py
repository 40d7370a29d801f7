"""Resuming: a run that is killed at any step continues bit for bit.

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
  """The command of a short training."""
  settings = {**SETTINGS, **changes}
  return [
    sys.executable, '-m', 'simclr_jax', 'pretrain', '--config=simclr_digits', f'--workdir={workdir}',
    *(f'--config.{k}={v}' for k, v in settings.items()),
  ]  # fmt: skip


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """The folder of all runs in this file."""
  return tmp_path_factory.mktemp('runs')


@pytest.fixture(scope='module')
def start():
  """A function that starts a command in a process."""
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  return functools.partial(
    subprocess.Popen, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )


@pytest.fixture(scope='module')
def finish(start):
  """A function that runs a command to its end: (exit code, output)."""

  def run(*args, **kwargs):
    process = start(command(*args, **kwargs))
    output = process.communicate(timeout=300)[0]
    return process.returncode, output

  return run


@pytest.fixture(scope='module')
def uninterrupted(folder, finish):
  """The workdir of an uninterrupted run."""
  workdir = folder / 'uninterrupted'
  code, output = finish(workdir)
  assert code == 0, output
  return workdir


def checksums(workdir, step=STEPS):
  """CRC-32 of every parameter, optimizer state and BatchNorm statistic in a checkpoint."""
  path = workdir / 'checkpoints' / str(step) / '_CHECKPOINT_METADATA'
  return json.loads(path.read_text())['custom_metadata']['crc32']


def interrupt(start, workdir, signal_number, at_step):
  """Starts a run, and sends a signal when the checkpoint of step 10 and the record of `at_step` are
  on disk.
  """
  process = start(command(workdir))
  deadline = time.monotonic() + 240
  while time.monotonic() < deadline and process.poll() is None:
    steps = [r['step'] for r in records(workdir)]
    if steps and max(steps) >= at_step and (workdir / 'checkpoints' / '10').is_dir():
      process.send_signal(signal_number)
      break
    time.sleep(0.005)
  output = process.communicate(timeout=120)[0]
  return process.returncode, output


def assert_same(workdir, uninterrupted):
  """Compares the metrics and the last checkpoint of two runs, bit for bit."""
  assert records(workdir) == records(uninterrupted)
  assert [r['step'] for r in records(workdir)] == list(range(1, STEPS + 1))
  assert all('batch_hash' in r for r in records(workdir))
  assert checksums(workdir) == checksums(uninterrupted)
  assert len(checksums(workdir)) > 60


def test_killed_and_restarted_equals_uninterrupted(folder, start, finish, uninterrupted):
  """Breaks if something that a step depends on is neither in the checkpoint nor a function of the
  step.
  """
  workdir = folder / 'killed'
  code, output = interrupt(start, workdir, signal.SIGKILL, 12)
  assert code == -signal.SIGKILL, output
  assert max(r['step'] for r in records(workdir)) < STEPS
  code, output = finish(workdir)
  assert code == 0 and 'from step 10 of 20' in output, output
  assert_same(workdir, uninterrupted)


@pytest.mark.parametrize(
  'signal_number, expected',
  [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_signals_save_and_resume(folder, start, finish, uninterrupted, signal_number, expected):
  """Breaks if SIGTERM or Ctrl-C loses steps, prints a traceback, or exits with 0."""
  workdir = folder / signal_number.name
  code, output = interrupt(start, workdir, signal_number, 12)
  assert code == expected, output
  assert 'Traceback' not in output and f'{signal_number.name}: saved step' in output
  saved_step = max(int(p.name) for p in (workdir / 'checkpoints').iterdir())
  assert 12 <= saved_step < STEPS
  code, output = finish(workdir)
  assert code == 0 and f'from step {saved_step} of 20' in output, output
  assert_same(workdir, uninterrupted)


def test_a_flipped_bit_is_detected_and_the_older_checkpoint_used(folder, finish, uninterrupted):
  """Breaks if a damaged checkpoint is used, prevents resuming, or is not reported."""
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


@pytest.mark.slow
def test_all_checkpoints_damaged_is_an_error(folder, finish):
  """Breaks if a run whose checkpoints are all damaged silently starts again at step 0."""
  workdir = folder / 'all_damaged'
  assert finish(workdir)[0] == 0
  for manifest in (workdir / 'checkpoints').rglob('manifest.ocdbt'):
    manifest.write_bytes(b'garbage')
  for _ in range(2):
    code, output = finish(workdir)
    assert code == 1 and 'no checkpoint in' in output and 'Traceback' not in output, output


@pytest.mark.slow
def test_empty_and_stray_files_are_ignored(folder, finish, uninterrupted):
  """Breaks if an empty step folder is taken for the newest checkpoint, or prevents saving."""
  workdir = folder / 'stray'
  (workdir / 'checkpoints' / '15').mkdir(parents=True)
  code, output = finish(workdir)
  assert code == 2 and 'it has no config.json' in output, output
  (workdir / 'checkpoints' / '15').rmdir()
  (workdir / 'checkpoints').rmdir()
  assert finish(workdir)[0] == 0
  (workdir / 'checkpoints' / 'notes').write_text('notes of the user')
  (workdir / 'checkpoints' / '99').mkdir()
  code, output = finish(workdir)
  assert code == 0 and 'complete' in output, output
  assert_same(workdir, uninterrupted)


@pytest.mark.slow
def test_a_changed_recipe_is_refused(finish, uninterrupted):
  """Breaks if a run is resumed with another recipe, or the error does not name the field and its
  values.
  """
  before = checksums(uninterrupted)
  code, output = finish(uninterrupted, temperature=0.3)
  assert code == 2 and 'temperature: 0.2 -> 0.3' in output and 'Traceback' not in output
  code, output = finish(uninterrupted, log_every_steps=7)  # does not change the training
  assert code == 0 and 'is complete' in output
  assert checksums(uninterrupted) == before


@pytest.mark.slow
def test_a_run_without_checkpoints_can_be_changed(folder, finish):
  """Breaks if the workdir of a run that failed before its first checkpoint refuses a corrected
  command.
  """
  workdir = folder / 'corrected'
  code, output = finish(workdir, optimizer='sgd', learning_rate=1e30, checkpoint_every_steps=20)
  assert code == 3 and 'there is no checkpoint yet' in output, output
  code, output = finish(workdir, steps=2)
  assert code == 0, output


@pytest.mark.slow
def test_nan_stops_before_the_next_checkpoint(folder, finish):
  """Breaks if a diverged state is saved, or the exit code is that of other errors."""
  workdir = folder / 'nan'
  code, output = finish(
    workdir, optimizer='sgd', learning_rate=1e30, warmup_epochs=0, checkpoint_every_steps=1
  )
  assert code == 3 and 'training stopped before the next checkpoint' in output, output
  assert 'Traceback' not in output
  saved_steps = [int(p.name) for p in (workdir / 'checkpoints').iterdir() if p.name.isdecimal()]
  nan_step = max(r['step'] for r in records(workdir))
  assert all(step < nan_step for step in saved_steps)


@pytest.mark.slow
def test_one_run_in_a_workdir(folder, start, finish):
  """Breaks if two processes can write to the same workdir."""
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
  """Breaks if a workdir that cannot be created fails only after compilation, or with a traceback."""
  file = pathlib.Path(folder / 'file')
  file.write_text('')
  code, output = finish(file / 'run')
  assert code == 2 and 'cannot be written' in output and 'Traceback' not in output
