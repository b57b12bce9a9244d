"""What a run says to the person who started it: lines, warnings, and how far it is."""

from __future__ import annotations

from typing import NoReturn, TextIO

from tqdm import tqdm

__all__ = ["Console", "size"]


class Console:
    """Writes to one stream: a progress bar if it is a terminal, else a line every few steps."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.is_terminal = stream.isatty()
        self._bar: tqdm[NoReturn] | None = None
        self._total = 0
        self._log_every = 1

    def line(self, text: str = "") -> None:
        """Write a line, above the progress bar if there is one."""
        if self._bar is None:
            print(text, file=self.stream, flush=True)
        else:
            self._bar.write(text, file=self.stream)

    def warn(self, text: str) -> None:
        """Write a warning."""
        self.line(f"lorax-train: warning: {text}")

    def quiet(self, text: str) -> str:
        """Set ``text`` apart as of less weight: dim in a terminal, in ⟦⟧ elsewhere."""
        return f"\x1b[2m{text}\x1b[22m" if self.is_terminal else f"⟦{text}⟧"

    def start(self, total_steps: int, log_every: int) -> None:
        """Begin to show progress."""
        self._total, self._log_every = total_steps, log_every
        if self.is_terminal:
            self._bar = tqdm(total=total_steps, file=self.stream, unit="step")

    def step(self, step: int, loss: float, lr: float, tokens_per_second: float) -> None:
        """Show that ``step`` (from 1) is done; loss is the mean of the latest steps, in nats."""
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {loss:.3f}, lr {lr:.1e}, {tokens_per_second:.0f} tok/s", refresh=False
            )
            self._bar.update()
        elif step % self._log_every == 0 or step in (1, self._total):
            self.line(
                f"step {step}/{self._total}  loss {loss:.3f}  lr {lr:.1e}  "
                f"{tokens_per_second:.0f} tok/s"
            )

    def stop(self) -> None:
        """Take the progress bar away from under the lines to come."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def size(n_bytes: float) -> str:
    """A size for people: ``4.9 MB``."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} GB"
