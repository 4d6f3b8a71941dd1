"""The errors of the engine: about what a user asked for, and about runs that did not finish."""


class ConfigError(ValueError):
    """Everything that is wrong with a recipe and its overrides, in one message."""


class RunsFailed(ChildProcessError):
    """Some runs of a comparison did not finish; the others did, and the message names each with its reason."""
