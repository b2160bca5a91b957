"""How many threads compute, on a machine that does other things too."""

from __future__ import annotations

import math
import time

# seconds that are measured at once: enough for the clock of CPU time, whose steps are of a few milliseconds on some systems
LEAST = max(0.02, 20 * time.get_clock_info("process_time").resolution)
ALIKE = 256  # tokens of a batch from which on a token takes the same time: chunks differ in length, and are compared
LOST = 0.3  # CPUs that the threads were there for and did not get; more of it is other programs'
GAIN = 0.9  # of the time: fewer threads that are not faster by this are not worth it
PAUSES = 0.5, 4.0  # seconds between two trials: after one that helped, and at most
SHARE = 0.1  # of the time that trials may take


class Crew:
    """How many threads compute: all, or fewer while other programs have some of the cores.

    ggml's threads wait for each other actively, several times in each layer. One that has lost its core for some milliseconds holds
    up all of them, and where little is computed between two waits they are slower together than without it. That shows in the CPU time that
    they get: waiting counts in it, being put off does not. Where it falls short, fewer are tried, and kept if they are faster. Now and then one more
    is. A batch for which weights came from the disk does not count.

    Args:
        most: threads, on a machine that does nothing else.

    Attributes:
        n: threads to compute with now.
    """

    def __init__(self, most: int) -> None:
        self.most = self.n = most
        self._size, self._tokens, self._wall, self._cpu = -1, 0, 0.0, 0.0
        self._trial: tuple[int, float, int, float] | None = (
            None  # threads and seconds a token before it; size; when it ends
        )
        self._next = -math.inf  # when there may be another one
        self._pause = PAUSES[0]

    def worked(self, n_tokens: int, wall: float, cpu: float, now: float, from_disk: bool | None = None) -> None:
        """Note what a batch took, and choose the number of threads for the next one.

        Args:
            wall, cpu: seconds of the clock, and of all threads together.
            now: seconds, of a clock that goes on evenly.
            from_disk: whether it waited for weights; None: not known, and taken to be so of the first batch.
        """
        if self.most == 1:
            return
        if self._trial is not None and now - wall > self._trial[3]:  # nothing came that it could be compared by
            self.n, self._trial, self._next = self._trial[0], None, now + self._pause
            return
        size = min(n_tokens, ALIKE).bit_length()
        if size != self._size:
            first, self._size = self._size < 0, size
            self._tokens, self._wall, self._cpu = 0, 0.0, 0.0
            if first and from_disk is None:
                return
        if from_disk:
            return
        self._tokens, self._wall, self._cpu = self._tokens + n_tokens, self._wall + wall, self._cpu + cpu
        if self._wall < LEAST:
            return
        took, a_token, lost = self._wall, self._wall / self._tokens, self.n - self._cpu / self._wall
        self._tokens, self._wall, self._cpu = 0, 0.0, 0.0
        if self._trial is not None:
            n, was, size_then, _ = self._trial
            if size != size_then:
                return
            self._trial = None
            helped = a_token < was * (GAIN if self.n < n else 1.0)
            self._pause = PAUSES[0] if helped else min(2 * self._pause, PAUSES[1])
            self._next = now + max(self._pause, took / SHARE)
            self.n = self.n if helped else n
        elif now >= self._next:
            fewer = lost > LOST and self.n > 1  # those that are put off for half of the time
            if fewer or self.n < self.most:
                self._trial = self.n, a_token, size, now + 1.0
                self.n += -min(self.n - 1, max(1, round(2 * lost))) if fewer else 1
