"""Writes docs/claims.md and its figures, and the results on the pages of the methods."""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence

import matplotlib
import matplotlib.figure
import numpy as np

from benchmarks.claims.plan import Results, chosen, jobs
from benchmarks.claims.statistics import (
  CONFIRMED,
  CONTRADICTED,
  TOO_FEW,
  UNDECIDED,
  Claim,
  Outcome,
  outcome,
)
from benchmarks.claims.trainings import UNTRAINED, Training, fields_at

DOCS = pathlib.Path(__file__).parents[2] / 'docs'
AGAINST_TORCH = pathlib.Path(__file__).parents[1] / 'against_torch.json'
NAMES = {
  'linear': 'linear %',
  'knn': 'kNN %',
  'linear_z': 'linear on z %',
  'contrastive_acc': 'contrastive accuracy %',
  'top1': 'top-1 %',
  'seconds': 'CPU s per step',
  'mib': 'MiB',
}
FACTORS = {'contrastive_acc': 100}  # of metrics that are fractions
COLORS = {CONFIRMED: '#059669', CONTRADICTED: '#dc2626', UNDECIDED: '#6b7280', TOO_FEW: '#9ca3af'}
GENERATED = '<!-- written by `python -m benchmarks.claims`; edit benchmarks/claims/page.py -->'
INTRODUCTION = """# Claims of the papers

Does this code learn what the papers say? Each claim of SimCLR, MoCo and SimCLR v2 is a file in `benchmarks/claims/`, with
trainings that are compared, and predictions. The trainings are small, so that anyone can run all of them on a CPU:

```bash
make claims DATA=TFDS_DIR            # TFDS_DIR contains CIFAR-10; the same command resumes
make claims DATA=TFDS_DIR SIZE=full  # ResNet-18, 200 epochs, on a GPU
```

{setup}

A prediction is **confirmed** if the 95 % interval of its difference is above 0, **contradicted** if it is below 0, and
otherwise **not distinguishable at this size**. Intervals are of Welch's t-test over seeds; a seed sets initial weights,
order, augmentation and labels. They do not measure how results vary with other test images. With one seed there is no
interval and no verdict. About one of forty intervals is wrong on either side by chance: the page has {count} predictions.
A contradiction here does not refute a paper: these networks are trained for minutes, those of the papers for days.

{progress}

![All differences with their 95 % intervals](claims/overview.svg)

"""
SETUP = {
  'small': """All numbers below are of a lossily (JPEG) compressed copy of CIFAR-10: 10,000 training images and 2,000
test images, of which chance is 10 %. Unless a row says otherwise, the network is a ResNet-8 with a quarter of the width
(90,000 parameters, 128 features), trained for {epochs} epochs with batch size 128 on one core. Linear accuracy is that of
an L2-regularised logistic regression on standardised features of all labelled training images, kNN accuracy has k = 200
and temperature 0.1. Learning rates were chosen on 2,000 other training images.""",
  'full': """The network is a ResNet-18 with the CIFAR stem, trained for {epochs} epochs on 45,000 images of CIFAR-10, and
evaluated on the 10,000 test images; chance is 10 %. Temperatures and learning rates were chosen on the other 5,000 training
images.""",
}


def write(claims: Mapping[str, Claim], results: Results, size: str) -> None:
  """Writes docs/claims.md (claims_full.md for the size full) and figures to docs/claims/.

  Args:
    claims: by name.
    results: of trainings of this size.
    size: a key of `trainings.SIZES`.
  """
  folder = DOCS / ('claims' if size == 'small' else f'claims_{size}')
  folder.mkdir(exist_ok=True)
  matplotlib.rcParams['svg.hashsalt'] = 'claims'  # equal results give equal files
  sections, outcomes = [], {}
  for name, claim in claims.items():
    outcomes[name] = _outcomes(claim, results)
    sections.append(_section(folder.name, name, claim, results, outcomes[name]))
    if not claim.statistic:
      _draw(claim, results, folder / f'{name}.svg')
  _overview(claims, outcomes, folder / 'overview.svg')
  if size == 'small':
    for path in (DOCS / 'methods').glob('*.md'):
      path.write_text(_with_results(path.read_text(), claims, outcomes))
  seconds = sum(float(r['cpu_seconds']) for r in results.values())
  wanted = jobs(claims, results, 5)
  done = sum((t.key, s) in results for t, s in wanted)
  text = INTRODUCTION.format(
    setup=SETUP[size].format(epochs=fields_at(size, UNTRAINED)['epochs']),
    count=sum(len(c.expected) for c in claims.values()),
    progress=f'{done} of {len(wanted)} trainings are done, {seconds / 3600:.1f} hours of one core. '
    + _sentence([o for group in outcomes.values() for o in group]),
  )
  if size == 'small':
    sections.append(_independent(json.loads(AGAINST_TORCH.read_text())))
  text = text.replace('](claims/', f']({folder.name}/')
  page = DOCS / f'{folder.name}.md'
  page.write_text('\n'.join([GENERATED, '', text + _summary(claims, outcomes), *sections]))
  print(f'wrote {page}')


def _values(claim, results) -> dict[str, dict[str, list[float]]]:
  """Setting -> metric -> a value per seed."""
  values = {}
  for name, setting in claim.settings.items():
    training = chosen(setting, results)
    if training:
      values[name] = _of(training, results)
  return values


def _of(training: Training, results: Results) -> dict[str, list[float]]:
  rows = [results[training.key, s]['metrics'] for s in range(99) if (training.key, s) in results]
  return {m: [FACTORS.get(m, 1) * row[m] for row in rows] for m in (rows[0] if rows else ())}


def _outcomes(claim, results) -> list[Outcome]:
  if claim.statistic:
    by_key = {key: {} for key, _ in results}
    for key in by_key:
      rows = [r['metrics'] for (k, _), r in results.items() if k == key]
      by_key[key] = {m: [row[m] for row in rows] for m in rows[0]}
    return claim.statistic(by_key)
  values = _values(claim, results)
  return [o for o in (outcome(e, values) for e in claim.expected) if o]


def _sentence(outcomes: Sequence[Outcome]) -> str:
  counts = {v: sum(o.verdict == v for o in outcomes) for v in COLORS}
  return f'Of {len(outcomes)} predictions with results, ' + ', '.join(
    f'{count} {verdict if verdict != TOO_FEW else "have only one seed"}'
    for verdict, count in counts.items() if count
  ) + '.'  # fmt: skip


def _summary(claims, outcomes) -> str:
  head = '| claim | source | confirmed | not distinguishable | contradicted | one seed |\n|---|---|--:|--:|--:|--:|\n'
  lines = []
  for name, claim in claims.items():
    counts = [
      sum(o.verdict == v for o in outcomes[name])
      for v in (CONFIRMED, UNDECIDED, CONTRADICTED, TOO_FEW)
    ]
    cells = [f'[{claim.title}](#{_anchor(claim.title)})', claim.source, *(c or '' for c in counts)]
    lines.append(f'| {" | ".join(map(str, cells))} |')
  return head + '\n'.join(lines) + '\n'


def _independent(saved) -> str:
  """The comparison with an independent training, from the results of benchmarks/against_torch.py."""
  seeds = len(next(iter(next(iter(saved['comparison'].values())).values()))['torch'])
  lines = [
    '\n## Against an independent training\n',
    'SimCLR and MoCo, written a second time in plain PyTorch from the text of the papers: same network and recipe, other '
    'initial weights, order and augmentation draws. Mean ± standard deviation over '
    f'{seeds} seeds, difference with the 95 % interval '
    "of Welch's t-test, on the images above.\n",
    '| | simclr_jax | PyTorch | difference [95 % interval] | verdict |\n|---|--:|--:|--:|---|',
  ]
  for method, metrics in saved['comparison'].items():
    for metric, r in metrics.items():
      ours, theirs, digits = r['simclr_jax'], r['torch'], 1 if '%' in metric else 3
      low, high = r['interval']
      cells = [f'{np.mean(x):.{digits}f} ± {np.std(x, ddof=1):.{digits}f}' for x in (ours, theirs)]
      cells += [
        f'{r["difference"]:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]',
        r['verdict'],
      ]
      lines.append(f'| {method}, {metric} | {" | ".join(cells)} |')
  times = []
  for method, seconds in saved['seconds'].items():
    ratios = np.array(seconds['simclr_jax']) / np.array(seconds['torch'])
    times.append(f'{method} {np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})')
  lines += [
    '\n![Loss curves of both](claims/against_torch.svg)\n',
    f'Time of a step on one core, simclr_jax / PyTorch, augmentation included: {", ".join(times)}. Code: '
    '`benchmarks/against_torch.py`.',
  ]
  return '\n'.join(lines) + '\n'


RESULTS = re.compile(r'(<!-- begin results: (.*?) -->\n).*?(<!-- end results -->)', re.DOTALL)


def _with_results(text: str, claims, outcomes) -> str:
  """The page of a method with a table of the claims whose names start as its marker says."""

  def table(match):
    names = [n for n in claims if outcomes[n] and n.startswith(tuple(match[2].split()))]
    lines = [
      f'| [{claims[n].title}](../claims.md#{_anchor(claims[n].title)}) | {o.text} | {_difference(o)} | {o.verdict} |'
      for n in names for o in outcomes[n]
    ]  # fmt: skip
    head = (
      'Small trainings on a lossy copy of CIFAR-10, see [Claims](../claims.md): difference and 95 % interval.\n\n'
      '| claim | prediction | difference | verdict |\n|---|---|--:|---|\n'
    )
    body = head + '\n'.join(lines) + '\n' if lines else ''
    return match[1] + body + match[3]

  return RESULTS.sub(table, text)


def _anchor(title: str) -> str:
  """The anchor of a heading, as GitHub and MkDocs make it."""
  kept = ''.join(c for c in title.lower() if c.isalnum() or c in ' -_')
  return kept.replace(' ', '-')


def _section(folder, name, claim, results, outcomes) -> str:
  values = _values(claim, results)
  seconds = sum(
    float(results[t.key, s]['cpu_seconds'])
    for t, s in jobs({name: claim}, results, claim.seeds) if (t.key, s) in results
  )  # fmt: skip
  lines = [f'\n## {claim.title}\n', f'*{claim.source}.* {claim.text}\n']
  if claim.published:
    lines.append(f'Published: {claim.published}.\n')
  if outcomes:
    what = 'rank correlation' if claim.statistic else 'difference'
    lines += [f'| prediction | {what} [95 % interval] | seeds | verdict |', '|---|--:|--:|---|']
    lines += [_row(o) for o in outcomes]
    lines.append('')
  if not claim.statistic and any(values.values()):
    lines.append(f'![{claim.title}]({folder}/{name}.svg)\n')
    lines.append(f'| setting | {" | ".join(NAMES[m] for m in claim.metrics)} | seeds |')
    lines.append('|---' + '|--:' * (len(claim.metrics) + 1) + '|')
    for setting, by_metric in values.items():
      if by_metric:
        cells = [_mean(by_metric.get(m, ())) for m in claim.metrics]
        lines.append(
          f'| {_named(setting, claim, results)} | {" | ".join(cells)} | {len(next(iter(by_metric.values())))} |'
        )
    lines.append('')
  if claim.note:
    lines.append(claim.note + '\n')
  time = (
    f'{seconds / 60:.0f} minutes of one core, trainings that are shared with other claims included'
  )
  lines.append(f'Cost: {time}. Code: `benchmarks/claims/{name.replace(".", "/")}.py`.')
  return '\n'.join(lines)


def _row(o: Outcome) -> str:
  verdict = f'**{o.verdict}**' if o.verdict == CONFIRMED else o.verdict
  return f'| {o.text} | {_difference(o)} | {o.seeds} | {verdict} |'


def _difference(o: Outcome) -> str:
  digits = {'points': 1, 'MiB': 1, 's': 3}.get(o.unit, 2)
  unit = '' if o.unit == 'points' else f' {o.unit}'
  interval = '' if np.isinf(o.low) else f' [{o.low:+.{digits}f}, {o.high:+.{digits}f}]'
  return f'{o.value:+.{digits}f}{interval}{unit}'


def _named(setting, claim, results) -> str:
  """A setting with the value that was chosen, if there was a choice."""
  training = claim.settings[setting]
  if isinstance(training, Training):
    return setting
  candidates = [dict(candidate.fields) for candidate in training.candidates]
  best = dict(chosen(training, results).fields)
  varied = {name: v for name, v in best.items() if any(c.get(name) != v for c in candidates)}
  values = [
    f'{name}={v:.3g}' if isinstance(v, float) else f'{name}={v}' for name, v in varied.items()
  ]
  return f'{setting} ({", ".join(values) or "as in other claims"})'


def _mean(values) -> str:
  if not len(values):
    return ''
  digits = 1 if np.mean(values) >= 1 else 3
  mean = f'{np.mean(values):.{digits}f}'
  return f'{mean} ± {np.std(values, ddof=1):.{digits}f}' if len(values) > 1 else mean


def _figure(rows, width=7.5):
  figure = matplotlib.figure.Figure(figsize=(width, 0.55 + 0.27 * rows), layout='constrained')
  axes = figure.subplots()
  axes.spines[['top', 'right', 'left']].set_visible(False)
  axes.tick_params(axis='y', length=0)
  axes.grid(axis='x', color='#e5e7eb')
  axes.set_axisbelow(True)
  return figure, axes


def _draw(claim, results, path) -> None:
  """The first metric of the claim: a dot per seed, and a line at the mean."""
  metric = claim.metrics[0]
  rows = [(name, v[metric]) for name, v in _values(claim, results).items() if v.get(metric)]
  if not rows:
    return
  figure, axes = _figure(len(rows))
  for y, (_, values) in enumerate(rows):
    axes.plot(values, [y] * len(values), 'o', color='#2563eb', alpha=0.5, mew=0)
    axes.plot([np.mean(values)] * 2, [y - 0.3, y + 0.3], color='#1e3a8a', lw=2)
  axes.set_yticks(range(len(rows)), [name for name, _ in rows])
  axes.set_ylim(len(rows) - 0.5, -0.5)
  axes.set_xlabel(NAMES[metric])
  figure.savefig(path, metadata={'Date': None})


def _overview(claims, outcomes, path) -> None:
  """All differences in points, with their intervals, by claim."""
  rows = [
    (claims[name].title if not i else '', o)
    for name, group in outcomes.items() for i, o in enumerate(x for x in group if x.unit == 'points')
  ]  # fmt: skip
  if not rows:
    return
  figure, axes = _figure(len(rows) * 0.8, 9)
  for y, (title, o) in enumerate(rows):
    color, reach = COLORS[o.verdict], 0 if np.isinf(o.low) else o.high - o.value
    axes.errorbar(o.value, y, xerr=reach, fmt='o', color=color, ms=4, lw=1.5)
    if title and y:
      axes.axhline(y - 0.5, color='#e5e7eb', lw=0.8)
  for verdict, color in COLORS.items():
    if any(o.verdict == verdict for _, o in rows):
      axes.plot([], [], 'o', color=color, ms=4, label=verdict)
  axes.axvline(0, color='#111827', lw=0.8)
  axes.set_xscale('symlog', linthresh=5)
  ticks = (-50, -20, -10, -5, -2, 0, 2, 5, 10, 20, 50)
  axes.set_xticks(ticks, [f'{t:+d}' if t else '0' for t in ticks])
  axes.set_yticks(range(len(rows)), [_label(title, o.text) for title, o in rows], fontsize=7.5)
  axes.set_ylim(len(rows) - 0.5, -0.5)
  axes.set_xlabel('difference in points (linear up to 5, then logarithmic)')
  figure.legend(frameon=False, loc='outside upper right', ncols=4, fontsize=8)
  figure.savefig(path, metadata={'Date': None})


def _label(title, text) -> str:
  return f'{title}:  {text}' if title else text
