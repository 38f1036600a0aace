"""The errors jqopt raises; every message says where, what was found, what was expected and what to write instead."""


class JqoptError(Exception):
    """Root of every error raised by jqopt."""


class RecipeError(JqoptError):
    """A recipe file is wrong: unknown key, unknown name, contradictory rule."""


class TraceError(JqoptError):
    """A model could not be traced, or its traced form is not what was expected."""


class PlanError(JqoptError):
    """A recipe and a model do not fit together."""


class CalibrationError(JqoptError):
    """Calibration data is missing, empty, or not finite."""


class CheckpointError(JqoptError):
    """A file on disk is damaged, incomplete, or of an unknown version."""


class UnsupportedError(JqoptError, ValueError):
    """The request is understood but cannot be done; the message names the reason."""
