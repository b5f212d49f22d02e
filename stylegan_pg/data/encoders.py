"""Processes that encode pictures, a bounded number of them ahead of what is written."""

import multiprocessing
from collections import deque
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from stylegan_pg import stopping
from stylegan_pg.data.picture import Recipe, Result, make
from stylegan_pg.data.sources import CONTINUES, File
from stylegan_pg.errors import RunError


class Encoders:
    """`workers` processes, which start when there is something to do (0 or 1: this process). To be closed."""

    def __init__(self, recipe: Recipe, workers: int):
        self.recipe, self.workers = recipe, workers
        self.chunk = max(1, min(32, (1024 // recipe.resolution) ** 2))  # small pictures: fewer, larger messages
        self.pool: ProcessPoolExecutor | None = None

    def results(self, pictures: list[File]) -> Generator[Result, None, None]:
        """What becomes of pictures, in their order. Raises RunError as `make`, and for a worker that died."""
        chunks = [pictures[i : i + self.chunk] for i in range(0, len(pictures), self.chunk)]
        if min(self.workers, len(chunks)) <= 1 and not self.pool:
            yield from (make(picture, self.recipe) for picture in pictures)
            return
        if not self.pool:
            workers = min(self.workers, len(chunks))
            self.pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), stopping.be_worker)
        ahead = deque()
        try:
            for pending in chunks:
                ahead.append(self.pool.submit(_make_chunk, pending, self.recipe))
                if len(ahead) > 3 * self.workers:
                    yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()
        except (BrokenProcessPool, MemoryError) as error:
            raise RunError(
                f"a worker process died, perhaps for want of memory: with fewer --workers, {CONTINUES}"
            ) from error
        finally:
            for future in ahead:
                future.cancel()

    def close(self) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)


def _make_chunk(pictures: list[File], recipe: Recipe) -> list[Result]:
    return [make(picture, recipe) for picture in pictures]
