"""Reads encoders from the files of weights of other programs."""

import dataclasses
from typing import Any

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Network:
  """A network that a file of weights contains.

  Attributes:
    name: how the user selects it, such as 'encoder_q'; '' if the file has one network only.
    model: the `model.*` fields that the file determines, such as `{'depth': 50, 'variant': 'torchvision'}`.
    encoder: flax variables of the encoder: `params` and `batch_stats`.
    head: flax variables of the projection head, which `model` describes (`head`, `head_layers`, ...); None without one.
    classifier: `{'kernel': [d, classes], 'bias': [classes]}`; None without one.
    normalize: `model.normalize` that belongs to the weights; None if the file does not say.
    notes: sentences about what was assumed and what was left out.
  """

  name: str
  model: dict[str, Any]
  encoder: PyTree
  head: PyTree | None = None
  classifier: PyTree | None = None
  normalize: str | None = None
  notes: tuple[str, ...] = ()
