"""How many threads compute, on a machine that does other things too."""

from __future__ import annotations

import math
import time

# seconds that are measured at once: enough for the clock of CPU time, whose steps are of a few milliseconds on some systems
LEAST = max(0.02, 20 * time.get_clock_info("process_time").resolution)
ALIKE = 256  # tokens of a batch from which on a token takes the same time: chunks differ in length, and are compared
LOST = 0.3  # CPUs that the threads were there for and did not get; more of it is other programs'
ROOM = 0.7  # of a CPU that other programs leave: enough for one more thread
GAIN = 0.9  # of the time: fewer threads that are not faster by this are not worth it
PAUSES = 0.5, 4.0  # seconds between two trials: after one that helped, and at most
SHARE = 0.1  # of the time that trials may take
STALE = 2.0  # seconds after which other programs may do other things


class Crew:
    """How many threads compute: all, or fewer while other programs have some of the cores.

    ggml's threads wait for each other actively, several times in each layer. One that has lost its core for some milliseconds holds
    up all of them, and where little is computed between two waits they are slower together than without it. So the first batch, and one after
    a rest, is computed by as many threads as other programs leave CPUs for, where that is known. From then on the CPU time that the threads
    get is looked at: waiting counts in it, being put off does not. Where it falls short, fewer are tried, and kept if they are faster. Now and
    then one more is, at once where other programs leave a CPU for it. A batch for which weights came from the disk does not count.

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
        self._since = -math.inf  # when there was one, or n was chosen without one
        self._pause = PAUSES[0]
        self._worked = -math.inf  # when a batch was done last
        self._best: dict[int, int] = {}  # threads that a trial found best, by the CPUs that were free

    def begin(self, now: float, free: float | None, like: Crew | None = None) -> None:
        """Choose the number of threads for a first batch, or for one after a rest.

        Args:
            free: CPUs that other programs leave; None: not known.
            like: which computes other batches in the same context, and may have just found how many are of use.
        """
        if self.most == 1 or now - self._worked < STALE:
            return
        if free is not None:
            n = max(1, min(self.most, round(free)))
            self.n = self._best.get(n, n) if n < self.most else n
        elif like is not None and now - like._worked < STALE:
            self.n = self.most if like.n == like.most else min(self.most, like.n)
        else:
            return
        self._trial, self._since = None, now

    def worked(
        self, n_tokens: int, wall: float, cpu: float, now: float, from_disk: bool | None = None, free: float | None = None
    ) -> None:  # fmt: skip
        """Note what a batch took, and choose the number of threads for the next one.

        Args:
            wall, cpu: seconds of the clock, and of all threads together.
            now: seconds, of a clock that goes on evenly.
            from_disk: whether it waited for weights; None: not known, and taken to be so of the first batch.
            free: CPUs that other programs left meanwhile; None: not known.
        """
        if self.most == 1:
            return
        self._worked = now
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
            self._since = now
            self.n = self.n if helped else n
            if free is not None:
                self._best[max(1, min(self.most, round(free)))] = self.n
        elif now >= self._next:
            more = 0
            if lost > LOST and self.n > 1:
                more = max(1 - self.n, -max(1, round(2 * lost)))  # those that are put off for half of the time
            elif free is None or now - self._since >= max(PAUSES[1], took / SHARE):
                more = min(1, self.most - self.n)
            else:
                more = max(0, min(self.most, math.floor(free + 1 - ROOM)) - self.n)
            if more:
                self._trial = self.n, a_token, size, now + 1.0
                self.n += more
