"""simclr-jax doctor: what a bug report needs, whatever is broken, and nothing private."""

import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest
from PIL import Image

from simclr_jax import __version__, cli
from simclr_jax.commands import doctor

FOUND = [['cpu:0', 'cpu', {}], ['gpu:0', 'A100', {'bytes_in_use': 2**20, 'bytes_limit': 2**34}]]


@pytest.fixture
def devices(monkeypatch):
  """Devices that are found at once."""
  monkeypatch.setattr(doctor, 'DEVICES', f'print({json.dumps(json.dumps(FOUND))})')


def output(capsys, *argv, code=0):
  """What the command prints."""
  assert cli.main(['doctor', *argv]) == code
  return capsys.readouterr().out


def in_new_process(*argv, **variables):
  """Exit code and stdout of the real program; it must write no traceback."""
  result = subprocess.run(
    [sys.executable, '-m', 'simclr_jax', 'doctor', *argv],
    capture_output=True,
    text=True,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', **variables},
  )
  assert 'Traceback' not in result.stderr + result.stdout, result.stderr
  return result.returncode, result.stdout


def test_text_and_json_agree(capsys, devices):
  """Breaks if the text lacks something that is in the JSON object, or is not aligned."""
  report = json.loads(output(capsys, '--json'))
  text = output(capsys)
  assert report['versions']['simclr_jax'] == __version__
  assert report['versions']['jax'] == jax.__version__
  assert report['devices']['gpu:0'] == 'A100, 1.0 MiB of 16.0 GiB in use'
  assert {'python', 'jaxlib', 'flax', 'optax', 'numpy', 'tensorflow', 'extras'} <= {*report['versions']}  # fmt: skip
  names = [name for section in ('machine', 'devices', 'folders') for name in report[section]]
  assert all(re.search(rf'^  {re.escape(name)}  ', text, re.MULTILINE) for name in names)
  assert len({re.match(r'  \S.*?  +', line).end() for line in text.split('\n') if line.startswith('  ')}) == 1  # fmt: skip


def test_nothing_private_is_printed(capsys, devices, monkeypatch):
  """Breaks if a bug report has a secret, the name of the user or the home folder."""
  monkeypatch.setenv('HOME', '/home/ann')
  monkeypatch.setenv('LOGNAME', 'ann')
  monkeypatch.setenv('JAX_SERVICE_TOKEN', 'hunter2')
  monkeypatch.setenv('TFDS_DATA_DIR', 'https://me:hunter2@example.org/sets')
  monkeypatch.setenv('XLA_FLAGS', '--a=/home/ann/x --b=/scratch/ann/x --c=/home/annette\x1b[2J')
  monkeypatch.setenv('UNRELATED', 'hunter3')
  doctor._private.cache_clear()
  text = output(capsys)
  doctor._private.cache_clear()
  assert '--a=~/x --b=/scratch/USER/x --c=/home/annette\\x1b[2J' in text
  assert doctor._anonymous('no https://me:hunter2@host/x') == 'no https://(hidden)@host/x'
  assert 'JAX_SERVICE_TOKEN' in text and '(hidden)' in text
  assert 'hunter' not in text and not re.search(r'\bann\b', text)


@pytest.mark.parametrize(
  'script, line',
  [
    ('echo "NVIDIA A100, 580.65, 7 MiB, 81920 MiB"', 'NVIDIA A100, driver 580.65, 7 MiB of 81920 MiB in use'),
    ('echo "no driver"; exit 9', 'no driver'),
  ],
)  # fmt: skip
def test_the_driver_of_gpus(script, line, capsys, devices, tmp_path, monkeypatch):
  """Breaks if the driver of NVIDIA is not named, or one that does not run is not reported."""
  (tmp_path / 'nvidia-smi').write_text(f'#!/bin/sh\n{script}\n')
  (tmp_path / 'nvidia-smi').chmod(0o755)
  monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
  assert re.search(rf'^  nvidia-smi.*  {line}$', output(capsys), re.MULTILINE)


def test_extras_are_those_of_the_package():
  """Breaks if an extra is added to setup.py, but not here."""
  extras = importlib.metadata.metadata('simclr_jax').get_all('Provides-Extra')
  assert set(doctor.EXTRAS) == set(extras)


@pytest.mark.parametrize(
  'variables, reason',
  [
    ({'JAX_PLATFORMS': 'nonsense'}, "Backend 'nonsense' is not in the list"),
    ({'XLA_FLAGS': '--nonsense'}, '--nonsense'),  # ends the process that reads it
    ({'JAX_ENABLE_X64': 'maybe'}, "invalid truth value 'maybe'"),
  ],
)
def test_devices_that_do_not_start(variables, reason):
  """Breaks if JAX cannot start, and the report ends there, or does not say why in one line."""
  code, text = in_new_process(**variables)
  assert code == 1 and 'temporary folder' in text
  assert reason in re.search(r'^  error +(.+)$', text, re.MULTILINE)[1]


def test_jax_that_is_not_installed(tmp_path):
  """Breaks if a package that cannot be imported gives a traceback."""
  (tmp_path / 'jax.py').write_text("raise ImportError('there is no jax')")
  code, text = in_new_process(f'--data={tmp_path}', PYTHONPATH=str(tmp_path))
  assert code == 1 and text.count('there is no jax') == 3  # devices, compiled programs, data


def test_a_hanging_start_ends(capsys, monkeypatch):
  """Breaks if the command waits for ever for the other machines of a TPU."""
  monkeypatch.setattr(doctor, 'DEVICES', 'import time\ntime.sleep(60)')
  monkeypatch.setattr(doctor, 'SECONDS', 0.2)
  assert 'JAX did not start its devices in 0.2 s' in output(capsys, code=1)


def test_a_home_that_cannot_be_written_and_no_network(tmp_path):
  """Breaks if the command needs its home folder, or the network."""
  (tmp_path / 'file').touch()
  proxy = dict.fromkeys(('http_proxy', 'https_proxy'), 'http://127.0.0.1:9')
  home = {'HOME': str(tmp_path / 'file/home'), 'JAX_COMPILATION_CACHE_DIR': ''}
  code, text = in_new_process(**proxy, **home)
  assert code == 0 and 'not usable' in text and '~/tensorflow_datasets does not exist' in text


def test_data(capsys, devices, tmp_path):
  """Breaks if images are miscounted, or a missing or empty folder passes as readable."""
  Image.new('RGB', (4, 4)).save(tmp_path / 'a.PNG')
  for name in ('b.png', 'c.jpg', 'notes.txt'):
    (tmp_path / name).write_text('not decoded')
  found = json.loads(output(capsys, '--json', f'--data={tmp_path}'))['data']
  assert found == {'images': '.png 2, .jpg 1', 'other files': '1'}
  (tmp_path / 'empty').mkdir()
  assert 'none' in output(capsys, f'--data={tmp_path / "empty"}', code=1)
  assert 'No such file' in output(capsys, f'--data={tmp_path / "nowhere"}', code=1)


def test_data_sets_of_tfds(capsys, devices, tmp_path, monkeypatch):
  """Breaks if a prepared data set is not listed, or a download is."""
  for name in ('cifar10/3.0.2', 'imagenette/full-size/1.0.0'):
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / 'dataset_info.json').touch()
  (tmp_path / 'downloads/x').mkdir(parents=True)
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  assert f'{tmp_path}: cifar10, imagenette\n' in output(capsys)
  monkeypatch.setenv('TFDS_DATA_DIR', 'gs://bucket/sets')
  assert 'not a local folder, not checked' in output(capsys)


def test_the_lowest_memory_limit(tmp_path, monkeypatch):
  """Breaks if the limit of a container or of a Slurm job, which is that of a parent group, is not found."""
  texts = {'/proc/self/cgroup': '4:memory:/job/step\n3:cpu:/\n0::/job/step\n'}
  texts |= {'/c/job/step/memory.max': 'max\n', '/c/job/memory.max': '7000\n'}
  texts |= {'/c/memory/memory.limit_in_bytes': '9000\n'}
  monkeypatch.setattr(doctor, 'CGROUPS', pathlib.Path('/c'))
  monkeypatch.setattr(doctor, '_read', lambda path: texts.get(str(path), ''))
  assert doctor._memory_limit() == 7000
  texts['/proc/self/cgroup'] = ''
  assert doctor._memory_limit() is None
