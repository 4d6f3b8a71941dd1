"""The error of the engine about what a user asked for."""


class ConfigError(ValueError):
    """Everything that is wrong with a recipe and its overrides, in one message."""
