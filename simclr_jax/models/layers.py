"""Convolutions and dense layers that compute in bfloat16 and whose kernels have float32 gradients.

Automatic differentiation gives a kernel that was rounded to bfloat16 a bfloat16 gradient, and where the batch is
split over devices, their sum is one of bfloat16 numbers. Here the product that makes the gradient, which
accumulates in float32 anyway, is not rounded before the devices sum it. In float32 both layers are those of
`flax.linen`, parameters and their names too.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Padding = tuple[tuple[int, int], ...]


class Conv(nn.Module):
  """A convolution with a square kernel; images are padded by half of it.

  Attributes:
    features: channels of the output.
    size, stride: of the kernel, in pixels.
    use_bias: whether a bias is added.
    kernel_init: of the kernel `[size, size, channels, features]`, which is float32, as the bias is.
    dtype: of the product.
  """

  features: int
  size: int
  stride: int = 1
  use_bias: bool = False
  kernel_init: Any = nn.initializers.lecun_normal()
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`x` `[n, height, width, channels]` -> `[n, height / stride, width / stride, features]`."""
    shape = (self.size, self.size, x.shape[-1], self.features)
    kernel = self.param('kernel', self.kernel_init, shape, jnp.float32)
    low = (self.size - 1) // 2
    y = _conv(x.astype(self.dtype), kernel, self.stride, ((low, self.size - 1 - low),) * 2)
    return _with_bias(self, y, nn.initializers.zeros)


class Dense(nn.Module):
  """A matrix product.

  Attributes:
    features: of the output.
    use_bias: whether a bias is added.
    kernel_init, bias_init: of the kernel `[d, features]` and the bias, both float32.
    dtype: of the product.
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
  return y + layer.param('bias', init, (layer.features,), jnp.float32).astype(y.dtype)


def _rounded_conv(x, kernel, stride, padding):
  return lax.conv_general_dilated(
    x,
    kernel.astype(x.dtype),
    (stride, stride),
    padding,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
  """The product in x's dtype; the kernel's gradient is in the kernel's."""
  return _rounded_conv(x, kernel, stride, padding)


def _conv_forward(x, kernel, stride, padding):
  return _rounded_conv(x, kernel, stride, padding), (x, kernel)


def _conv_backward(stride, padding, saved, dy):
  x, kernel = saved
  (dx,) = jax.linear_transpose(lambda x: _rounded_conv(x, kernel, stride, padding), x)(dy)

  def rounded(x, dy):
    given = kernel.astype(x.dtype)
    return jax.linear_transpose(lambda k: _rounded_conv(x, k, stride, padding), given)(dy)[0]

  # The CPU and cuDNN have no product of bfloat16 numbers with a float32 result.
  return dx, lax.platform_dependent(
    x,
    dy,
    tpu=partial(kernel_gradient, size=kernel.shape[0], stride=stride, padding=padding),
    default=lambda x, dy: rounded(x, dy).astype(kernel.dtype),
  )


_conv.defvjp(_conv_forward, _conv_backward)


def kernel_gradient(
  x: jax.Array, dy: jax.Array, size: int, stride: int, padding: Padding
) -> jax.Array:
  """The gradient of a square kernel, a convolution too: of x with dy, over the batch as if it were channels.

  Args:
    x: `[n, height, width, c]`.
    dy: `[n, ., ., features]`, the gradient of the output, of x's dtype.
    size, stride, padding: of the convolution.

  Returns:
    float32 `[size, size, c, features]`.
  """
  ends = [
    (outputs - 1) * stride + size - low - inputs
    for inputs, outputs, (low, _) in zip(x.shape[1:3], dy.shape[1:3], padding, strict=True)
  ]
  return lax.conv_general_dilated(
    x,
    dy,
    (1, 1),
    [(low, end) for (low, _), end in zip(padding, ends, strict=True)],
    rhs_dilation=(stride, stride),
    dimension_numbers=('CHWN', 'IHWO', 'HWNC'),
    preferred_element_type=jnp.float32,
  )


@jax.custom_vjp
def _dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The product in x's dtype; the kernel's gradient is float32."""
  return x @ kernel.astype(x.dtype)


def _dot_forward(x, kernel):
  return _dot(x, kernel), (x, kernel)


def _dot_backward(saved, dy):
  x, kernel = saved
  dkernel = jnp.einsum('nc,nd->cd', x, dy, preferred_element_type=jnp.float32)
  return dy @ kernel.astype(dy.dtype).T, dkernel


_dot.defvjp(_dot_forward, _dot_backward)
