"""The page's server: an ASGI application whose requests name sources, snapshots and faces, and no paths."""

from __future__ import annotations

import asyncio
import importlib.resources
import io
import logging
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection
from typing import Any

import torch
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.explorer import film
from stylegan_pg.explorer.face import parse_face
from stylegan_pg.explorer.faces import Faces
from stylegan_pg.explorer.guard import Guard
from stylegan_pg.explorer.library import Library, NotFoundError
from stylegan_pg.explorer.progress import Progress, listed
from stylegan_pg.explorer.worker import BusyError, SupersededError, Worker
from stylegan_pg.images import to_pil
from stylegan_pg.untrusted import parse_json, printable
from stylegan_pg.version import __version__

log = logging.getLogger(__name__)

MOST_BODY = 1 << 20  # bytes of a request
MOST_FILMS = 8  # finished videos that are kept
PAGE = {
    "page.css": "text/css; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "controls.js": "text/javascript; charset=utf-8",
    "curves.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


class Explorer:
    """What answers the requests. The worker uses the library; nothing else does, except for lists of files."""

    def __init__(self, library: Library, batch: int = 8):
        self.library, self.batch, self.worker = library, batch, Worker()
        library.outdated = self.worker.outdated
        self.progress = {i: Progress(s) for i, s in enumerate(library.sources) if s.is_run}
        self.reading = {i: asyncio.Lock() for i in self.progress}
        self.films: OrderedDict[str, film.Job] = OrderedDict()

    # --------------------------------------------------------------------------------------------------------- files

    async def page(self, request: Request) -> Response:
        return Response(_page_file("index.html"), media_type="text/html; charset=utf-8")

    async def asset(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in PAGE:
            raise NotFoundError("there is no such file")
        return Response(_page_file(name), media_type=PAGE[name])

    async def sources(self, request: Request) -> Response:
        found = await asyncio.to_thread(
            lambda: [
                {"name": s.name, "is_run": i in self.progress, "snapshots": listed(s)}
                for i, s in enumerate(self.library.sources)
            ]
        )
        about = {"version": __version__, "device": str(self.library.device)}
        return JSONResponse({**about, "sources": found, "formats": {"mp4": film.has_mp4(), "webp": True}})

    async def run(self, request: Request) -> Response:
        number = request.path_params["source"]
        if number not in self.progress:
            raise NotFoundError("there is no such run")
        async with self.reading[number]:
            found = await asyncio.to_thread(self.progress[number].read, request.query_params.get("version", ""))
        return JSONResponse(found)

    async def grid(self, request: Request) -> Response:
        number = request.path_params["source"]
        if number not in self.progress:
            raise NotFoundError("there is no such run")
        content = await asyncio.to_thread(self.progress[number].grid_file, request.path_params["name"])
        return Response(content, media_type="image/png")

    # ----------------------------------------------------------------------------------------------------- generator

    async def generator(self, request: Request) -> Response:
        wanted = await _body(request)
        faces = self._chosen(wanted)
        return JSONResponse(await self._ask(_key(wanted, "generator"), lambda: faces().facts()))

    async def directions(self, request: Request) -> Response:
        wanted = await _body(request)
        faces = self._chosen(wanted)
        found = await self._ask(
            _key(wanted, "directions"), lambda: [{"name": d.name, "kind": d.kind} for d in faces().directions.values()]
        )
        return JSONResponse({"directions": found})

    async def picture(self, request: Request) -> Response:
        """PNG of a face; with `preview`, JPEG or WebP of the largest resolution that is fast; with `size`, enlarged or
        reduced to that number of columns or rows at most."""
        wanted = await _body(request)
        face, size = parse_face(wanted.get("face", {})), wanted.get("size")
        preview = wanted.get("preview", False)
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or not 8 <= size <= 4096):
            raise UsageError("size is not a whole number from 8 to 4096")
        if not isinstance(preview, bool):
            raise UsageError("preview is true or false")
        chosen = self._chosen(wanted)

        def make() -> tuple[bytes, str, dict[str, str]]:
            faces = chosen()
            resolution = _fitting_resolution(faces, preview, size)
            image = faces.picture(face, resolution)
            height, width = image.shape[1:]
            content, kind = encoded(image, fast=preview, size=size)
            return content, kind, {"x-picture": f"{width}x{height}", "x-whole": str(int(not resolution))}

        content, kind, headers = await self._ask(_key(wanted, "picture"), make)
        return Response(content, media_type=kind, headers=headers)

    # -------------------------------------------------------------------------------------------------------- videos

    async def make_film(self, request: Request) -> Response:
        wanted = await _body(request)
        asked = film.parse_film(wanted.get("film"))
        if asked.format == "mp4" and not film.has_mp4():
            raise UsageError("MP4 needs PyAV: pip install 'stylegan-pg[video]', or choose WebP")
        if sum(not (job.content or job.problem) for job in self.films.values()) >= MOST_FILMS:
            raise BusyError
        number, chosen = wanted.get("source"), self._chosen(wanted)

        def frames() -> tuple[Any, int, int]:
            faces = chosen()
            height, width = faces.G.img_size
            if asked.kind == "faces":
                return film.face_frames(faces, asked, self.batch), height, width
            names = [s.name for s in self.library.source(number).snapshots()]

            def load(name: str) -> Faces:
                return self.library.faces(number, name)

            newest = film.newest_of(load, names).G
            (height, width), channels = newest.img_size, newest.img_channels
            return film.training_frames(load, names, asked, (height, width), channels), height, width

        job, name = film.Job(asked, frames), secrets.token_hex(8)
        self.films[name] = job
        finished = [key for key, other in self.films.items() if other.content or other.problem]
        for key in finished[:-MOST_FILMS]:
            del self.films[key]
        self.worker.steps(job.run())
        return JSONResponse({"film": name, "frames": job.total}, 202)

    def _film(self, request: Request) -> film.Job:
        job = self.films.get(request.path_params["film"])
        if job is None:
            raise NotFoundError("there is no such film (any more)")
        return job

    async def film_state(self, request: Request) -> Response:
        job = self._film(request)
        state = {"done": job.done, "frames": job.total, "ready": bool(job.content), "problem": job.problem}
        return JSONResponse(state | {"bytes": len(job.content)})

    async def film_file(self, request: Request) -> Response:
        job = self._film(request)
        if not job.content:
            raise NotFoundError("this film is not finished")
        disposition = {"content-disposition": f'attachment; filename="faces.{job.film.format}"'}
        return Response(job.content, media_type=film.FORMATS[job.film.format], headers=disposition)

    async def cancel_film(self, request: Request) -> Response:
        job = self._film(request)
        job.cancelled = True
        del self.films[request.path_params["film"]]
        return JSONResponse({})

    # ------------------------------------------------------------------------------------------------------- helpers

    def _chosen(self, wanted: dict[str, Any]) -> Callable[[], Faces]:
        number, name = wanted.get("source"), wanted.get("snapshot")
        self.library.source(number)
        if not isinstance(name, str):
            raise UsageError("snapshot is the name of one")
        return lambda: self.library.faces(number, name)

    async def _ask(self, key: str, function: Callable[[], Any]) -> Any:
        return await asyncio.wrap_future(self.worker.ask(key, function))


def _fitting_resolution(faces: Faces, preview: bool, size: int | None) -> int:
    """0 for the whole picture, or the resolution at which a picture is made: that of a fast preview; and for a
    thumbnail, the smallest that has at least `size` columns."""
    if preview and size is not None:
        smaller = [r for r in faces.resolutions[1:] if r >= size]
        return smaller[-1] if smaller else 0
    return faces.preview_resolution() if preview else 0


def encoded(image: torch.Tensor, *, fast: bool, size: int | None = None) -> tuple[bytes, str]:
    """A file of a picture, uint8 [C, H, W], and its media type: PNG; or with `fast` JPEG, or WebP where there is an
    alpha channel."""
    picture = to_pil(image)
    if size is not None and size < max(picture.size):
        scale = size / max(picture.size)
        shape = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        picture = picture.resize(shape, Image.Resampling.BOX)
    buffer = io.BytesIO()
    if not fast:
        picture.save(buffer, "PNG", compress_level=1 if picture.width * picture.height > 1 << 16 else 6)
        return buffer.getvalue(), "image/png"
    if picture.mode == "RGBA":
        picture.save(buffer, "WEBP", quality=90, method=0)
        return buffer.getvalue(), "image/webp"
    picture.save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue(), "image/jpeg"


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
        UsageError: it is no JSON object. HTTPException: it is of another type, or too large.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "requests are JSON")
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MOST_BODY:
            raise HTTPException(413, f"a request has at most {MOST_BODY} bytes")
    found = parse_json(bytes(content), "the request", "send a JSON object", max_bytes=MOST_BODY, max_depth=8)
    if not isinstance(found, dict):
        raise UsageError("the request is no JSON object")
    return found


def _key(wanted: dict[str, Any], kind: str) -> str:
    """Requests of one page with the same channel replace each other."""
    client, channel = wanted.get("client"), wanted.get("channel", "")
    if not isinstance(client, str) or not isinstance(channel, str) or len(client) + len(channel) > 200:
        raise UsageError("client and channel are short texts")
    return f"{kind}/{client}/{channel}"


def _page_file(name: str) -> bytes:
    return (importlib.resources.files("stylegan_pg.explorer") / "page" / name).read_bytes()


def _fault(request: Request, error: Exception) -> Response:
    """The answer to a request that fails: a status and a sentence."""
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code)
    if isinstance(error, SupersededError):
        return Response(status_code=204)  # no fault: a browser would report one on its console
    for kind, status, text in (
        (BusyError, 503, "too much is waiting: try again in a moment"),
        (NotFoundError, 404, ""),
        (UsageError, 400, ""),
        (RunError, 422, ""),
        (ClientDisconnect, 400, "the connection was closed"),
    ):
        if isinstance(error, kind):
            return JSONResponse({"error": text or printable(error, 1000)}, status)
    told = film.message(error)
    if "not enough memory" in told:
        return JSONResponse({"error": told}, 503)
    log.error(f"the explorer could not answer {request.url.path}: {type(error).__name__}: {printable(error)}")
    return JSONResponse({"error": "an unexpected fault, which the command's output names"}, 500)


def _guarded(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except asyncio.CancelledError:  # also of a worker that was closed
            return JSONResponse({"error": "the explorer ends"}, 503)
        except Exception as error:
            return _fault(request, error)

    return answer


def application(explorer: Explorer, names: Collection[str], any_address: bool) -> ASGIApp:
    """The ASGI application; for `names` and `any_address` see Guard."""
    e = explorer
    routes = [
        ("/", e.page, "GET"),
        ("/page/{name}", e.asset, "GET"),
        ("/api/sources", e.sources, "GET"),
        ("/api/runs/{source:int}", e.run, "GET"),
        ("/api/runs/{source:int}/grids/{name}", e.grid, "GET"),
        ("/api/generator", e.generator, "POST"),
        ("/api/directions", e.directions, "POST"),
        ("/api/picture", e.picture, "POST"),
        ("/api/films", e.make_film, "POST"),
        ("/api/films/{film}", e.film_state, "GET"),
        ("/api/films/{film}", e.cancel_film, "DELETE"),
        ("/api/films/{film}/file", e.film_file, "GET"),
    ]
    made = [Route(path, _guarded(endpoint), methods=[method]) for path, endpoint, method in routes]
    app = Starlette(routes=made, exception_handlers={HTTPException: _fault, Exception: _fault})
    return Guard(app, names, any_address)
