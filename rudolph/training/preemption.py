"""The end of a process at the request of a scheduler; only the standard library is imported."""

# The exit code of a temporary failure (sysexits.h), on which job scripts requeue.
REQUEUE = 75


class PreemptedError(BaseException):
    """A signal asked the process to end.  Its message names the signal and the steps done.

    It is no ``Exception``: the runs that follow must not start.
    """
