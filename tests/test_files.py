"""Writing and reading of files: `runtime.files`, and what uses it."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from simclr_jax.errors import ConfigError
from simclr_jax.evaluate import embed
from simclr_jax.runtime import files, logs
from simclr_jax.validation import check_json


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
  """Breaks if partial output gets the final name, or a temporary file stays."""
  path = tmp_path / 'report.html'
  files.write_text(path, 'old')
  with pytest.raises(RuntimeError), files.atomic(path) as file:
    file.write(b'new')
    raise RuntimeError
  assert path.read_text() == 'old' and os.listdir(tmp_path) == ['report.html']
  with pytest.raises(RuntimeError), files.new_folder(tmp_path / 'out') as folder:
    (folder / 'a').write_text('a')
    raise RuntimeError
  assert os.listdir(tmp_path) == ['report.html']


def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch):
  """Breaks if an error of the operating system does not name the file, or destroys the old one."""
  path = tmp_path / 'a.json'
  files.write_json(path, 1)

  def full(_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(OSError, match='a.json cannot be written: No space left on device'):
    files.write_json(path, 2)
  assert json.loads(path.read_text()) == 1 and os.listdir(tmp_path) == ['a.json']


def test_permissions_follow_the_umask(tmp_path):
  """Breaks if files are readable by others although the umask forbids it, or by nobody else although it allows it."""
  old = os.umask(0o027)
  try:
    files.write_text(tmp_path / 'a', 'x')
    assert (tmp_path / 'a').stat().st_mode & 0o777 == 0o640
  finally:
    os.umask(old)


def test_links_are_replaced_or_refused_and_never_followed(tmp_path):
  """Breaks if a file outside a folder changes because somebody put a link into the folder."""
  mine = tmp_path / 'mine'
  mine.write_text('precious')
  link = tmp_path / 'run' / 'report.html'
  link.parent.mkdir()
  link.symlink_to(mine)
  for write in (files.append, lambda path: files.locked(path).__enter__()):
    with pytest.raises(OSError, match='it is a link'):
      write(link)
  files.write_text(link, 'new')
  assert mine.read_text() == 'precious' and link.read_text() == 'new' and not link.is_symlink()


def test_pipes_are_not_waited_for(tmp_path):
  """Breaks if a pipe at the place of a file blocks the program."""
  pipe = tmp_path / 'metrics.jsonl'
  os.mkfifo(pipe)
  with pytest.raises(OSError, match='cannot be written'):
    files.append(pipe)
  with pytest.raises(ConfigError, match='no regular file'):
    files.read_text(pipe)
  with pytest.raises(ConfigError, match='no regular file'):
    logs.read(tmp_path)


WRITER = """
import pathlib, sys, time
from simclr_jax.runtime import files
folder = pathlib.Path(sys.argv[1])
with files.atomic(folder / 'a.json') as file, files.new_folder(folder / 'out'):
  file.write(b'partial')
  file.flush()
  print('writing', flush=True)
  time.sleep(60)
"""


def test_leftovers_of_killed_writers(tmp_path):
  """Breaks if the leftover of a killed writer stays, or that of a living one, or a file of the user, is removed."""
  process = subprocess.Popen([sys.executable, '-c', WRITER, tmp_path], stdout=subprocess.PIPE)
  assert process.stdout.readline() == b'writing\n'
  for name in ('.simclr-jax-notes.txt', '.hidden', 'a.json.new', '.a.json.tmp'):
    (tmp_path / name).write_text('of the user')
  theirs = {name for name in os.listdir(tmp_path) if name.startswith('.simclr-jax-')}
  assert len(theirs) == 3
  files.write_text(tmp_path / 'b', 'b')
  assert theirs <= set(os.listdir(tmp_path))  # the writer lives
  process.send_signal(signal.SIGKILL)
  process.wait()
  files.write_text(tmp_path / 'b', 'b')
  left = {'b', '.simclr-jax-notes.txt', '.hidden', 'a.json.new', '.a.json.tmp'}
  assert set(os.listdir(tmp_path)) == left


@pytest.mark.parametrize(
  'content, message',
  [
    (b'{', 'is damaged'), (b'\xff\xfe{}', 'not UTF-8'), (b'[' * 10**5, 'nested too deeply'), (b'', 'is damaged'),
    (b'9' * 5000, 'is damaged'),
  ],
)  # fmt: skip
def test_damaged_json_is_a_sentence(content, message, tmp_path):
  """Breaks if a damaged JSON file is another exception than one with the name of the file."""
  path = tmp_path / 'a.json'
  path.write_bytes(content)
  with pytest.raises(ConfigError, match=f'a.json .*{message}|a.json is damaged'):
    files.read_json(path)


def test_large_files_are_refused_before_they_are_read(tmp_path):
  """Breaks if a huge file at the place of a small one fills the memory."""
  path = tmp_path / 'a.json'
  with path.open('wb') as file:
    file.truncate(2**40)  # without blocks on the disk
  with pytest.raises(ConfigError, match='is larger than 1 MB'):
    files.read_json(path, limit=2**20)


@pytest.mark.parametrize(
  'value, shape, problem',
  [
    (5, str, 'x is 5, not a string'), (True, int, 'x is True, not an integer'), (10**30, int, 'not an integer'),
    (float('nan'), float, 'not a finite number'), ('a\0', str, 'not a string'), ([1, 'a'], [int], r'x\[1\] is'),
    ({'a': 1}, {'b': int}, "x has no 'b'"), ({'a': {'b': None}}, {str: {'b': int}}, 'x.a.b is None'),
    ([[None]], ([[int]], None), r'x\[0\]\[0\] is None'), (None, (int, str), 'not an integer or a string'),
  ],
)  # fmt: skip
def test_values_of_the_wrong_type_are_named(value, shape, problem):
  """Breaks if a wrong value passes, or the message does not say where it is."""
  with pytest.raises(ConfigError, match=problem):
    check_json(value, shape, 'x')


def test_right_values_pass():
  """Breaks if optional keys, other keys, or one of several shapes is refused."""
  for value in ({'a': 1}, {'a': [1, 2.5], 'b': True, 'c': None}):
    check_json(value, {'a': (int, [float]), 'b?': bool}, 'x')


def test_lines_that_are_no_records(tmp_path, caplog):
  """Breaks if a damaged line of metrics.jsonl is a traceback, or takes good records with it."""
  lines = [
    b'{"step": 1, "loss": 2.5}', b'5', b'null', b'[1]', b'\xff\xfe', b'{"loss": 1}', b'{"step": "a"}', b'{"step": -1}',
    b'{"step": 1, "loss": "x"}', b'{"step": 1, "loss": 1e999}', b'{"step": true}', b'{"step": 1, "x": [1]}',
    b'[' * 5000, b'{"step": 1, "loss": 1' + b'0' * 400 + b'}', b'{"step": 2, "event": "start", "loss": null}',
  ]  # fmt: skip
  (tmp_path / 'metrics.jsonl').write_bytes(b'\n'.join(lines) + b'\n{"step": 3, "lo')
  assert [r['step'] for r in logs.read(tmp_path)] == [1, 2]
  assert '13 lines are no records' in caplog.text


def test_some_of_many_records(tmp_path):
  """Breaks if events, evaluations or the ends of an attempt are left out when records are thinned out."""
  lines = [f'{{"step": {i}, "loss": 1}}' for i in range(1000)]
  lines[500] = '{"step": 500, "knn_acc": 0.5}'
  lines[700] = '{"step": 700, "event": "start"}'
  (tmp_path / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')
  steps = [r['step'] for r in logs.read(tmp_path, 10)]
  assert steps == sorted({*range(0, 1000, 100), 500, 699, 700, 701, 999})
  assert [r['step'] for r in logs.read(tmp_path, 5000)] == list(range(1000))


def test_a_workdir_that_vanished_is_an_error(tmp_path):
  """Breaks if a run trains on although its folder was moved or deleted."""
  workdir = tmp_path / 'run'
  workdir.mkdir()
  log = logs.Log(workdir, 0, 10, tensorboard=False, shows=False)
  log.write(1, {'loss': 1.0})
  workdir.rename(tmp_path / 'moved')
  with pytest.raises(OSError, match='was deleted or moved'):
    log.write(2, {'loss': 1.0})
  workdir.mkdir()
  with pytest.raises(OSError, match='was deleted or moved'):
    log.flush()
  log.close()


# Features: `evaluate.embed`.


@pytest.mark.parametrize('suffix', embed.SUFFIXES)
def test_embed_replaces_features_only(suffix, tmp_path):
  """Breaks if --out=FILE replaces a file of another kind, or refuses its own."""
  out = tmp_path / f'train{suffix}'
  for content in (b'', b'a,b\n1,2\n', os.urandom(100)):
    out.write_bytes(content)
    with pytest.raises(ConfigError, match='is no file of features'):
      embed.check(out)
    assert out.read_bytes() == content
  if suffix in ('.npz', '.npy'):
    images = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(out, images=images) if suffix == '.npz' else np.save(out, images)
    with pytest.raises(ConfigError, match='is no file of features'):
      embed.check(out)


def test_embed_leaves_folders_of_others_alone(tmp_path):
  """Breaks if a user's folder with the name of the folder of parts is deleted."""
  folder = tmp_path / 'f.npy.parts'
  folder.mkdir()
  embed.check(tmp_path / 'f.npy')  # an empty folder is used
  (folder / '0.npz').write_text('of the user')
  with pytest.raises(ConfigError, match='not a folder of this command'):
    embed.check(tmp_path / 'f.npy')
  assert (folder / '0.npz').read_text() == 'of the user'


def test_names_that_are_formulas():
  """Breaks if a spreadsheet program executes the name of an image."""
  names = ['=cmd|calc', '+1', '-1', '@x', '\t=1', '\r=1', 'a=1', '1-2.png']
  assert [embed._without_formula(n) != n for n in names] == [True] * 6 + [False] * 2


def test_waiting_for_a_lock(tmp_path):
  """Breaks if two processes hold a lock, or waiting for it does not end."""
  code = f'import pathlib\nfrom simclr_jax.runtime import files\nwith files.locked(pathlib.Path({str(tmp_path)!r}) / "lock"):\n  print(1, flush=True)\n  import time\n  time.sleep(2)'
  process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE)
  assert process.stdout.readline() == b'1\n'
  with files.locked(tmp_path / 'lock', wait=False) as ours:
    assert not ours
  start = time.monotonic()
  with files.locked(tmp_path / 'lock') as ours:
    assert ours and time.monotonic() - start > 0.5
  process.wait()
