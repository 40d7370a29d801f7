"""The embeddings of a run in its report: maps, kNN, nearest neighbours and duplicates."""

import concurrent.futures
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import encoder as encoders, losses
from simclr_jax.data import Dataset, pixels
from simclr_jax.data.dataset import choose
from simclr_jax.encoder import Encoder
from simclr_jax.evaluate import knn, results
from simclr_jax.report import figures
from simclr_jax.report.evaluations import printable, result_table
from simclr_jax.report.markup import details, figure, text

IMAGES = 1000  # that are embedded
K = 20  # neighbours that vote in the kNN among them
QUERIES, NEIGHBOURS = 6, 8
SHOWN = 20  # duplicates that are named
SIDE = 32  # of raw pixels


@dataclasses.dataclass(frozen=True)
class Embedded:
  """n images and their features.

  Attributes:
    views: the images as the encoder gets them, float32 `[n, side, side, c]` in [0, 1].
    features: 'raw pixels', 'untrained' and 'pretrained' -> float32 `[n, d]`.
    labels: int32 `[n]`; None: not all are known.
    names: of the C classes; empty without labels.
    files: names of the images, or their numbers.
  """

  views: np.ndarray
  features: dict[str, np.ndarray]
  labels: np.ndarray | None
  names: list[str]
  files: list[str]


def embed(encoder: Encoder, untrained: Encoder, images: Dataset) -> Embedded:
  """Decodes a sample of the images once, and computes their features."""
  sample = images.sample(IMAGES)
  architecture = encoder.architecture
  views, every_label = encoders.preprocess(
    sample, architecture['eval_view'], architecture['image_size']
  )
  side = min(SIDE, views.shape[1])
  small = np.asarray(
    jax.image.resize(views, (len(views), side, side, views.shape[-1]), 'linear', antialias=True)
  )
  features = {
    'raw pixels': small.reshape(len(small), -1),
    'untrained': untrained.forward(views),
    'pretrained': encoder.forward(views),
  }
  labels = every_label if sample.labelled else None
  names = [] if labels is None else printable(sample.class_names, int(labels.max()) + 1)
  files = list(sample.names() or map(str, choose(IMAGES, len(images))))
  return Embedded(views, features, labels, names, files)


def section(encoder: Encoder, untrained: Encoder, images: Dataset, split: str) -> Iterator[str]:
  """Maps of the embeddings before and after training, kNN, duplicates, and nearest neighbours.

  Args:
    encoder: of the run.
    untrained: the same network with random weights.
    images: to embed; nothing is returned if there are too few.
    split: of the images, such as 'test'.
  """
  if len(images) <= NEIGHBOURS:
    return
  embedded = embed(encoder, untrained, images)
  labels, names = embedded.labels, embedded.names
  count = len(embedded.views)
  yield f'<h2>Learned embeddings</h2><p>t-SNE of the features of {count:,} {split} images.</p>'
  yield f'<p>{"".join(_legend(labels, names))}</p><div class="row">'
  kinds = {'untrained': 'Untrained encoder', 'pretrained': 'Pretrained encoder'}
  with concurrent.futures.ThreadPoolExecutor(len(kinds)) as pool:
    maps = list(pool.map(figures.tsne, [embedded.features[kind] for kind in kinds]))
  for xy, caption in zip(maps, kinds.values()):
    yield figure(figures.embedding_map(xy, labels, names), 'Embedding map', '', caption)
  yield '</div>'
  if labels is not None and len(np.unique(labels)) > 1:
    yield result_table(_knn(embedded, split))
  copies = duplicates(embedded.features['raw pixels'])
  yield from _named(copies, embedded.files)
  other = '; other classes in red' if names else ''
  yield (
    f'<p>Query image (framed) and its {NEIGHBOURS} nearest neighbours by cosine similarity{other}.</p>'
  )
  yield from _neighbours(embedded, copies)


def _legend(labels, names):
  if labels is None:
    return
  colors = figures.class_colors(labels)
  yield from (_dot(color, names[c]) for c, color in colors.items())
  if len(colors) < len(np.unique(labels)):
    yield _dot(figures.OTHERS, 'others')


def _dot(color: str, name: str) -> str:
  return (
    f'<span class="name"><span class="dot" style="background:{color}"></span>{text(name)}</span>'
  )


def _knn(embedded: Embedded, split: str) -> results.Result:
  """Leave-one-out kNN: the class of each image by the other images."""
  labels = embedded.labels
  assert labels is not None
  k = min(K, len(labels) - 1)
  rows = {
    name: [[100 * knn.leave_one_out(h, labels, k), None]] for name, h in embedded.features.items()
  }
  result = {
    'title': 'kNN among these images',
    'columns': [f'kNN, k = {k}, top-1 %'],
    'rows': rows,
  }
  note = f'each of these {split} images is classified by the other ones'
  return results.assess({**result, 'notes': {'leave-one-out': note}}, labels)


def duplicates(small: np.ndarray) -> np.ndarray:
  """For each image, the number of the first image with the same pixels, int `[n]`.

  Args:
    small: the images in few pixels, in [0, 1], `[n, d]`. They are compared in 8 bits.
  """
  rows = np.round(255 * small).astype(np.uint8)
  known: dict[bytes, int] = {}
  return np.array([known.setdefault(row.tobytes(), i) for i, row in enumerate(rows)])


def _named(copies, files) -> Iterator[str]:
  """The images that look the same as an earlier one."""
  later = np.flatnonzero(copies != np.arange(len(copies)))
  if not len(later):
    return
  lines = [f'{files[i]} = {files[copies[i]]}' for i in later[:SHOWN]]
  lines += [f'and {len(later) - SHOWN:,} more'] if len(later) > SHOWN else []
  content = ''.join(f'<li>{text(line)}</li>' for line in lines)
  number = f'{len(later):,} of these images look' if len(later) > 1 else '1 of these images looks'
  yield details(
    f'Duplicates: {number} the same as an earlier one, in {SIDE} x {SIDE} pixels or fewer',
    f'<ul>{content}</ul>',
  )


def _neighbours(embedded: Embedded, copies: np.ndarray) -> Iterator[str]:
  """One strip per query: the image and its nearest neighbours, with the names of their classes."""
  labels, names = embedded.labels, embedded.names
  z = np.asarray(losses.l2_normalize(jnp.asarray(embedded.features['pretrained'])))
  queries = np.linspace(0, len(z) - 1, QUERIES).astype(int)
  similarity = z[queries] @ z.T
  similarity[np.arange(len(queries)), queries] = -2  # not the image itself
  nearest = np.argsort(-similarity, axis=1)[:, :NEIGHBOURS]
  for query, neighbours in zip(queries, nearest):
    yield '<div class="strip">'
    for i in (query, *neighbours):
      name = '' if labels is None else text(names[labels[i]])
      if labels is not None and labels[i] != labels[query]:
        name = f'<span class="other">{name}</span>'
      if i != query and copies[i] == copies[query]:
        name += '<br>duplicate' if name else 'duplicate'
      alt = 'Query' if i == query else 'Neighbour'
      yield figure(figures.picture(pixels.to_rgb(embedded.views[i])), alt, 'pixels', name)
    yield '</div>'
