"""Commands that are killed again and again (`kills`), and commands that use one run at the same time. `make test-faults`."""

import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
import time

import kills
import numpy as np
import pytest
from common import records

from simclr_jax import runs
from simclr_jax.errors import ConfigError
from simclr_jax.evaluate import embed
from simclr_jax.runtime import checkpoint

KILLS = int(os.environ.get('SIMCLR_JAX_KILLS', '60'))  # in `make test-faults`
# Of 60; the others take several times as long.
SHARES = {'simclrv2': 8, 'finetune': 9, 'transfer': 9, 'pretrain': 18, 'embed': 16}
ENVIRONMENT = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1'}
SECONDS = 900  # limit of a command


# Killed commands.


@pytest.fixture(scope='module')
def kill_loops(tmp_path_factory):
  """The loops of all commands, two at a time: command -> future of the finished process."""
  folder = tmp_path_factory.mktemp('kills')
  environment = {**ENVIRONMENT, 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}

  def loop(command):
    count = -(-SHARES[command] * KILLS // sum(SHARES.values()))
    argv = [sys.executable, kills.__file__, command, str(folder / command), f'--kills={count}']
    return subprocess.run(argv, env=environment, text=True, capture_output=True)

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    yield {command: pool.submit(loop, command) for command in SHARES}


@pytest.mark.parametrize('command', SHARES)
@pytest.mark.faults
def test_killed_at_random_moments(command, kill_loops):
  """Breaks if a command that was killed and rerun does not complete, or leaves anything else than an undisturbed one:
  parameters, metrics, results, features, files.
  """
  loop = kill_loops[command].result()
  print(loop.stdout.splitlines()[-1:])
  assert loop.returncode == 0, loop.stdout[-10_000:] + loop.stderr[-3000:]


# Commands at the same time.


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
  """A folder with the data and a run; the commands of `kills` fit it."""
  folder = tmp_path_factory.mktemp('pretrained')
  kills.write_data(folder / 'data')
  succeed(folder, kills.pretrain(folder / 'data'))
  return folder


@pytest.fixture
def folder(pretrained, tmp_path):
  """A copy of the run in a folder of its own."""
  shutil.copytree(pretrained / 'run', tmp_path / 'run')
  return tmp_path


def start(folder, arguments) -> subprocess.Popen:
  """Starts a command in a folder."""
  return subprocess.Popen(
    [sys.executable, '-m', 'simclr_jax', *arguments], env=ENVIRONMENT, cwd=folder, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip


def outcome(process) -> tuple[int, str]:
  """The exit code of a command and its error: one sentence, or ''. Warnings are no errors."""
  output, stderr = process.communicate(timeout=SECONDS)
  assert 'Traceback' not in output + stderr, stderr
  errors = [line for line in stderr.splitlines() if line.startswith('simclr-jax: error')]
  assert len(errors) == (process.returncode in (1, 2)), stderr
  return process.returncode, ''.join(errors)


def succeed(folder, *commands):
  """Runs commands at the same time, all of which must succeed."""
  outcomes = [outcome(process) for process in [start(folder, c) for c in commands]]
  assert outcomes == [(0, '')] * len(commands)


@pytest.mark.faults
def test_evaluations_at_the_same_time(folder):
  """Breaks if commands that use one run at the same time lose a result, or fail."""
  evaluations = [
    ['knn', '--workdir=run', '--k=5'], ['knn', '--workdir=run', '--k=5'], ['knn', '--workdir=run', '--features=z'],
    ['probe', '--workdir=run', '--protocol=logistic', '--labels=2'],
  ]  # fmt: skip
  others = [['report', '--workdir=run'], ['embed', '--workdir=run', '--out=features.npy']]
  succeed(folder, *evaluations, *others)
  found = json.loads((folder / 'run' / 'evaluation.json').read_text())
  assert len(found) == 3 and {'knn', 'knn z'} < found.keys(), found.keys()
  assert (folder / 'run' / 'report.html').read_text().rstrip().endswith('</html>')
  assert np.load(folder / 'features.npy').shape == (64, 32)
  succeed(folder, [*evaluations[0], '--out=alone.json'])
  assert json.loads((folder / 'alone.json').read_text())['knn'] == found['knn']


@pytest.mark.faults
def test_evaluation_during_the_training(folder, pretrained):
  """Breaks if an evaluation fails because the run deletes the checkpoint that it reads, or disturbs the run."""
  changes = {
    'steps': 9999,
    'checkpoint_every_steps': 1,
    'keep_checkpoints': 1,
    'knn_every_epochs': 0,
  }
  arguments = [*kills.pretrain(pretrained / 'data'), *kills.fields(**changes)]
  training = start(folder, [a.replace('=run', '=long') for a in arguments])
  try:
    while not checkpoint.steps(folder / 'long' / 'checkpoints'):
      assert training.poll() is None, outcome(training)
      time.sleep(0.1)
    for _ in range(2):
      succeed(
        folder, ['knn', '--workdir=long', '--k=5'], ['embed', '--workdir=long', '--out=f.npy']
      )
  finally:
    training.terminate()
  assert outcome(training) == (75, '')
  steps = [r['step'] for r in records(folder / 'long')]
  assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize('out', ['features.npz', 'features.csv'])
@pytest.mark.faults
def test_two_embed_to_the_same_file(out, folder):
  """Breaks if two commands that write one file fail with a traceback, or leave parts or a wrong file."""
  commands = [['embed', '--workdir=run', f'--out={name}'] for name in (out, out, f'alone-{out}')]
  *both, alone = [outcome(process) for process in [start(folder, c) for c in commands]]
  assert alone == (0, '') and (0, '') in both, both
  assert (folder / out).read_bytes() == (folder / f'alone-{out}').read_bytes()
  assert sorted(p.name for p in folder.iterdir()) == sorted(['run', out, f'alone-{out}'])


def test_commands_refuse_a_file_that_another_one_writes(tmp_path):
  """Breaks if two `embed` compute and delete the same parts, or a killed one leaves a folder that seems foreign."""
  parts, inputs = embed._Parts(tmp_path / 'f.npy', 3), {'program': 'simclr-jax embed'}
  folder = tmp_path / 'f.npy.parts'
  with parts.prepared(inputs):
    embed.check(tmp_path / 'f.npy')
    with (
      pytest.raises(ConfigError, match='another process is writing .*f.npy: '),
      parts.prepared(inputs),
    ):
      pass
    (folder / embed.ABOUT).unlink()
  (folder / '.simclr-jax-01234567.json').touch()  # killed while it wrote about.json
  embed.check(tmp_path / 'f.npy')
  with parts.prepared(inputs):
    parts.delete()
  assert not list(tmp_path.iterdir())


@pytest.mark.faults
def test_two_finetune_in_the_same_folder(folder, pretrained):
  """Breaks if two commands that train the same runs disturb each other."""
  arguments = kills.finetune(pretrained / 'data')
  first, second = (outcome(process) for process in [start(folder, arguments) for _ in range(2)])
  for code, error in (first, second):
    assert code == 0 or (code == 2 and 'another run is using --workdir=' in error)
  assert 0 in (first[0], second[0])
  succeed(folder, arguments)
  result = json.loads((folder / 'run' / 'evaluation.json').read_text())['finetune']
  assert len(result['columns']) == 2


@pytest.mark.faults
def test_two_export_to_the_same_folder(folder):
  """Breaks if two exports to one folder mix, or one of them fails with more than a sentence."""
  arguments = ['export', '--workdir=run', '--out=exported']
  outcomes = sorted(outcome(process) for process in [start(folder, arguments) for _ in range(2)])
  assert outcomes[0] == (0, '') and 'exported' in outcomes[1][1], outcomes
  assert sorted(p.name for p in folder.iterdir()) == ['exported', 'run']
  runs.load_encoder(folder / 'exported')


SAVE = """
import pathlib, sys
from simclr_jax.evaluate import results
for i in range(100):
  result = {'title': 'x', 'columns': ['top-1 %'], 'rows': {'pretrained': [[float(i), None]]}}
  results.save(pathlib.Path(sys.argv[1]), f'{sys.argv[2]}-{i}', result, {'step': 1, 'data': {}})
"""


@pytest.mark.faults
def test_two_hundred_results(tmp_path):
  """Breaks if one of two processes that save results all the time loses one of the other's."""
  processes = [
    subprocess.Popen([sys.executable, '-c', SAVE, tmp_path, str(i)], stdout=subprocess.DEVNULL)
    for i in range(2)
  ]
  assert [p.wait(SECONDS) for p in processes] == [0, 0]
  saved = json.loads((tmp_path / 'evaluation.json').read_text())
  assert len(saved) == 200
  assert {p.name for p in tmp_path.iterdir()} == {'evaluation.json', '.evaluation.lock'}
