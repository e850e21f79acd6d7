"""What perrin raises when a caller made a mistake; each kind is also a ValueError."""


class PerrinError(ValueError):
    """A mistake that the user can mend: the message names the input, what was expected and what came."""


class ArgumentError(PerrinError):
    """An argument outside its range, or two that do not go together."""


class ShapeError(PerrinError):
    """A tensor or array whose shape does not fit."""


class ConfigError(PerrinError):
    """A configuration key that does not exist, or a value that is not allowed for it."""


class DataError(PerrinError):
    """A data set, or one file of it, that cannot be read as asked."""


class RunError(PerrinError):
    """A run folder or a checkpoint that is missing, damaged or does not fit."""


class NonFiniteError(PerrinError):
    """A loss, a gradient or the output of a network that is not finite."""
