"""The error of this stage."""


class ExportError(RuntimeError):
    """A model could not be turned into a file that runs and agrees; nothing was written."""
