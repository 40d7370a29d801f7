"""The command line for a new user: every command, its error messages, and the snippets of the README."""

import csv
import json
import logging
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import SMALL, fails
from PIL import Image

from simclr_jax import __version__, cli, commands, config, data
from simclr_jax.encoder import Encoder
from simclr_jax.errors import ConfigError, ExitCode
from simclr_jax.evaluate import embed
from simclr_jax.runs import load_encoder

README = pathlib.Path(__file__).parents[1] / 'README.md'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """The workdir of a finished small run."""
  workdir = tmp_path_factory.mktemp('cli') / 'run'
  fields = [f'--config.{k}={v}' for k, v in SMALL.items()]
  assert cli.main(['pretrain', '--config=simclr_digits', f'--workdir={workdir}', *fields]) == 0
  return workdir


@pytest.fixture(scope='module')
def exported(run, tmp_path_factory):
  """The encoder of the run, exported."""
  out = tmp_path_factory.mktemp('cli') / 'encoder'
  assert cli.main(['export', f'--workdir={run}', '--to=orbax', f'--out={out}']) == 0
  return out


@pytest.mark.parametrize(
  'override, expected',
  [
    ('batch_size=-4', 'batch_size=-4 is out of range: at least 2'),
    ('batch_size=2.5', "batch_size='2.5' is not an integer"),
    ('batch_size=12', 'batch_size=12 is not divisible by the number of devices, 8'),
    ('batch_size=8000', 'batch_size=8000 is larger than the data set, 6000 images'),
    ('learning_rate=inf', 'learning_rate=inf is not a finite number'),
    ('learning_rate=fast', "learning_rate='fast' is not a number"),
    ('weight_decay=nan', 'weight_decay=nan is not a finite number'),
    ('temperature=0', 'temperature=0.0 is out of range'),
    ('warmup_epochs=16', 'warmup_epochs=16 is longer than the training, epochs=4'),
    ('epochs=0', 'epochs=0 and steps=0: set epochs or steps'),
    ('tensorboard=maybe', "tensorboard='maybe' is not true or false"),
    ('temperatur=1', "no field 'temperatur', did you mean 'temperature'?"),
    ('model.dept=18', "no field 'model.dept', did you mean 'model.depth'?"),
    ('model.depth=19', 'model.depth=19 is not one of 8, 18, 34'),
    ('model.stem=cifr', "model.stem='cifr' is not one of imagenet, strided, cifar"),
    ('model.width_multiplier=0.3', '64 times the value must be an integer'),
    ('augment.view1=simclr_crop(2, 1) | flip', 'augment.view1: '),
    ('augment.view1=simclr_crop(0.1, 1) | flop', "did you mean 'flip'?"),
    ('augment.eval=simclr_crop(0.1, 1)', 'augment.eval: '),
    ('queue_size=-1', 'queue_size=-1 is out of range: at least 0'),
    ('loss=nce', "loss='nce' is not one of nt_xent, nt_logistic, margin_triplet, pairwise_margin"),
    ('method=end_to_end', "the recipe lacks the field 'shuffle'"),
    (
      'method=mocha',
      "method='mocha' is not one of distill, end_to_end, memory_bank, moco, simclr, supervised",
    ),
    ('first_loss=1', 'first_loss=(1.0,) is not two numbers'),
    ('decay_epochs=ten', "decay_epochs='ten' is not numbers: 1,2"),
    ('data.examples=7', 'data.examples=7, but the training split has 6000 images'),
    ('model.bn_groups=7', 'batch_size=128 is not divisible by model.bn_groups=7'),
    ('data.source=imagenet', "data.source='imagenet' is not one of arrays, digits, folder, tfds"),
    ('data.num_classes=5', 'data.num_classes=5, but the training labels go up to 9'),
    ('data.train_split=validation', 'the digits have the splits train and test'),
  ],
)
def test_an_invalid_field_is_a_one_line_error(capsys, tmp_path, override, expected):
  """Breaks if an invalid value is accepted, gives a traceback, or leaves files in the workdir."""
  workdir = tmp_path / 'run'
  error = fails(
    capsys, 'pretrain', '--config=simclr_digits', f'--workdir={workdir}', f'--config.{override}'
  )
  assert expected in error and error.count('\n') == 1, error
  assert not (workdir / 'config.json').exists() and not (workdir / 'checkpoints').exists()


@pytest.mark.parametrize(
  'argv, expected',
  [
    (['pretrain', '--config=simclr_digit', '--workdir=x'], "did you mean 'simclr_digits'?"),
    (['pretrain', '--config=simclr_cifar10:v3', '--workdir=x'], "has no variant 'v3', only v1, v2"),
    (['pretrain', '--config=simclr_digits', '--workdir=x', 'stray'], "unexpected argument 'stray'"),
    (
      ['pretrain', '--config=simclr_digits', '--workdir=x', '--confg.seed=1'],
      'unexpected argument',
    ),
    (['pretrain', '--config=simclr_digits', '--workdir=x', '--config.seed'], 'needs a value'),
    (['pretrain', '--workdir=x'], '--data or --config is required'),
    (['pretrain', '--config=simclr_digits'], '--workdir=RUN is required without --data'),
    (['pretend'], "unknown command 'pretend', did you mean 'pretrain'?"),
    ([], 'required: COMMAND'),
    (['knn', '--workdir=/nowhere'], 'is not a run directory'),
    (['embed', '--workdir=/nowhere', '--data=x.npy', '--out=f.npy'], 'neither a run directory'),
    (['probe', '--workdir=/nowhere', '--epochs=0'], '0 is below 1'),
    (['probe', '--workdir=/nowhere', '--protocol=svm'], 'invalid choice'),
    (['probe', '--workdir=/nowhere', '--learning-rate=nan'], 'not a number above 0'),
    (['probe', '--workdir=/nowhere', '--labels=a'], "'a' is not an integer"),
    (['pretrain', '--config=simclr_digits:v2', '--workdir=x'], 'cannot be built'),
  ],
)
def test_invalid_arguments_are_one_line_errors(capsys, monkeypatch, tmp_path, argv, expected):
  """Breaks if a misspelt argument is ignored or gives a traceback."""
  monkeypatch.chdir(tmp_path)
  assert expected in fails(capsys, *argv)
  assert not list(tmp_path.iterdir())


BAD_NAMES = [
  '', '.', '..', '../x', '/tmp/x', 'a/b', 'a\\b', 'a\nb', 'a\x1bb', ' a', 'a.', '-a', '.lock', 'n' * 300, 'a,b', 'a\u202eb',
  'caf\udce9', 'checkpoints', 'Checkpoints', 'config.json', 'metrics.jsonl', 'evaluation.json', 'report.html', 'knn',
  'encoder.json', 'transfer', 'distillation', 'linear_sgd', 'distill',
]  # fmt: skip


@pytest.mark.parametrize('name', BAD_NAMES)
def test_a_name_stays_in_its_folder(name, capsys, tmp_path):
  """Breaks if the name of a result can leave the run, or replace another part of it."""
  error = fails(capsys, 'finetune', f'--workdir={tmp_path}/run', f'--name={name}')
  assert 'argument --name' in error and len(error.splitlines()[-1]) < 250
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['10 labels', 'a', 'sgd_0.1%', 'übung-2'])
def test_names_that_are_allowed(name, capsys, tmp_path):
  """Breaks if a harmless name is refused."""
  assert 'is not a run directory' in fails(
    capsys, 'finetune', f'--workdir={tmp_path}/run', f'--name={name}'
  )


@pytest.mark.parametrize('command', ['finetune', 'distill', 'student', 'simclrv2', 'transfer'])
def test_folders_of_the_user_are_left_alone(command, capsys, tmp_path):
  """Breaks if trainings are written into a folder that has other contents than runs."""
  folder = {'finetune': 'own', 'simclrv2': 'distill', 'transfer': 'transfer'}.get(command, 'seed0')
  place = tmp_path if command == 'distill' else tmp_path / folder
  place.mkdir(exist_ok=True)
  (place / 'thesis.txt').write_text('mine')
  argv = {
    'finetune': ['finetune', f'--workdir={tmp_path}', '--name=own'],
    'distill': ['distill', f'--workdir={tmp_path}', '--teacher=x/seed0'],
    'student': ['distill', f'--workdir={tmp_path}', '--teacher=x/seed0'],
    'simclrv2': ['simclrv2', f'--workdir={tmp_path}', '--config=simclr_digits'],
    'transfer': ['transfer', f'--workdir={tmp_path}', '--to=digits', '--finetune'],
  }[command]
  if command == 'student':
    (tmp_path / '.lock').touch()  # the folder of the students is a run
  error = fails(capsys, *argv)
  assert f'{place} contains other files, but no run' in error and error.count('\n') == 1
  inside = {p.name for p in place.rglob('*')}
  assert inside == {'thesis.txt'} and (place / 'thesis.txt').read_text() == 'mine'


@pytest.mark.parametrize(
  'teachers, expected',
  [
    ('a/seed0,b/seed0', 'two teachers have the name'),
    ('checkpoints', 'a student cannot have the name'),
    ('run/../run/seed0', 'the student would replace its teacher'),
    ('a,,b', 'the path is empty'),
  ],
)
def test_names_of_students(teachers, expected, capsys, monkeypatch, tmp_path):
  """Breaks if a student replaces its teacher, another student, or a part of a run."""
  monkeypatch.chdir(tmp_path)
  assert expected in fails(capsys, 'distill', '--workdir=run', f'--teacher={teachers}')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'argv, expected',
  [
    (['pretrain', '--config=simclr_digits', '--workdir='], 'the path is empty'),
    (['knn', '--workdir=' + 'x' * 300], 'is longer than names of files can be'),
    (['pretrain', '--data=' + 'x' * 300], 'is longer than names of files can be'),
    (['transfer', '--workdir=run', '--to=a,,b'], 'has an empty part'),
    (['transfer', '--workdir=run', '--to=' + 'x' * 300], 'is longer than names of files can be'),
    (['knn', '--workdir=run', '--out=run/config.json'], 'is the name of another file of a run'),
    (['probe', '--workdir=run', '--out=/dev/null'], 'is not a .json file'),
    (['report', '--workdir=run', '--out='], 'the path is empty'),
  ],
)
def test_paths_that_cannot_be_right(argv, expected, capsys, monkeypatch, tmp_path):
  """Breaks if a shell variable that is not set means the current folder, or a path ends in a system error."""
  monkeypatch.chdir(tmp_path)
  assert expected in fails(capsys, *argv)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['', *commands.NAMES])
def test_help(name, capsys):
  """Breaks if the help of a command lacks its summary, its arguments or their defaults."""
  with pytest.raises(SystemExit) as exit_request:
    cli.main([*([name] if name else []), '--help'])
  text = capsys.readouterr().out
  assert exit_request.value.code == 0 and len(text) > 300
  if not name:
    assert all(f'  {command} ' in text or f'  {command}\n' in text for command in commands.NAMES)
    assert all(f'{int(code):<5}{code.meaning}' in text for code in ExitCode)
  if name == 'knn':
    assert 'number of nearest neighbours (default: 200)' in text
  without = ('check-data', 'compile-check', 'doctor', 'fields', 'import', 'recipes')
  if name in commands.NAMES and name not in without:
    assert '--workdir' in text


def test_the_table_of_exit_codes():
  """Breaks if the documented exit codes are not those of the program."""
  text = (README.parent / 'docs/reliability.md').read_text()
  table = text.split('## Exit codes')[1].split('\n## ')[0]
  rows = dict(re.findall(r'^\| (\d+) \| (.+?) \|', table, re.MULTILINE))
  assert rows == {str(int(code)): code.meaning for code in ExitCode}


def test_errors_and_warnings_are_printable(capsys):
  """Breaks if a name with control characters, in an error or a warning, controls the terminal."""
  assert r'a\x1b[2Jb\u202ec is not a run' in fails(capsys, 'knn', '--workdir=a\x1b[2Jb\u202ec')
  record = logging.LogRecord('absl', logging.WARNING, '', 0, 'file %s', ('a\x1b[2J\nb',), None)
  assert cli.LogFormatter('%(message)s').format(record) == r'file a\x1b[2J\x0ab'


def test_version(capsys):
  """Breaks if --version does not print the version, so that bug reports cannot name it."""
  with pytest.raises(SystemExit) as exit_request:
    cli.main(['--version'])
  assert exit_request.value.code == 0 and capsys.readouterr().out == f'simclr_jax {__version__}\n'


@pytest.mark.parametrize(
  'argv',
  [
    *(['--help'], ['--version'], ['fields'], ['recipes'], ['knn'], ['pretrain', '--help']),
    *(['pretrain', '--config=simclr_digits', '--workdir=x', f'--config.{override}']
      for override in ('epoch=3', 'epochs=-1', 'epochs=x', 'temperature=0', 'model.depth=19')),
    ['pretrain', '--config=simclr_digit', '--workdir=x'],
    ['finetune', '--workdir=x', '--config.stepz=3'],
  ],
)  # fmt: skip
def test_help_and_errors_do_not_import_jax(argv, tmp_path):
  """Breaks if --help or an error about arguments and fields takes seconds, because it imports JAX
  or TensorFlow.
  """
  program = (
    'import sys\nfrom simclr_jax import cli\ntry:\n  cli.main(sys.argv[1:])\nexcept SystemExit:\n  pass\n'
    "heavy = {'jax', 'flax', 'optax', 'tensorflow', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
    'assert not heavy, heavy'
  )
  subprocess.run([sys.executable, '-c', program, *argv], check=True, cwd=tmp_path)
  assert not list(tmp_path.iterdir())


def test_files_of_a_run(run):
  """Breaks if a run does not write its recipe, its metrics, or the records that the report needs."""
  metadata = json.loads((run / 'config.json').read_text())
  assert metadata['config']['batch_size'] == 32
  assert metadata['command'].startswith('simclr-jax pretrain')
  assert metadata['versions']['jax']
  lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
  assert [r['event'] for r in lines if 'event' in r] == ['start', 'complete']
  records = [r for r in lines if 'event' not in r]
  assert [r['step'] for r in records if 'loss' in r] == [1, 2, 3, 4]
  expected = {'loss', 'contrastive_acc', 'contrastive_acc_n', 'probe_acc', 'learning_rate', 'grad_norm',
              'examples_per_second', 'data_wait', 'epoch', 'batch_hash', 'chance_loss', 'z_std', 'rank', 'alignment', 'uniformity', 'param_norm'}  # fmt: skip
  assert expected <= set(records[0])
  assert 0 <= records[-1]['knn_acc'] <= 1


def test_tensorboard_files(run):
  """Breaks if TensorBoard finds other metrics in WORKDIR/metrics than those of metrics.jsonl."""
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
  loss = [(r['step'], np.float32(r['loss'])) for r in lines if 'loss' in r]
  events = EventAccumulator(str(run / 'metrics')).Reload()
  assert [(e.step, np.float32(e.value)) for e in events.Scalars('loss')] == loss
  assert {'knn_acc', 'epoch', 'data_wait'} <= set(events.Tags()['scalars'])


def test_evaluations_and_report(run, tmp_path, capsys):
  """Breaks if a command fails, a result is not saved, or the report refers to external files."""
  assert cli.main(['knn', f'--workdir={run}', '--k=20', '--baselines']) == 0
  logistic = [
    'probe',
    f'--workdir={run}',
    '--protocol=logistic',
    '--labels=1,5',
    '--draws=2',
    '--baselines',
  ]
  assert cli.main(logistic) == 0
  assert cli.main(['probe', f'--workdir={run}', '--cached', '--epochs=1']) == 0
  printed = capsys.readouterr().out
  assert 'raw pixels' in printed and 'untrained' in printed and '±' in printed
  results = json.loads((run / 'evaluation.json').read_text())
  assert set(results) == {'knn', 'label_efficiency', 'linear_sgd'}
  assert 0 <= results['knn']['rows']['pretrained'][0][0] <= 100

  report = tmp_path / 'page.html'
  assert cli.main(['report', f'--workdir={run}', f'--out={report}']) == 0
  page = report.read_text()
  images = re.findall(r'<img[^>]+alt="([^"]+)" src="data:image/', page)
  assert images.count('Embedding map') == 2
  assert images.count('Query') == 6 and images.count('Neighbour') == 6 * 8
  assert {'Accuracy against labels', 'loss, nats', 'norms', 'Augmented views'} <= set(images)
  assert '<h2>Diagnostics</h2>' in page and 'effective rank of the embeddings' in page
  assert not re.search(r'(src|href)="(?!data:)', page) and '<script' not in page
  for content in ('raw pixels', 'simclr-jax pretrain', '&quot;batch_size&quot;: 32', 'jaxlib'):
    assert content in page


def test_embed(run, exported, tmp_path):
  """Breaks if a run, its export and a file of images give different features, or the file formats
  change.
  """
  images = data.load(config.load('simclr_digits').data, 'test').images
  assert cli.main(['embed', f'--workdir={run}', '--split=test', f'--out={tmp_path}/a.npz']) == 0
  np.save(tmp_path / 'images.npy', images)
  argv = [
    'embed',
    f'--workdir={exported}',
    f'--data={tmp_path}/images.npy',
    f'--out={tmp_path}/b.npy',
  ]
  assert cli.main(argv) == 0
  a = np.load(tmp_path / 'a.npz')
  assert a['features'].shape == (1188, 32) and a['labels'].shape == (1188,)
  np.testing.assert_array_equal(a['features'], np.load(tmp_path / 'b.npy'))
  assert list(a['names']) == [str(i) for i in range(1188)]


def test_embed_resumes_after_an_interruption(run, tmp_path, monkeypatch):
  """Breaks if a part is lost or computed from the wrong images, or rows and names do not match."""
  monkeypatch.setattr(embed, 'PART', 7)
  encoder = load_encoder(run)
  images = data.load(config.load('simclr_digits').data, 'test').images[:40]
  (tmp_path / 'folder' / 'a b').mkdir(parents=True)
  names = [f'{"a b/" if i % 2 else ""}{i:02d}.png' for i in range(40)]
  for name, image in zip(names, images):
    Image.fromarray(image).save(tmp_path / 'folder' / name)
  dataset = data.load(
    config.load('simclr_digits', {'data.source': 'folder', 'data.dir': str(tmp_path / 'folder'),
                                  'data.train_split': '.'}).data, 'train')  # fmt: skip
  part_sizes = []
  embed_part = Encoder.embed

  def interrupted(self, part, **options):
    if len(part_sizes) == 3:
      raise KeyboardInterrupt
    part_sizes.append(len(part))
    return embed_part(self, part, **options)

  monkeypatch.setattr(Encoder, 'embed', interrupted)
  with pytest.raises(KeyboardInterrupt):
    embed.embed(encoder, dataset, tmp_path / 'f.csv')
  assert not (tmp_path / 'f.csv').exists()
  part_sizes[:] = []
  monkeypatch.setattr(
    Encoder, 'embed', lambda s, p, **o: part_sizes.append(len(p)) or embed_part(s, p, **o)
  )
  embed.embed(encoder, dataset, tmp_path / 'f.csv')
  assert part_sizes == [7, 7, 5] and {p.name for p in tmp_path.iterdir()} == {'folder', 'f.csv'}
  with (tmp_path / 'f.csv').open() as file:
    header, *rows = csv.reader(file)
  assert header[:3] == ['name', 'label', 'f0'] and [r[0] for r in rows] == sorted(names)
  expected = embed_part(encoder, data.Arrays(images, np.zeros(40, np.int32)))[0]
  features = np.array([r[2:] for r in sorted(rows, key=lambda r: r[0][-6:])], np.float32)
  np.testing.assert_allclose(features, expected, atol=1e-6)
  parquet = pytest.importorskip('pyarrow.parquet')
  embed.embed(encoder, dataset, tmp_path / 'f.parquet')
  table = parquet.read_table(tmp_path / 'f.parquet')
  assert table['name'].to_pylist() == sorted(names) and table['label'].null_count == 40
  np.testing.assert_allclose(
    np.array(table['features'].to_pylist()), np.array([r[2:] for r in rows], float), atol=1e-6
  )


def test_embed_errors(run, tmp_path, capsys):
  """Breaks if an invalid output path or a file without an array gives a traceback."""
  (tmp_path / 'x.npy').write_bytes(b'not an array')
  np.save(tmp_path / 'empty.npy', np.zeros((0, 32, 32, 3), np.uint8))
  np.save(tmp_path / 'floats.npy', np.linspace(-5, 5, 2 * 32 * 32 * 3).reshape(2, 32, 32, 3))
  for images, out, expected in (
    ('x.npy', 'f.npy', 'cannot be read'), ('empty.npy', 'f.npy', 'has no images'),
    ('missing.npy', 'f.npy', 'no such folder or file'), ('floats.npy', 'f.npy', 'floats are read from 0 to 1'),
    ('x.npy', 'f.txt', 'must end in .npz, .npy, .csv'), ('x.npy', 'no/f.npy', 'does not exist'),
  ):  # fmt: skip
    argv = ('embed', f'--workdir={run}', f'--data={tmp_path / images}', f'--out={tmp_path / out}')
    assert expected in fails(capsys, *argv)


def test_export_and_load(run, exported, tmp_path, capsys):
  """Breaks if an exported encoder differs from that of the run, or an existing export is
  overwritten.
  """
  a, b = load_encoder(run), load_encoder(exported)
  assert a.digest() == b.digest() and b.architecture == a.architecture
  assert b.provenance['step'] == 4 and b.provenance['config']['temperature'] == 0.2
  metadata = json.loads((exported / 'encoder.json').read_text())
  assert metadata['preprocessing']['size'] == [32, 32]
  assert 'exists already' in fails(capsys, 'export', f'--workdir={run}', f'--out={exported}')
  with pytest.raises(ConfigError, match='neither'):
    load_encoder(tmp_path)


def test_evaluations_override_only_data_fields(run, capsys):
  """Breaks if an evaluation accepts fields that are fixed by the run, and reports results for a
  recipe that was not trained.
  """
  assert 'only data.*' in fails(capsys, 'knn', f'--workdir={run}', '--config.temperature=1')


@pytest.mark.parametrize(
  'body, expected',
  [
    ('import nowhere', "fails: ModuleNotFoundError: No module named 'nowhere'"),
    ('x = 1', 'has no function get_config()'),
    ('def get_config():\n  c = built_in()\n  del c.seed\n  return c', "lacks the field 'seed'"),
    ('def get_config():\n  c = built_in()\n  c.momentum = None\n  return c', 'is not a number'),
  ],
)
def test_an_invalid_recipe_is_a_one_line_error(capsys, tmp_path, body, expected):
  """Breaks if an error in a user's own recipe gives a traceback."""
  path = tmp_path / 'mine.py'
  path.write_text(
    'from simclr_jax import config\n\ndef built_in():\n'
    "  c = config.load('simclr_digits')\n  c.unlock()\n  return c\n\n" + body
  )
  assert expected in fails(capsys, 'pretrain', f'--config={path}', f'--workdir={tmp_path / "run"}')


@pytest.mark.slow
def test_without_a_test_split(capsys, tmp_path):
  """Breaks if a data set without a test split, labelled or not, cannot be pretrained on, evaluated
  or reported.
  """
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (40, 24, 32, 3), dtype=np.uint8)  # not square
  for name, labels in (('none', None), ('some', np.arange(40) % 4)):
    folder = tmp_path / name
    folder.mkdir()
    np.savez(folder / 'train.npz', images=images, **({} if labels is None else {'labels': labels}))
    settings = {
      **SMALL,
      'steps': '1',
      'data.source': 'arrays',
      'data.dir': folder,
      'data.num_classes': '4',
    }
    fields = [f'--config.{k}={v}' for k, v in settings.items()]
    run = folder / 'a run'
    assert cli.main(['pretrain', '--config=simclr_digits', f'--workdir={run}', *fields]) == 0
    assert cli.main(['report', f'--workdir={run}']) == 0
    expected = 'needs labels' if labels is None else 'holds neither test.npz nor test_images.npy'
    if labels is None:
      np.savez(folder / 'test.npz', images=images)
    assert expected in fails(capsys, 'knn', f'--workdir={run}')


def test_built_in_recipes_load():
  """Breaks if a built-in recipe fails its own checks or has no description."""
  assert set(config.names()) >= {'simclr_digits', 'simclr_cifar10'}
  for name in config.names():
    assert config.load(name).method
    assert len(config.description(name)) > 20
  v2 = config.load('simclr_cifar10:v2')
  assert v2.model.head_layers == 3 and v2.augment.view1 == 'simclr_cifar10_v2'
