"""Own the engine in a thread: decode the jobs that others submit, and send their pieces to the event loop."""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress

from headstart.console import say
from headstart.data.tokenizers import Tokenizer
from headstart.decoding.constraints import Constraint, compiled
from headstart.decoding.engine import Engine, generate_all
from headstart.decoding.generation import Generation, OriginStream
from headstart.decoding.settings import Request
from headstart.errors import UsageError
from headstart.serving.errors import INTERNAL, ApiError, stopping, too_many
from headstart.serving.fair_queue import FairQueue
from headstart.serving.jobs import Job, Piece, deliver
from headstart.serving.metrics import Metrics

LOG = logging.getLogger(__name__)
STOP_SECONDS = 1.0
"""Most seconds to wait for the last step of an engine that stops."""
WARM_UP_PROMPT = 8
"""Number of prompt tokens of the request that warms up an engine."""


class JobTurns:
    """Offer the jobs that wait to the scheduler of an engine, as a `RequestQueue` in which clients take turns."""

    def __init__(self, waiting: Callable[[], int], start: Callable[[], Generation | None]) -> None:
        self._waiting, self._start = waiting, start

    def __len__(self) -> int:
        """Return how many jobs wait."""
        return self._waiting()

    def pop(self) -> Generation | None:
        """Start the next job and return its generation; None if no job can start."""
        return self._start()

    def remove(self, generation: Generation) -> bool:
        """Return False, for a job that waits has no generation yet; `Worker.cancel` removes it."""
        return False


class Worker:
    """Decode jobs with an engine in a thread.

    `make_engine` makes the engine, in the thread; it is called again after an engine has failed. The tokenizer serves
    the origins of tokens and constraints. At most `queue` jobs wait in addition to those in slots. Two pieces of a
    stream are at least `stream_interval` seconds apart.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        tokenizer: Tokenizer | None,
        slots: int,
        queue: int,
        metrics: Metrics,
        stream_interval: float = 0.0,
    ) -> None:
        self._make_engine, self._tokenizer, self.slots, self.queue = make_engine, tokenizer, slots, queue
        self.metrics, self.stream_interval = metrics, stream_interval
        self.failures = 0
        """Number of engines that have failed."""
        self.dead = False
        """True once no engine could be made after one has failed."""
        self._lock = threading.Condition()
        self._waiting: FairQueue[Job] = FairQueue()
        self._cancelled: list[tuple[Job, str]] = []
        self._running: list[Job] = []
        self._refused: list[tuple[Job, ApiError]] = []
        self._job_of: dict[Generation, Job] = {}
        self._stopping = False
        self._seconds = 1.0  # recent average of the time that a job takes in its slot
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._ready = threading.Event()
        self._no_start: Exception | None = None

    def start(self) -> None:
        """Start the thread, and return when the engine is warm. Raises the error that prevented this."""
        self._thread.start()
        self._ready.wait()
        if self._no_start is not None:
            raise self._no_start

    @property
    def bound(self) -> int:
        """Return the most jobs that decode and wait together."""
        return self.slots + self.queue

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs of one client, at most `bound`: all of them or none.

        If the queue is full, the newest jobs of clients with more jobs in it are dropped. Raises ApiError 429, with the
        seconds after which to try again, if that makes no room, and ApiError 503 if the engine stops or has failed.
        """
        with self._lock:
            busy = len(self._waiting) + len(self._running)
            if self.dead:
                raise ApiError(503, "the engine has failed and could not be started again")
            if self._stopping:
                raise stopping()
            full = too_many(busy, max(1, min(60, math.ceil(busy * self._seconds / self.slots))))
            excess = busy + len(jobs) - self.bound
            dropped = self._waiting.choose_dropped(jobs[0].client, len(jobs), excess)
            if dropped is None:
                raise full
            for job in dropped:
                self._waiting.remove(job.client, job)
                self.metrics.count_end(job, "refused")
            for job in jobs:
                self._waiting.put(job.client, job)
            self._report_load()
            self._lock.notify()
        _send([], [(job, full) for job in dropped])

    def cancel(self, jobs: Sequence[Job], outcome: str = "cancelled") -> None:
        """End the jobs that are not done: they leave the queue at once, or their slots before the next pass."""
        with self._lock:
            for job in jobs:
                if self._waiting.remove(job.client, job):
                    self.metrics.count_end(job, outcome)
                elif job in self._running:
                    self._cancelled.append((job, outcome))
            self._report_load()
            self._lock.notify()

    def _report_load(self) -> None:
        """Update the metrics of the queue and the slots; the lock is held."""
        self.metrics.set_load(self, len(self._waiting), len(self._running))

    @property
    def idle(self) -> bool:
        """Return whether no job waits or decodes."""
        return not self._waiting and not self._running

    def stop(self) -> None:
        """Answer all jobs with 503, and end the thread after its step; wait for it for at most `STOP_SECONDS`."""
        with self._lock:
            self._stopping = True
            left = self._left()
            self._lock.notify()
        _send([], [(job, stopping()) for job in left])
        self._thread.join(STOP_SECONDS)

    def _run(self) -> None:
        """Decode until the worker stops, or until no engine can be made."""
        try:
            engine = self._make_engine()
            warm_up(engine, self._tokenizer)
            self._feed(engine)
        except Exception as error:
            self._no_start = error
            return
        finally:
            self._ready.set()
        try:
            while self._wait():
                if not self._turn(engine):
                    del engine  # the next one needs its memory
                    engine = self._make_engine()
                    self._feed(engine)
        except BaseException:  # no known error reaches this; no client may wait for ever
            LOG.exception("no engine could be made")
            self.dead = True
        with self._lock:
            left = self._left()
        self._hand_over(
            [], [(job, ApiError(503, "the engine has failed") if self.dead else stopping()) for job in left]
        )

    def _left(self) -> list[Job]:
        """Return the jobs that are not done, and empty the queue; the lock is held."""
        return [*self._running, *(self._waiting.next() for _ in range(len(self._waiting)))]

    def _feed(self, engine: Engine) -> None:
        """Make the jobs that wait the queue of the engine's scheduler."""
        weak = weakref.proxy(engine)  # a failed engine must leave memory before the next one is made
        engine.scheduler.queue = JobTurns(lambda: len(self._waiting), lambda: self._start(weak))

    def _turn(self, engine: Engine) -> bool:
        """Free the slots of cancelled jobs, run a step, and send its pieces. Return False if the engine failed.

        This is a function of its own so that the thread holds no job while it waits for the next one.
        """
        self._free_cancelled(engine)
        pieces: list[tuple[Job, Piece]] = []
        broken = False
        try:
            engine.scheduler.admit()
            pieces = self._step(engine) if engine.busy else []
        except BaseException:  # a panic in Rust, such as a tokenizer's, is not an Exception
            ids = sorted({job.request_id for job in self._running} - {""})
            LOG.exception("the engine has failed; another one is made", extra={"fields": {"request_ids": ids}})
            broken = True
            self.failures += 1
            self.metrics.count_failure()
            refused = [job for job, _ in self._refused]
            self._refused += [(job, ApiError(500, INTERNAL)) for job in self._running if job not in refused]
        errors, self._refused = self._refused, []
        self._hand_over(pieces, errors)
        return not broken

    def _wait(self) -> bool:
        """Wait for jobs. Return False when the worker stops."""
        with self._lock:
            while not (self._stopping or self._waiting or self._running):
                self._lock.wait()
            return not self._stopping

    def _free_cancelled(self, engine: Engine) -> None:
        """Free the slots of jobs that were cancelled."""
        with self._lock:
            cancelled, self._cancelled = self._cancelled, []
            for job, outcome in cancelled:
                if job in self._running:
                    assert job.generation is not None
                    engine.cancel(job.generation)
                    self._ended(job, outcome)

    def _start(self, engine: Engine) -> Generation | None:
        """Start the next job that the engine accepts, and return its generation; None if no job waits."""
        while True:
            with self._lock:
                if not len(self._waiting):
                    return None
                job = self._waiting.next()
                self._running.append(job)
                self._report_load()
            error = self._begin(engine, job)
            if error is None:
                return job.generation
            self._refused.append((job, error))

    def _begin(self, engine: Engine, job: Job) -> ApiError | None:
        """Make the generation of a job; return the error if the engine refuses it."""
        try:
            job.generation = engine.generation(job.request)
        except UsageError as error:
            return ApiError(400, str(error))
        except BaseException:  # a panic in Rust, such as a tokenizer's, is not an Exception
            LOG.exception("a request could not start", extra={"fields": {"request_id": job.request_id}})
            return ApiError(500, INTERNAL)
        if job.wants_origins and self._tokenizer is not None:
            job.origin_stream = OriginStream(job.generation, self._tokenizer)
        self._job_of[job.generation] = job
        return None

    def _step(self, engine: Engine) -> list[tuple[Job, Piece]]:
        """Run a step of the engine, and return the pieces to send."""
        pieces, tokens = [], 0
        committed = engine.step()
        now = time.perf_counter()
        for generation, text in committed:
            job = self._job_of[generation]
            self.metrics.count_pass(job, now)
            tokens += len(generation.tokens) - job.passed
            job.passed = len(generation.tokens)
            piece = job.piece(text, now, self.stream_interval)
            if piece is not None:
                pieces.append((job, piece))
        self.metrics.count_step(len(committed), tokens)
        return pieces

    def _hand_over(self, pieces: list[tuple[Job, Piece]], errors: Sequence[tuple[Job, ApiError]]) -> None:
        """Send the pieces and errors of a step to the event loop in one call."""
        if not pieces and not errors:
            return
        done = [(job, piece) for job, piece in pieces if piece.finished]
        with self._lock:
            for job, _ in done:
                assert job.generation is not None
                self._ended(job, job.generation.finish_reason or "")
            for job, error in errors:
                self._ended(job, "refused" if error.status_code < 500 else "failed")
        _send(pieces, errors)

    def _ended(self, job: Job, outcome: str) -> None:
        """Remove a job that has ended; the lock is held."""
        if job in self._running:
            self._running.remove(job)
        if job.generation is not None:
            self._job_of.pop(job.generation, None)
            self._seconds += 0.1 * (job.generation.stats.seconds - self._seconds)
        self.metrics.count_end(job, outcome)
        self._report_load()


def _send(pieces: Sequence[tuple[Job, Piece]], errors: Sequence[tuple[Job, ApiError]]) -> None:
    """Hand pieces and errors to the event loops of their jobs; from any thread."""
    for loop in {job.inbox.loop for job, _ in (*pieces, *errors)}:
        with suppress(RuntimeError):  # the loop has ended, and nobody listens
            loop.call_soon_threadsafe(deliver, pieces, errors)


def warm_up(engine: Engine, tokenizer: Tokenizer | None) -> None:
    """Time passes for the policy, decode a request, and compile a constraint, so that no client waits for these.

    Raises the error of an engine that does not work.
    """
    policy, slots = engine.policy, len(engine.state.length_S)
    if policy is not None:
        if policy.calibration.online:
            say("the model is not tuned: passes are timed first (headstart tune would keep what it finds)")
        policy.prepare(slots)
    tokens = min(2 * engine.width, engine.context - WARM_UP_PROMPT)
    if tokens > 0:
        # Plain decoding under a policy, which must not learn from this output.
        generate_all(engine, [Request((0,) * WARM_UP_PROMPT, tokens, heads=None if policy is None else 1)])
    with suppress(UsageError):  # without tokenizer or llguidance, requests with constraints report this
        compiled(Constraint.choice(["a"]), tokenizer, engine.model.config.vocab_size)
