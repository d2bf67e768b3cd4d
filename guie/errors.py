"""Errors: those that a user can fix, one sentence each; a notebook shows the sentence without a traceback."""


class OneSentence:
    """An error that says what is wrong and what to do. It keeps its traceback, for whoever looks for a bug here."""

    def _render_traceback_(self):
        """What IPython shows instead of a traceback."""
        return [f'{type(self).__name__}: {self}']


class InputError(OneSentence, ValueError):
    """A value, a table or a file whose content cannot be used."""


class MissingError(OneSentence, FileNotFoundError):
    """A file or folder that does not exist, or holds something else."""


class ExistsError(OneSentence, FileExistsError):
    """A file or folder that is there already and is not written over."""


class FileError(OneSentence, OSError):
    """A file that cannot be read or written."""


class MemoryFull(OneSentence, MemoryError):
    """The GPU's memory is used up."""


class Diverged(OneSentence, FloatingPointError):
    """The loss stays NaN or infinite."""


class ProcessError(OneSentence, RuntimeError):
    """Another process, or the machine, cannot do what was asked of it."""


class Stopped(OneSentence, Exception):
    """A run ended before its last step, everything saved: run it again to resume."""
