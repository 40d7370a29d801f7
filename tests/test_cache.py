"""The start: programs that are kept in the user's cache folder, programs that run once, memory of the first step."""

import os
import pathlib
import subprocess
import sys
import threading
import types

import jax
import numpy as np
import pytest
from conftest import TINY
from jax._src import compilation_cache

from simclr_jax import cli, config as recipes, data, train as training, train_state
from simclr_jax.runtime import compile_cache

OPTIONS = (
  'jax_compilation_cache_dir',
  'jax_compilation_cache_max_size',
  'jax_enable_compilation_cache',
  'jax_persistent_cache_min_compile_time_secs',
  'jax_persistent_cache_enable_xla_caches',
)


@pytest.fixture
def cache_home(tmp_path, monkeypatch):
  """A user's empty cache folder; afterwards, the tests have their own again."""
  before = {name: jax.config.values[name] for name in OPTIONS}
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.setattr(compilation_cache, 'get_file_cache', compilation_cache.get_file_cache)
  jax.config.update('jax_compilation_cache_dir', None)
  compilation_cache.reset_cache()
  yield tmp_path
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  jax.clear_caches()


@pytest.fixture
def folder(cache_home):
  """The folder of the programs, in use."""
  compile_cache.enable()
  return cache_home / 'simclr_jax'


def compiled():
  """A program compiled anew, or read; and its result."""
  jax.clear_caches()
  return np.asarray(jax.jit(lambda x: x * 3 + 1)(np.arange(4.0)))


@pytest.fixture
def events():
  """Names of what JAX did with its cache."""
  seen = []
  jax.monitoring.register_event_listener(lambda name, **_: seen.append(name.rpartition('/')[2]))
  yield seen
  jax.monitoring.clear_event_listeners()


def test_a_program_is_kept_and_used_again(folder, events):
  """Breaks if nothing is kept, if it is not found again, or if other users can read or write the folder."""
  first = compiled()
  assert folder.stat().st_mode & 0o777 == 0o700
  assert list(folder.glob('*.program'))
  events.clear()
  assert np.array_equal(compiled(), first)
  assert 'cache_hits' in events and 'cache_misses' not in events


@pytest.mark.parametrize('damage', [b'', b'x', None])
def test_a_damaged_program_is_compiled_again(folder, events, damage, recwarn):
  """Breaks if a truncated or changed file changes a result, prints a warning, or stays as it is."""
  first = compiled()
  good = {path: path.read_bytes() for path in folder.iterdir()}
  for path, content in good.items():
    changed = bytes([content[-1] ^ 1])
    path.write_bytes(content[:-1] + changed if damage is None else damage)
  events.clear()
  assert np.array_equal(compiled(), first)
  assert 'cache_hits' not in events
  assert not recwarn.list
  events.clear()
  compiled()
  assert 'cache_hits' in events


def test_a_program_that_cannot_be_loaded_is_compiled_again(folder, events):
  """Breaks if a file with a correct checksum that is no program of this version of JAX stops a run."""
  first = compiled()
  for path in folder.iterdir():
    path.write_bytes(compile_cache._checksum(b'other') + b'other')
  with pytest.warns(UserWarning, match='Error reading persistent compilation cache'):
    assert np.array_equal(compiled(), first)
  events.clear()
  compiled()
  assert 'cache_hits' in events


def test_the_size_is_limited(tmp_path):
  """Breaks if old programs are kept for ever, or if those that were used last are removed, or files of others."""
  cache = compile_cache.Cache(tmp_path, 3 * 104)
  (tmp_path / 'other').write_bytes(bytes(1000))
  for i in range(3):
    cache.put(f'p{i}', bytes(100))
    os.utime(cache._file(f'p{i}'), (i, i))
  assert cache.get('p0') == bytes(100)
  cache.put('p3', bytes(100))
  assert [cache.get(f'p{i}') is not None for i in range(4)] == [True, False, True, True]
  assert (tmp_path / 'other').exists()


def test_other_instructions_are_another_program(tmp_path, monkeypatch):
  """Breaks if a program may be used on a processor that lacks its instructions, with one home folder for both."""
  compile_cache.Cache(tmp_path, 1000).put('p', b'avx512')
  monkeypatch.setattr(compile_cache, '_processor', lambda: 'flags: avx2')
  assert compile_cache.Cache(tmp_path, 1000).get('p') is None


def test_several_processes_at_once(tmp_path):
  """Breaks if a program is read before it is complete, or if two writers or their limits disturb each other."""
  value, wrong = os.urandom(200_000), []

  def work():
    cache = compile_cache.Cache(tmp_path, 900_000)
    for i in range(60):
      cache.put(f'p{i % 6}', value)
      if cache.get(f'p{i % 5}') not in (None, value):
        wrong.append(i)

  threads = [threading.Thread(target=work) for _ in range(4)]
  [t.start() for t in threads]
  [t.join() for t in threads]
  assert not wrong
  assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 900_000


def make_link(folder):
  (folder.parent / 'elsewhere').mkdir()
  folder.symlink_to('elsewhere')


def make_file(folder):
  folder.write_text('')


def make_open(folder):
  folder.mkdir()
  folder.chmod(0o777)


@pytest.mark.parametrize(
  'make, reason',
  [(make_link, 'is a link'), (make_file, 'File exists'), (make_open, 'written by other users')],
)
def test_a_folder_of_others_is_not_used(cache_home, caplog, make, reason):
  """Breaks if programs are loaded from where another user could have put them."""
  make(cache_home / 'simclr_jax')
  compile_cache.enable()
  assert jax.config.values['jax_compilation_cache_dir'] is None
  assert [reason in r.getMessage() for r in caplog.records] == [True]


def test_a_folder_of_another_user(cache_home, caplog, monkeypatch):
  """Breaks if programs of another user are loaded."""
  monkeypatch.setattr(os, 'geteuid', lambda: 12345)
  compile_cache.enable()
  assert jax.config.values['jax_compilation_cache_dir'] is None
  assert 'belongs to another user' in caplog.text


def test_a_full_disk(folder, events, caplog, monkeypatch):
  """Breaks if a run stops, leaves half a file, or says so for each program, when the disk is full."""

  def full(path, content):
    path.touch()
    raise OSError(28, 'No space left on device', str(path))

  monkeypatch.setattr(pathlib.Path, 'write_bytes', full)
  compiled()
  compiled()
  assert not list(folder.iterdir())
  assert len(caplog.records) == 1 and 'No space left' in caplog.text


@pytest.mark.parametrize(
  'name, value', [('jax_enable_compilation_cache', False), ('jax_compilation_cache_dir', '/x')]
)
def test_off_or_elsewhere(cache_home, name, value):
  """Breaks if the user's folder is made although JAX's own options say otherwise."""
  jax.config.update(name, value)
  compile_cache.enable()
  assert not (cache_home / 'simclr_jax').exists()


def test_a_relative_cache_home_is_ignored(cache_home, tmp_path, monkeypatch):
  """Breaks if XDG_CACHE_HOME=gs://... makes a folder in the working directory."""
  monkeypatch.setenv('XDG_CACHE_HOME', 'gs://bucket')
  monkeypatch.setenv('HOME', str(tmp_path))
  assert compile_cache.folder() == tmp_path / '.cache/simclr_jax'


def train(steps=3):
  """The state and metrics of a short training, with newly made programs; the buffers of the last state but one."""
  jax.clear_caches()
  train_state._programs.cache_clear()
  config = recipes.load('simclr_digits', TINY)
  dataset = data.load(config.data, 'train')
  state, step = train_state.build(config, dataset)
  results = []
  for i in range(steps):
    before = jax.tree.leaves(state.params)
    state, metrics = step(state, i)
    results.append(jax.device_get(metrics))
  step.loader.close()
  return jax.tree.leaves((jax.device_get(state), results)), before


def test_a_kept_program_gives_the_same_bits(cache_home, events):
  """Breaks if a training from kept programs differs in a bit, or if they do not reuse the buffers of the state."""
  expected, _ = train()
  compile_cache.enable()
  compilation_cache.reset_cache()
  train()
  events.clear()
  found, donated = train()
  assert 'cache_hits' in events and 'cache_misses' not in events
  assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(expected, found, strict=True))
  assert all(x.is_deleted() for x in donated)


def test_commands_keep_their_programs(cache_home, tmp_path):
  """Breaks if a command does not use the folder."""
  fields = [f'--config.{k}={v}' for k, v in {**TINY, 'steps': '1'}.items()]
  jax.clear_caches()
  train_state._programs.cache_clear()
  run = f'--workdir={tmp_path / "run"}'
  assert cli.main(['pretrain', '--config=simclr_digits', run, *fields]) == 0
  names = {path.name.split('-')[0] for path in (cache_home / 'simclr_jax').iterdir()}
  assert {'jit_init', 'jit_step'} <= names


# Subprocess, because XLA reads its flags once: initial values with all optimisations, and as they are computed.
INIT = """
import jax, numpy as np, sys
from simclr_jax import config, sharding, train_state
from simclr_jax.runtime import compile_cache
values = []
for options in (compile_cache.init_options, lambda platform: None):
  compile_cache.init_options = options
  train_state._programs.cache_clear()
  mesh = sharding.make_mesh()
  recipe = config.load(sys.argv[1], {'data.examples': '6000', 'model.width_multiplier': '0.25'})
  with jax.set_mesh(mesh):
    values.append(jax.tree.leaves(train_state.programs(recipe, mesh)[0](np.uint32(3))))
assert compile_cache.init_options('cpu') is None
print(all(np.array_equal(a, b) for a, b in zip(*values, strict=True)))
"""


@pytest.mark.parametrize('recipe', ['simclr_digits', 'moco_cifar10'])
def test_initial_values_do_not_depend_on_compiler_options(recipe):
  """Breaks if initial values differ from those of runs that were started with all optimisations."""
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  command = [sys.executable, '-c', INIT, recipe]
  output = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
  assert output.stdout == 'True\n', output.stderr


def test_memory_of_a_gpu_is_announced_before_the_first_step(tmp_path, monkeypatch, capsys):
  """Breaks if it is not printed, printed on other steps, or if the step is compiled twice for it."""
  card = mock_gpu()
  compiled_programs = []
  compile_step = jax.stages.Lowered.compile
  monkeypatch.setattr(
    jax.stages.Lowered, 'compile', lambda s: compiled_programs.append(s) or compile_step(s)
  )
  announcement = training._announcement
  monkeypatch.setattr(training, '_announcement', lambda mesh: announcement(card))
  config = recipes.load('simclr_digits', {**TINY, 'steps': '3'})
  jax.clear_caches()
  train_state._programs.cache_clear()
  assert training.pretrain(config, tmp_path / 'run') == 0
  lines = capsys.readouterr().out.splitlines()
  told = [i for i, line in enumerate(lines) if line.startswith('A card: a step needs')]
  assert len(told) == 1 and lines[told[0] + 1].startswith('first step after')
  assert len(compiled_programs) == 1


def mock_gpu(platform='gpu', stats=None):
  """A mesh of one described GPU."""
  stats = {'bytes_limit': 2**30, 'bytes_in_use': 0} if stats is None else stats
  gpu = types.SimpleNamespace(platform=platform, device_kind='A card', memory_stats=lambda: stats)
  return types.SimpleNamespace(local_devices=[gpu])


def test_nothing_is_announced_of_other_devices():
  """Breaks if a CPU, or a GPU whose memory is not known, stops a training."""
  assert training._announcement(mock_gpu('cpu')) is None
  assert training._announcement(mock_gpu(stats={})) is None
  assert training._announcement(mock_gpu()) is not None
