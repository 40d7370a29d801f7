"""Errors that are the user's to mend: each message is one sentence with what, where and the mend."""


class ConfigError(ValueError):
  """A recipe, flag, data set or workdir that cannot be used."""
