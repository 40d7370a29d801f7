"""Convolutions and dense layers that compute in bfloat16 and whose kernels have float32 gradients.

With automatic differentiation, the gradient of a kernel that was rounded to bfloat16 is bfloat16, too, and if the batch
is split over devices, bfloat16 numbers are summed over the devices. In these layers, the product that computes the
gradient accumulates in float32 and is not rounded before that sum (except for convolutions on GPUs). In float32, both
layers equal those of `flax.linen`, including the names of their parameters.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from simclr_jax.models import by_parts


class Conv(nn.Module):
  """A convolution with a square kernel and zero padding by about half of its size.

  Attributes:
    features: number of output channels.
    size, stride: size and stride of the kernel in pixels.
    use_bias: whether a bias is added.
    kernel_init: initialiser of the kernel, float32 `[size, size, channels, features]`.
    dtype: dtype of the input and of the product; kernel and bias are float32.
    padding: 'symmetric': the same for every size of the images, as in PyTorch and in SimCLR; 'same': as little as
      possible, which with a stride depends on the size of the images, as in TensorFlow and Haiku.
  """

  features: int
  size: int
  stride: int = 1
  use_bias: bool = False
  kernel_init: Any = nn.initializers.lecun_normal()
  dtype: Any = jnp.float32
  padding: str = 'symmetric'

  @nn.compact
  def __call__(self, x: by_parts.Array) -> by_parts.Array:
    """`x` `[n, height, width, channels]` -> `[n, height / stride, width / stride, features]`, rounded up."""
    shape = (self.size, self.size, x.shape[-1], self.features)
    kernel = self.param('kernel', self.kernel_init, shape, jnp.float32)

    def conv(x, kernel):
      return _conv(x.astype(self.dtype), kernel, self.stride, self.padding)

    return _with_bias(self, by_parts.apply(conv, x, kernel), nn.initializers.zeros)


class Dense(nn.Module):
  """A matrix product.

  Attributes:
    features: size of the output.
    use_bias: whether a bias is added.
    kernel_init, bias_init: initialisers of the kernel `[d, features]` and the bias, both float32.
    dtype: dtype of the input and of the product.
  """

  features: int
  use_bias: bool = True
  kernel_init: Any = nn.initializers.lecun_normal()
  bias_init: Any = nn.initializers.zeros
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`x` `[n, d]` -> `[n, features]`."""
    kernel = self.param('kernel', self.kernel_init, (x.shape[-1], self.features), jnp.float32)
    return _with_bias(self, _dot(x.astype(self.dtype), kernel), self.bias_init)


def _with_bias(layer, y, init):
  if not layer.use_bias:
    return y
  bias = layer.param('bias', init, (layer.features,), jnp.float32)

  def add(y, bias):  # in float32, so that the gradient is summed in float32
    return (y.astype(jnp.float32) + bias).astype(y.dtype)

  return by_parts.apply(add, y, bias)


def _pads(padding, size, stride, shape):
  """(before, after) for height and width of images `[n, height, width, c]`; the other arguments as for `Conv`."""
  if padding == 'same':
    return lax.padtype_to_pads(shape[1:3], (size, size), (stride, stride), 'SAME')
  low = (size - 1) // 2
  return [(low, size - 1 - low)] * 2


def _rounded_conv(x, kernel, stride, padding):
  return lax.conv_general_dilated(
    x,
    kernel.astype(x.dtype),
    (stride, stride),
    _pads(padding, len(kernel), stride, x.shape),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x: jax.Array, kernel: jax.Array, stride: int, padding: str) -> jax.Array:
  """A convolution in the dtype of x; the gradient of the kernel is float32."""
  return _rounded_conv(x, kernel, stride, padding)


def _conv_forward(x, kernel, stride, padding):
  return _conv(x, kernel, stride, padding), (x, kernel)


def _conv_backward(stride, padding, saved, dy):
  x, kernel = saved
  (dx,) = jax.linear_transpose(lambda x: _rounded_conv(x, kernel, stride, padding), x)(dy)

  def rounded(x, dy):
    shape = jax.ShapeDtypeStruct(kernel.shape, x.dtype)
    (dkernel,) = jax.linear_transpose(lambda k: _rounded_conv(x, k, stride, padding), shape)(dy)
    # In the layout of the parameter, so that the optimizer copies nothing.
    return with_layout_constraint(dkernel.astype(jnp.float32), Layout((0, 1, 2, 3)))

  exact = partial(kernel_gradient, size=len(kernel), stride=stride, padding=padding)
  # cuDNN has no convolution of bfloat16 numbers with a float32 result.
  return dx, lax.platform_dependent(x, dy, cuda=rounded, rocm=rounded, default=exact)


_conv.defvjp(_conv_forward, _conv_backward)


def kernel_gradient(
  x: jax.Array, dy: jax.Array, size: int, stride: int, padding: str = 'symmetric'
) -> jax.Array:
  """The gradient of the kernel of a convolution: a convolution of x with dy, in which the batch axis is contracted.

  Args:
    x: input, `[n, height, width, c]`.
    dy: gradient of the output, `[n, height / stride, width / stride, features]`, in the dtype of x.
    size, stride: size and stride of the kernel in pixels.
    padding: as for `Conv`.

  Returns:
    float32 `[size, size, c, features]`.
  """
  lows = [low for low, _ in _pads(padding, size, stride, x.shape)]
  ends = [
    (outputs - 1) * stride + size - low - inputs
    for low, inputs, outputs in zip(lows, x.shape[1:3], dy.shape[1:3], strict=True)
  ]
  return lax.conv_general_dilated(
    x,
    dy,
    (1, 1),
    list(zip(lows, ends, strict=True)),
    rhs_dilation=(stride, stride),
    dimension_numbers=('CHWN', 'IHWO', 'HWNC'),
    preferred_element_type=jnp.float32,
  )


@jax.custom_vjp
def _dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """A matrix product in the dtype of x; the gradient of the kernel is float32."""
  return x @ kernel.astype(x.dtype)


def _dot_forward(x, kernel):
  return _dot(x, kernel), (x, kernel)


def _dot_backward(saved, dy):
  x, kernel = saved
  dkernel = jnp.einsum('nc,nd->cd', x, dy, preferred_element_type=jnp.float32)
  return dy @ kernel.astype(dy.dtype).T, dkernel


_dot.defvjp(_dot_forward, _dot_backward)


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
  """ReLU, whose backward pass reads the output instead of x, which then need not be kept or computed again."""
  return jnp.maximum(x, 0)


def _relu_forward(x):
  y = relu(x)
  return y, y


def _relu_backward(y, dy):
  y = lax.optimization_barrier(y)  # otherwise the compiler for GPUs computes it again
  return (jnp.where(y > 0, dy, jnp.zeros_like(dy)),)


relu.defvjp(_relu_forward, _relu_backward)
