"""Worker processes that encode samples, a bounded number of samples ahead of the writer."""

import multiprocessing
import resource
import signal
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection

from stylegan_pg.data.pack.pyramid import PackOptions
from stylegan_pg.data.pack.sample_encoder import Result, make
from stylegan_pg.data.pack.samples import SourceSample
from stylegan_pg.data.pack.source_files import CONTINUES
from stylegan_pg.distributed import stopping
from stylegan_pg.errors import RunError
from stylegan_pg.untrusted import printable

# What a picture does to a decoder by itself; want of memory may, where memory is limited.
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)


class Encoders:
    """A pool of `workers` processes, started at the first use (0 or 1: encode in this process). It must be closed."""

    def __init__(self, recipe: PackOptions, workers: int):
        self.recipe, self.workers = recipe, workers
        self.chunk = max(1, min(32, (1024 // recipe.resolution) ** 2))  # small pictures: fewer, larger messages
        self.pool: ProcessPoolExecutor | None = None

    def results(self, samples: list[SourceSample]) -> Generator[Result, None, None]:
        """Encode samples and yield the results in their order. The samples of a worker that died are encoded once
        more, each by its own process; a picture that ends that process as well is unreadable.

        Raises:
            RunError: as `make`, and if there is not enough memory for a picture.
        """
        chunks = [samples[i : i + self.chunk] for i in range(0, len(samples), self.chunk)]
        if min(self.workers, len(chunks)) <= 1 and not self.pool:
            yield from (make(sample, self.recipe) for sample in samples)
            return
        ahead: deque[tuple[list[SourceSample], Future[list[Result]]]] = deque()
        try:
            for chunk in chunks:
                ahead.append((chunk, self._submit(chunk)))
                if len(ahead) > 3 * self.workers:
                    yield from self._taken(*ahead.popleft())
            while ahead:
                yield from self._taken(*ahead.popleft())
        finally:
            for _, future in ahead:
                future.cancel()

    def _submit(self, chunk: list[SourceSample]) -> "Future[list[Result]]":
        if not self.pool:
            self.pool = ProcessPoolExecutor(self.workers, multiprocessing.get_context("spawn"), stopping.be_worker)
        try:
            return self.pool.submit(_make_chunk, chunk, self.recipe)
        except BrokenProcessPool:  # a worker died meanwhile
            self.close()
            self.pool = None
            return self._submit(chunk)

    def _taken(self, chunk: list[SourceSample], future: "Future[list[Result]]") -> Iterator[Result]:
        try:
            yield from future.result()
        except BrokenProcessPool:
            yield from _one_by_one(chunk, self.recipe)

    def close(self) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)


def _make_chunk(samples: list[SourceSample], recipe: PackOptions) -> list[Result]:
    return [make(sample, recipe) for sample in samples]


def _one_by_one(samples: list[SourceSample], recipe: PackOptions) -> Iterator[Result]:
    context = multiprocessing.get_context("spawn")
    while samples:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_send_each, args=(sender, samples, recipe))
        process.start()
        sender.close()
        done = 0
        try:
            for _ in samples:
                result = receiver.recv()
                if isinstance(result, RunError):
                    raise result
                yield result
                done += 1
        except EOFError:  # it is gone
            process.join()
            yield _blamed(samples[done], process.exitcode or 0)
            done += 1
        finally:
            process.terminate()
            process.join()
            receiver.close()
        samples = samples[done:]


def _blamed(sample: SourceSample, code: int) -> Result:
    """The result for a picture whose process has died with this exit code for the second time."""
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    if -code in _CRASHES and not limited:
        return Result([], f"ended the process that decoded it, twice ({signal.Signals(-code).name})", False)
    raise RunError(
        f"{printable(sample.path)}: the process that decoded it died, perhaps for want of memory. With fewer "
        f"--workers, or where there is more, {CONTINUES}"
    )


def _send_each(sender: Connection, samples: list[SourceSample], recipe: PackOptions) -> None:
    stopping.be_worker()
    for sample in samples:
        try:
            sender.send(make(sample, recipe))
        except RunError as error:
            sender.send(error)
            return
