"""What a launcher raises when a worker fails."""


class WorkerError(RuntimeError):
    """A worker failed, and the job was ended.

    Args:
        message: Which worker, and what became of it.
        exit_code: What a shell would show: the worker's own code, or 128 + the signal that ended it.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code
