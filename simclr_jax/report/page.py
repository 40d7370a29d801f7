"""The HTML report of a run: one self-contained page."""

import concurrent.futures
import json
import pathlib
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from simclr_jax import (
  config as recipes,
  data,
  diagnostics,
  encoder as encoders,
  methods,
  optim,
  run_config,
  runs,
  sharding,
)
from simclr_jax.data import Dataset, augment, loader, pixels
from simclr_jax.errors import ConfigError
from simclr_jax.report import embeddings, evaluations, figures
from simclr_jax.report.markup import banner, details, figure, row, table, text
from simclr_jax.runtime import files, goodput, logs, paths

MAX_RECORDS = 4_000  # of steps, that are read for the curves
VIEW_SIDE = 96  # smallest side of a view on the page, in pixels

START = (
  '<!doctype html><html lang="en"><meta charset="utf-8">'
  '<meta name="viewport" content="width=device-width"><title>simclr_jax: '
)  # of a report; older ones start in the same way

Records = Sequence[Mapping[str, Any]]  # of metrics.jsonl

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 1040px; margin: 2rem auto;
       padding: 0 1rem }
h1 { margin-bottom: 0; overflow-wrap: anywhere } h2 { margin-top: 2.5rem; font-size: 1.2rem }
p.lead, figcaption, caption, p.context { color: #4b5563 } figcaption, caption { font-size: .9rem; text-align: left }
figcaption { contain: inline-size } .strip figcaption { font-size: .8rem; text-align: center }
img { max-width: 100%; display: block } figure { margin: 1rem 0 0; max-width: 100%; overflow-x: auto }
.pixels { image-rendering: pixelated }
.row { display: flex; flex-wrap: wrap; gap: 0 .8rem; align-items: flex-start }
.row table { margin-right: 2rem; margin-top: 1rem }
.strip { display: flex; flex-wrap: wrap; gap: .4rem; margin-top: 1rem }
.strip figure { margin: 0; width: 4.6rem; overflow-wrap: anywhere; line-height: 1.2 } .strip img { width: 100% }
.strip figure:first-child img { box-sizing: border-box; border: 3px solid #1d4ed8 }
.other { color: #b91c1c; font-weight: bold }
.dot { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .3em }
.name { display: inline-block; margin-right: 1em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto;
        max-width: 100% }
td, th { padding: .25rem .9rem .25rem 0; text-align: left; border-bottom: 1px solid #e5e7eb }
td.n, th.n { text-align: right } td.n { white-space: nowrap }
p.context, p.note { font-size: .9rem; margin: .4rem 0 0; max-width: 34rem } .result { margin: 1rem 2rem 0 0 }
.result table { margin: 0 } .row .result { max-width: 100% }
p.banner { background: #fef3c7; border-left: 4px solid #b45309; padding: .6rem .8rem; overflow-wrap: anywhere }
details { margin-top: 1rem } summary { cursor: pointer } li { overflow-wrap: anywhere }
pre { background: #f3f4f6; padding: .8rem; overflow-x: auto; font-size: .85rem }
@media (max-width: 480px) {
  table { font-size: .85rem } td, th { padding-right: .5rem } .strip figure { width: 4rem } .strip figcaption { font-size: .68rem }
}
"""


def write(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  out: pathlib.Path,
  images: tuple[Dataset, Dataset | None] | None = None,
) -> list[str]:
  """Writes the report of a run. Without the images of the run, the page has no views and no embeddings.

  Args:
    workdir: of the run.
    config: its recipe.
    out: the HTML file.
    images: the training and test images, if they are loaded already.

  Returns:
    Sentences about what is missing, which are on the page, too.

  Raises:
    ConfigError: `out` cannot be written or is no report, or the run has no checkpoint yet.
    CheckpointError: no checkpoint of the run can be read.
  """
  check_out(out)
  encoder = runs.load_encoder(workdir)
  step, lead = _training(encoder, config)
  name, missing = paths.absolute(workdir).name, _unfinished(workdir, config, step)
  pictures, class_names = _pictures(encoder, config, images, missing)
  records = logs.read(workdir, MAX_RECORDS)
  metrics = [r for r in records if 'event' not in r]
  network = config.model.encoder or f'ResNet-{config.model.depth}'
  parts = [
    f'<h1>{text(name)}</h1>',
    f'<p class="lead">{text(network)}, {text(lead)}</p>',
    *map(banner, missing),
    *evaluations.sections(workdir, step, class_names),
    '<h2>Training</h2>',
    row(figures.curves(metrics)) if metrics else '<p>No metrics yet.</p>',
    *_thinned(metrics),
    *_speed(metrics),
    *_goodput(records),
    '<h2>Diagnostics</h2>',
    *_diagnostics(config, metrics),
    *pictures,
    '<h2>Configuration</h2>',
    *_configuration(workdir),
  ]
  head = f'{START}{text(name)}</title><style>{STYLE}</style>'
  files.write_text(out, '\n'.join([head, *parts, '</html>', '']))
  return missing


def check_out(out: pathlib.Path) -> None:
  """Refuses to write a report over anything else, and to a folder that does not exist."""
  if out.suffix.lower() not in ('.html', '.htm'):
    raise ConfigError(f'--out={out}: the name of a report ends with .html')
  if not out.parent.is_dir():
    raise ConfigError(f'--out={out}: the folder {out.parent} does not exist')
  try:
    with files.open_to_read(out) as file:
      start = file.read(len(START))
  except FileNotFoundError:
    return
  if start and start != START.encode():
    raise ConfigError(f'--out={out} exists and is no report of this program: choose another name')


def _pictures(encoder, config, images, missing) -> tuple[list[str], Sequence[str]]:
  """The sections that show images, and the names of the classes; without the images, `missing` gets a sentence."""
  # Compiling takes most of the time, on one core: the other one reads and embeds the images.
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    untrained = pool.submit(encoders.untrained, encoder.architecture)
    try:
      train, test = images or _images(config)
      grid = pool.submit(_view_grid, train, config)
      shown, split = (train, 'training') if test is None else (test, 'test')
      sections = list(embeddings.section(encoder, untrained.result(), shown, split))
      caption = 'Left: training images. Right: augmented views of each, in two epochs.'
      views = figure(grid.result(), 'Augmented views', 'pixels', caption)
    except ConfigError as error:
      missing.append(f'No augmented views and no embeddings: {error}')
      return [], ()
  return [*sections, '<h2>Augmentations</h2>', views], shown.class_names


def _images(config):
  """The training and test images of a recipe."""
  if data.in_memory(config.data):
    raise ConfigError('the images were in memory, and the run does not store them')
  return data.load_splits(config.data)


def _training(encoder, config) -> tuple[int, str]:
  """The step of the encoder, and how it was trained, in a few words."""
  about = encoder.provenance
  if 'weights' in about:
    return 0, f'weights of {pathlib.Path(about["weights"]).name} {about.get("network", "")}'.strip()
  total = optim.train_steps(config, config.data.examples)
  return about['step'], (
    f'{config.method}, {config.data.examples:,} training images, step {about["step"]:,} of {total:,}'
  )


def _unfinished(workdir, config, step) -> list[str]:
  """A sentence if the run has not reached its last step."""
  if not run_config.is_run(workdir):  # an exported encoder
    return []
  total = optim.train_steps(config, config.data.examples)
  if step >= total:
    return []
  resume = f'simclr-jax pretrain --workdir={shlex.quote(str(workdir))}'
  if data.in_memory(config.data):
    resume = f'simclr_jax.pretrain(images, ..., workdir={str(workdir)!r})'
  return [
    f'Unfinished: curves and embeddings are of step {step:,} of {total:,} ({step / total:.0%}). If the training does not '
    f'run any more, resume it: {resume}'
  ]


# Training.


def _thinned(metrics: Records) -> Iterator[str]:
  """A sentence if there are more records than the curves show."""
  if len(metrics) > figures.POINTS:
    yield (
      f'<p>The curves show means of groups of steps, at most {figures.POINTS:,} for each metric, and of long runs only '
      f'about {MAX_RECORDS:,} steps; metrics.jsonl has all values.</p>'
    )


def _speed(metrics: Records) -> Iterator[str]:
  """Images per second, and the bottleneck. The median is not affected by compilation and pauses."""
  speeds = [r['examples_per_second'] for r in metrics[1:] if r.get('examples_per_second')]
  if speeds and any(r.get('data_wait') is not None for r in metrics[1:]):
    share = diagnostics.data_wait(metrics)
    bottleneck = 'reading and decoding on the host' if share > 0.1 else 'computation on the device'
    yield (
      f'<p>{statistics.median(speeds):,.0f} images/s (median, without compilation); input-bound {share:.1%} of the time. '
      f'Bottleneck: {bottleneck}.</p>'
    )


def _goodput(records: Sequence[dict[str, Any]]) -> Iterator[str]:
  """The wall-clock time of all attempts by purpose."""
  account = goodput.account(list(records))
  if not account:
    return
  kinds = {
    'steps': 'training steps',
    'redone': f'{account["steps_redone"]:,} recomputed steps',
    'start': 'start-up and compilation',
    'data': 'waiting for data',
    'checkpoint': 'waiting for checkpoints',
    'evaluation': 'evaluation',
    'gaps': 'between attempts',
  }
  rows = {
    label: [f'{account[kind]:,.1f} s', f'{account[kind] / max(account["wall"], 1e-9):.1%}']
    for kind, label in kinds.items()
    if account[kind] > 0
  }
  jumps = account['jumps']
  if jumps:
    yield (
      f'<p>The clock jumped{f" {jumps:,} times" if jumps > 1 else ""}: the time that passed meanwhile is not known and '
      'not counted.</p>'
    )
  attempts = account['attempts']
  plural = 's' if attempts > 1 else ''
  yield table(
    [], rows, f'Goodput {account["goodput"]:.1%}: wall-clock time of {attempts} attempt{plural}'
  )


def _diagnostics(config: ml_collections.ConfigDict, metrics: Records) -> Iterator[str]:
  """Problems, curves of the diagnostic metrics, and the last value of every metric with its meaning."""
  problems = diagnostics.findings(config, metrics).values()
  for sentence in problems or ['No problems detected.']:
    yield f'<p>{text(sentence)}</p>'
  if not metrics:
    return
  yield row(figures.diagnostic_curves(metrics))
  last = {name: _last(metrics, name) for name in diagnostics.GLOSSARY}
  rows = ''.join(
    f'<tr><td>{name}</td><td class="n">{last[name]:.4g}</td><td>{text(meaning)}</td></tr>'
    for name, meaning in diagnostics.GLOSSARY.items()
    if last[name] is not None
  )
  yield f'<table><caption>Last values</caption>{rows}</table>'


def _last(metrics: Records, name: str) -> float | None:
  """The last value of a metric; None if there is none."""
  return next((r[name] for r in reversed(metrics) if r.get(name) is not None), None)


def _view_grid(train: Dataset, config: ml_collections.ConfigDict) -> str:
  """Rows of one image, its views in one epoch and its views in the next; a data URI."""
  few = train.sample(6)
  n = len(few)
  pipelines = augment.pipelines(config.augment, methods.build(config).views)
  mesh = sharding.make_mesh(jax.local_devices()[:1])
  batches = loader.for_training(few, config.seed, n, pipelines, config.image_size, mesh)

  @jax.jit
  def draw(constants, rows):
    b = loader.with_images(constants, rows)
    return augment.views(
      b['images'], b['epoch'], b['position'], pipelines, config.seed, config.image_size,
      b.get('crops'),
    )  # fmt: skip

  columns = [
    encoders.preprocess(few, recipes.architecture(config)['eval_view'], config.image_size)[0]
  ]
  for step in range(2):  # a step is an epoch, as the batch has all images
    batch = batches(step)
    views = np.asarray(draw(batches.constants, batch))[np.argsort(batch['index'])]
    columns += list(views.swapaxes(0, 1))
  batches.close()
  scale = max(round(VIEW_SIDE / config.image_size), 1)
  rows = [[pixels.to_rgb(image) for image in images] for images in zip(*columns)]
  return figures.image_grid(rows, scale, gap_after=0)


def _configuration(workdir: pathlib.Path) -> Iterator[str]:
  """The command; folded, the versions of the packages and the recipe."""
  about = run_config.record(workdir)
  yield f'<pre>{text(about.get("command") or "from Python")}</pre>'
  recipe = '\n'.join(map(text, json.dumps(about['config'], indent=1).splitlines()))
  yield details('Recipe', f'<pre>{recipe}</pre>')
  yield details('Versions', table([], {k: [v] for k, v in about.get('versions', {}).items()}))
