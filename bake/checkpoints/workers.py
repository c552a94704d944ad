"""Write files from their pieces by several workers, and hash them.

Every piece has its place in its file, so pieces are made in any order by whoever is free. What a
file hashes to is read from the file itself, front to back, close behind the making, while the
system still holds its bytes in memory; a file that is hashed is synced beside the making of the
next. How many workers there are changes no byte: each computes with one thread, since the order of
a sum in a matrix product may depend on their number.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from io import FileIO
from pathlib import Path
from queue import SimpleQueue
from threading import Condition, Lock

from bake.checkpoints.source import read_at
from bake.checkpoints.stream import CHUNK, Copy, Draft, Fill, Piece, clone, length_of, put
from bake.errors import CheckpointError

Advance = Callable[[int], None]
"""Called with the length of each stretch that is written."""
Finish = Callable[[Path, str], None]
"""Called with a file that is on disk, and its sha256."""

_STEP = 16 << 20  # bytes from which on a worker looks what else there is to do
_HASHED = 4 * _STEP  # most that it hashes before
_AHEAD = 16  # files that wait for the disk from which on no more is made: each holds two handles
_KEPT = 31 << 20  # bytes: from 32 MiB on glibc hands every block back
_JOBS: ContextVar[int | None] = ContextVar("jobs", default=None)


@contextmanager
def at_most(jobs: int | None) -> Iterator[None]:
    """Let at most so many workers write at once; None for one on each processor."""
    token = _JOBS.set(jobs)
    try:
        yield
    finally:
        _JOBS.reset(token)


def _jobs() -> int:
    found = _JOBS.get()
    if found is not None:
        return found
    # What this process may use, where the system says so: macOS does not.
    allowed = getattr(os, "sched_getaffinity", None)
    return os.cpu_count() or 1 if allowed is None else len(allowed(0))


def write_file(
    target: Path, pieces: Sequence[Piece], *, origin: Path | None, advance: Advance
) -> str:
    """Write one file, as ``write_all`` does, and return its sha256."""
    hashes: list[str] = []
    draft = Draft(target, pieces, origin)
    write_all([draft], advance=advance, finish=lambda _, sha256: hashes.append(sha256))
    return hashes[0]


def write_all(drafts: Sequence[Draft], *, advance: Advance, finish: Finish) -> None:
    """Write files, and sync each to disk.

    Memory stays at a tile or two for each worker, whatever the size of a file or of its tensors.
    Both callbacks are called from this thread. When a piece fails, or the run is interrupted,
    files that are complete by then are finished first.

    Args:
        drafts: in the order in which they are begun.
        advance: called with the length of each stretch that is written.
        finish: called with each file that is on disk, and its sha256.

    Raises:
        CheckpointError: a producer's tiles are not the tensor they stand for, or an original
            has become shorter.
    """
    crew = _Crew(drafts)
    fills = any(isinstance(piece, Fill) for draft in drafts for piece in draft.pieces)
    with one_thread() if fills else nullcontext():
        try:
            crew.begin()
            for count in crew.stretches(finish):
                advance(count)
        finally:
            crew.end(finish)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread, here and in workers that are started here.

    What is computed of a file outside of its writing is then what a worker would have found.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # glibc keeps for the next tile what it does not hand back to the system at once, which is up to
    # twice the largest block that was ever freed (mallopt(3)). This one is never touched.
    torch.empty(_KEPT, dtype=torch.uint8)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _File:
    """A file under work: how far its pieces are made without a gap, and how far it is hashed."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.steps = list(_steps(draft.pieces))
        self.size = sum(length_of(piece) for piece in draft.pieces)
        self.busy = False  # whether a worker is hashing it
        self.digest = hashlib.sha256()
        self._made = [False] * len(self.steps)
        self._front = self._hashed = 0
        self._opening = Lock()
        self._file: FileIO | None = None
        self._original: FileIO | None = None
        self._cloned = False

    def mark(self, step: int) -> None:
        """Note that a step is made."""
        self._made[step] = True
        while self._front < len(self.steps) and self._made[self._front]:
            self._front += 1

    @property
    def waits(self) -> bool:
        """Whether there is something to hash, and nobody does it."""
        return not self.busy and (self._hashed < self._ready() or self.complete)

    @property
    def complete(self) -> bool:
        """Whether all of it is made and hashed."""
        return self._hashed == self.size and self._front == len(self.steps)

    def make(self, step: int) -> Iterator[int]:
        """Write the pieces of a step, and yield the length of every stretch."""
        file = self._open()
        for position, piece in self.steps[step]:
            yield from put(piece, file, position, None if self._cloned else self._original)

    def _ready(self) -> int:
        """Return how many bytes are made without a gap."""
        return self.steps[self._front][0][0] if self._front < len(self.steps) else self.size

    def claim(self) -> int:
        """Let one worker hash the file up to the offset that is returned."""
        self.busy = True
        return min(self._ready(), self._hashed + _HASHED)

    def hash(self, stop: int) -> None:
        """Hash what is made, up to an offset that was claimed."""
        file, buffer = self._open(), memoryview(bytearray(min(CHUNK, stop - self._hashed)))
        for start in range(self._hashed, stop, CHUNK):
            chunk = buffer[: min(CHUNK, stop - start)]
            read_at(file, start, chunk)
            self.digest.update(chunk)
        self._hashed = stop

    def sync(self) -> str:
        """Make all of it durable, close it and return its sha256."""
        os.fsync(self._open().fileno())
        self.close()
        return self.digest.hexdigest()

    def close(self) -> None:
        for file in (self._file, self._original):
            if file is not None:
                file.close()

    def _open(self) -> FileIO:
        with self._opening:
            if self._file is None:
                target, origin = self.draft.target, self.draft.origin
                target.parent.mkdir(parents=True, exist_ok=True)
                target.unlink(missing_ok=True)  # rather than write into what has a second name
                self._original = None if origin is None else origin.open("rb", buffering=0)
                self._file = target.open("x+b", buffering=0)
                self._cloned = self._original is not None and clone(self._original, self._file)
                if self._cloned:
                    self._fit()
            return self._file

    def _fit(self) -> None:
        """Give a clone its new length, once it is known to hold all that is kept of it."""
        assert self._file is not None
        found = os.fstat(self._file.fileno()).st_size
        kept = (piece.stop for piece in self.draft.pieces if isinstance(piece, Copy))
        if found < max(kept, default=0):
            raise CheckpointError(
                f"became shorter while it was read: it ends at byte {found}",
                where=str(self.draft.origin),
            )
        self._file.truncate(self.size)


def _steps(pieces: Sequence[Piece]) -> Iterator[list[tuple[int, Piece]]]:
    """Yield pieces with their places, in runs that are worth a worker's while."""
    run: list[tuple[int, Piece]] = []
    position = 0
    for piece in _cut(pieces):
        run.append((position, piece))
        position += length_of(piece)
        if position - run[0][0] >= _STEP:
            yield run
            run = []
    if run or not position:
        yield run or [(0, Copy(0, 0))]


def _cut(pieces: Sequence[Piece]) -> Iterator[Piece]:
    for piece in pieces:
        if isinstance(piece, Copy):
            for start in range(piece.start, piece.stop, _STEP):
                yield Copy(start, min(start + _STEP, piece.stop))
        else:
            yield piece


class _Crew:
    """The workers of some files, and one thread that waits for the disk."""

    def __init__(self, drafts: Sequence[Draft]) -> None:
        self._files = [_File(draft) for draft in drafts]
        self._pending = deque((f, step) for f in self._files for step in range(len(f.steps)))
        self._unhashed = dict.fromkeys(self._files)
        self._turn = Condition()
        self._syncing = 0  # files that are made and hashed, and not yet on disk
        self._stopped = False
        self._news: SimpleQueue[int | tuple[Path, str] | BaseException] = SimpleQueue()
        self._workers = ThreadPoolExecutor(_jobs())
        self._syncer = ThreadPoolExecutor(1)

    def begin(self) -> None:
        for _ in range(min(_jobs(), len(self._pending))):
            self._workers.submit(self._work).add_done_callback(self._ended)

    def stretches(self, finish: Finish) -> Iterator[int]:
        """Yield the length of every stretch as it is written, until all files are on disk."""
        left = len(self._files)
        while left:
            news = self._news.get()
            if isinstance(news, BaseException):
                raise news
            if isinstance(news, int):
                yield news
            else:
                finish(*news)
                left -= 1

    def end(self, finish: Finish) -> None:
        """Wait for the workers, and finish the files that are complete."""
        with self._turn:
            self._stopped = True
            self._turn.notify_all()
        self._workers.shutdown()
        self._syncer.shutdown()
        for file in self._files:
            file.close()
        while not self._news.empty():
            if isinstance(news := self._news.get(), tuple):
                finish(*news)

    def _work(self) -> None:
        while (task := self._next()) is not None:
            task()

    def _next(self) -> Callable[[], None] | None:
        """Return what is to be done next: to hash what is made, or else to make a step."""
        with self._turn:
            while not self._stopped and self._unhashed:
                for file in self._unhashed:
                    if file.waits:
                        return partial(self._hash, file, file.claim())
                if self._pending and self._syncing < _AHEAD:
                    return partial(self._make, *self._pending.popleft())
                self._turn.wait()
        return None

    def _make(self, file: _File, step: int) -> None:
        for count in file.make(step):
            self._news.put(count)
            if self._stopped:
                return
        with self._turn:
            file.mark(step)
            self._turn.notify_all()

    def _hash(self, file: _File, stop: int) -> None:
        file.hash(stop)
        with self._turn:
            file.busy = False
            if file.complete:
                del self._unhashed[file]
                self._syncing += 1
                self._syncer.submit(self._sync, file).add_done_callback(self._ended)
            self._turn.notify_all()

    def _sync(self, file: _File) -> None:
        self._news.put((file.draft.target, file.sync()))
        with self._turn:
            self._syncing -= 1
            self._turn.notify_all()

    def _ended(self, work: Future[None]) -> None:
        """Stop all others where one fails, and let it be raised where all is waited for."""
        error = work.exception()
        if error is not None:
            with self._turn:
                self._stopped = True
                self._turn.notify_all()
            self._news.put(error)
