"""Networks. Only the files of this folder import flax.linen."""
