"""Questions to the operating system that an audit hook of the program does not let pass."""

from __future__ import annotations

from closewait_guard._interruptions import interrupts

__all__ = ["Refusals", "refusals"]


class Refusals:
    """Counts them, each once, for the reports to say so.

    Attributes:
        total: How many there have been in this process.
    """

    __slots__ = ("total",)

    def __init__(self) -> None:
        self.total = 0

    def note(self, error: Exception) -> None:
        """Count what a question has raised, unless the system itself has answered with it.

        Raises:
            Exception: That same one, where it is a signal handler's.
        """
        if interrupts(error):
            raise error
        if not isinstance(error, OSError):
            self.total += 1


refusals = Refusals()
