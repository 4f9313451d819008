"""Ask a running server from Python: `Client`, and `AsyncClient` for asyncio (docs/client.md).

It imports neither torch, FastAPI nor an engine; httpx2 comes with the extra `client`.
"""

import asyncio
import math
import os
import random
import time
from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

try:
    import httpx2
except ImportError as missing:
    raise ImportError("the client needs httpx2: pip install '.[client]'") from missing
from anyio.from_thread import BlockingPortal, start_blocking_portal
from pydantic import TypeAdapter, ValidationError

from app.files import images_in
from app.model.flips import Tta
from app.model.metadata import Sex, Site
from app.model.overlay import Method, Style
from app.schemas import BatchItem, Explanation, Health, Models, Prediction, Problem

Image = bytes | str | os.PathLike[str] | BinaryIO
"""An encoded image (JPEG, PNG, WebP): its bytes, its path, or a file opened in binary mode."""

CONNECT_S = 5.0  # longest wait for a connection, of one try
ANSWER_S = 0.2  # of the time that is left, kept for the answer's way back
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 10.0  # before a try again, where the server does not say how long
BATCH_ITEMS = TypeAdapter(list[BatchItem])


class DermlensError(RuntimeError):
    """No answer; `problem` says why, as the server told it or, where none did, as the client does."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(f"{problem.title}: {problem.detail}")
        self.problem = problem


class BadImage(DermlensError):
    """This image cannot be classified; the same bytes never will be."""


class BadRequest(DermlensError):
    """The server does not take such a request: a parameter, a route, a body."""


class NotAllowed(DermlensError):
    """No API key, one that is not known, or one without the right."""


class Busy(DermlensError):
    """The server had no room, or the key no requests left, until the time was up."""


class TooLate(DermlensError):
    """The time was up before the answer came."""


class Unreachable(DermlensError):
    """No server answered until the time was up."""


class ServerFailed(DermlensError):
    """A fault of the server; its log has more under `problem.request_id`."""


OF_AN_IMAGE = ("not-an-image", "image-too-large", "image-too-small", "format-not-served", "body-too-large")
BY_STATUS: dict[int, type[DermlensError]] = {
    401: NotAllowed,
    403: NotAllowed,
    408: TooLate,
    429: Busy,
    502: Unreachable,  # says a proxy
    503: Busy,
    504: TooLate,
}
AGAIN = (429, 502, 503)


def error_of(problem: Problem) -> DermlensError:
    """The exception that a problem is raised as."""
    if problem.type.rpartition(":")[2] in OF_AN_IMAGE:
        return BadImage(problem)
    if known := BY_STATUS.get(problem.status):
        return known(problem)
    return (BadRequest if 400 <= problem.status < 500 else ServerFailed)(problem)


@dataclass(frozen=True)
class Scored:
    """What came of one file of `score`."""

    path: Path
    outcome: Prediction | DermlensError


class AsyncClient:
    """The server at an address; `async with AsyncClient(url) as client: …`, in one event loop.

    A request is tried again on 429, on 503 and where the connection fails, after a random wait that grows, and never
    sooner than `Retry-After` says, until its time is up: to ask twice changes nothing at the server.

    Args:
        url: of the server, with any path that a proxy puts before its routes.
        api_key: made by `dermlens keys new`.
        timeout_s: for one call with all its tries, seconds; the server is told what is left of it.
        background: let everybody else's images go first (`X-Priority: batch`).
        operating_point, coverage: of the decision; None for the server's own.
        tta: `flips` for the mean of four mirror images, at four times the work.
        max_batch_files, max_batch_bytes: limits of the server's /predict/batch. Larger batches are halved when refused.

    Raises:
        DermlensError: from each of its methods; OSError where a file cannot be read.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 60,
        background: bool = False,
        operating_point: str | None = None,
        coverage: str | None = None,
        tta: Tta = "none",
        max_batch_files: int = 32,
        max_batch_bytes: int = 100_000_000,
    ) -> None:
        headers = {"X-Priority": "batch" if background else "interactive", "Accept": "application/json"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        self._url = url
        self._http = httpx2.AsyncClient(base_url=url, headers=headers, timeout=httpx2.Timeout(None, connect=CONNECT_S))
        self._timeout_s = timeout_s
        self._rule = {"operating_point": operating_point, "coverage": coverage, "tta": None if tta == "none" else tta}
        self._max_batch_files = max_batch_files
        self._max_batch_bytes = max_batch_bytes

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.__aexit__(kind, error, trace)

    async def predict(
        self, image: Image, *, age: float | None = None, sex: Sex | None = None, site: Site | None = None
    ) -> Prediction:
        """Classify one image; `age` (years), `sex` and `site` are experimental, for a version that takes them."""
        known = {"age": age, "sex": sex, "site": site}
        response = await self._post("/predict", params=known, content=await _read(image))
        return Prediction.model_validate_json(response.content)

    async def predict_many(self, images: Sequence[Image]) -> list[Prediction | DermlensError]:
        """Classify many, in order, by /predict/batch; what fails alone is an error in its place.

        Raises:
            NotAllowed, BadRequest, Unreachable: the same would come of every image.
        """
        outcomes: list[Prediction | DermlensError] = []
        batch: list[bytes] = []
        for image in images:
            data = await _read(image)
            full = len(batch) == self._max_batch_files or sum(map(len, batch)) + len(data) > self._max_batch_bytes
            if batch and full:
                outcomes += await self._predict_batch(batch)
                batch = []
            batch.append(data)
        return outcomes + (await self._predict_batch(batch) if batch else [])

    async def explain(
        self,
        image: Image,
        *,
        target: str = "predicted",
        style: Style = "overlay",
        method: Method = "gradcam",
        alpha: float = 0.6,
        age: float | None = None,
        sex: Sex | None = None,
        site: Site | None = None,
    ) -> Explanation:
        """As `predict`, and show where the image's evidence for `target` lies; `overlay_png` is base64."""
        choice = {"target": target, "style": style, "method": method, "alpha": alpha}
        known = {"age": age, "sex": sex, "site": site}
        response = await self._post("/explain", params=choice | known, content=await _read(image))
        return Explanation.model_validate_json(response.content)

    async def models(self) -> Models:
        """The published versions and which one is served."""
        return Models.model_validate_json((await self._ask("GET", "/models")).content)

    async def ready(self) -> Health:
        """Whether the server takes work now, and if not, why; asked once."""
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._http.get("/readyz")
        except (httpx2.TransportError, TimeoutError) as error:
            raise self._unreachable(error) from error
        if response.status_code not in (200, 503):
            raise error_of(_problem_in(response))
        return Health.model_validate_json(response.content)

    async def score(
        self, paths: Iterable[Path], *, concurrency: int = 4, explain: bool = False
    ) -> AsyncGenerator[Scored, None]:
        """Classify files, each as it is done, with so many requests at once; `explain` gives `Explanation`s.

        Raises:
            NotAllowed, BadRequest, Unreachable: the same would come of every file.
        """
        waiting = iter(paths)
        running: set[asyncio.Task[Scored]] = set()
        try:
            while True:
                while len(running) < concurrency and (path := next(waiting, None)) is not None:
                    running.add(asyncio.create_task(self._score_one(path, explain=explain)))
                if not running:
                    return
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    scored = task.result()
                    running.discard(task)
                    yield scored
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def score_directory(
        self, folder: Path | str, *, recursive: bool = True, concurrency: int = 4, explain: bool = False
    ) -> AsyncGenerator[Scored, None]:
        """`score` for the image files of a folder."""
        images = images_in(Path(folder), recursive=recursive).images
        return self.score(images, concurrency=concurrency, explain=explain)

    async def _score_one(self, path: Path, *, explain: bool) -> Scored:
        try:
            return Scored(path, await (self.explain(path) if explain else self.predict(path)))
        except (NotAllowed, BadRequest, Unreachable):
            raise
        except DermlensError as error:
            return Scored(path, error)
        except OSError as error:
            return Scored(path, BadImage(_own_problem("unreadable", "The file cannot be read", str(error))))

    async def _predict_batch(self, images: list[bytes]) -> list[Prediction | DermlensError]:
        """The outcomes of one request; one that is refused for its size is asked again in halves."""
        try:
            files = [("files", (str(index), data)) for index, data in enumerate(images)]
            response = await self._post("/predict/batch", files=files)
        except (NotAllowed, Unreachable):
            raise
        except DermlensError as error:
            too_much = error.problem.status == 413 or error.problem.type.endswith(":malformed-upload")
            if too_much and len(images) > 1:
                half = len(images) // 2
                return [*await self._predict_batch(images[:half]), *await self._predict_batch(images[half:])]
            if isinstance(error, BadRequest):
                raise
            return [error] * len(images)
        items = BATCH_ITEMS.validate_json(response.content)
        return [item.prediction or error_of(item.problem or _problem_in(response)) for item in items]

    async def _post(self, path: str, *, params: dict[str, Any] | None = None, **body: Any) -> httpx2.Response:
        chosen = {key: value for key, value in (self._rule | (params or {})).items() if value is not None}
        return await self._ask("POST", path, params=chosen, **body)

    async def _ask(self, method: str, path: str, **what: Any) -> httpx2.Response:
        """The answer to a request, tried until the time is up."""
        give_up_at = time.monotonic() + self._timeout_s
        tries = 0
        while True:
            wait_s = 0.0
            left_s = give_up_at - time.monotonic()
            told_ms = max(1, math.floor(1000 * max(left_s - ANSWER_S, left_s / 2)))
            try:
                async with asyncio.timeout(left_s):
                    response = await self._http.request(method, path, headers={"X-Timeout-Ms": str(told_ms)}, **what)
            except TimeoutError as late:
                detail = f"no answer within {self._timeout_s:g} s"
                raise TooLate(_own_problem("too-late", "The deadline passed", detail)) from late
            except httpx2.TransportError as failed:
                error: DermlensError = self._unreachable(failed)
            else:
                if response.is_success:
                    return response
                error = error_of(_problem_in(response))
                if response.status_code not in AGAIN:
                    raise error
                wait_s = _seconds(response.headers.get("Retry-After", ""))
            # Some of it at random, so that those who were refused together do not come back together
            wait_s += random.uniform(0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**tries))  # noqa: S311 - no secret
            if time.monotonic() + wait_s >= give_up_at:
                raise error
            await asyncio.sleep(wait_s)
            tries += 1

    def _unreachable(self, error: Exception) -> Unreachable:
        detail = f"{self._url}: {error or type(error).__name__}"
        return Unreachable(_own_problem("unreachable", "No server answers", detail))


class Client:
    """`AsyncClient` for code without an event loop, which runs in a thread here: `with Client(url) as client: …`.

    Takes and raises what `AsyncClient` does; its methods may be called from several threads.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", **options: Any) -> None:
        self._client = AsyncClient(url, **options)
        self._portal: BlockingPortal
        self._stack: ExitStack

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._portal = stack.enter_context(start_blocking_portal())
            stack.enter_context(self._portal.wrap_async_context_manager(self._client))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def predict(
        self, image: Image, *, age: float | None = None, sex: Sex | None = None, site: Site | None = None
    ) -> Prediction:
        """As `AsyncClient.predict`."""
        return self._portal.call(lambda: self._client.predict(image, age=age, sex=sex, site=site))

    def predict_many(self, images: Sequence[Image]) -> list[Prediction | DermlensError]:
        """As `AsyncClient.predict_many`."""
        return self._portal.call(self._client.predict_many, images)

    def explain(self, image: Image, **options: Any) -> Explanation:
        """As `AsyncClient.explain`."""
        return self._portal.call(lambda: self._client.explain(image, **options))

    def models(self) -> Models:
        """As `AsyncClient.models`."""
        return self._portal.call(self._client.models)

    def ready(self) -> Health:
        """As `AsyncClient.ready`."""
        return self._portal.call(self._client.ready)

    def score(self, paths: Iterable[Path], **options: Any) -> Generator[Scored, None, None]:
        """As `AsyncClient.score`: requests go on while the caller works on what came."""
        return self._each(self._client.score(paths, **options))

    def score_directory(self, folder: Path | str, **options: Any) -> Generator[Scored, None, None]:
        """As `AsyncClient.score_directory`."""
        return self._each(self._client.score_directory(folder, **options))

    def _each(self, stream: AsyncGenerator[Scored, None]) -> Generator[Scored, None, None]:
        async def following() -> Scored | None:
            return await anext(stream, None)

        try:
            while (scored := self._portal.call(following)) is not None:
                yield scored
        finally:
            self._portal.call(stream.aclose)


async def _read(image: Image) -> bytes:
    """The bytes of an image; a disk keeps no other request waiting."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, (str, os.PathLike)):
        return await asyncio.to_thread(Path(image).read_bytes)
    return await asyncio.to_thread(image.read)


def _problem_in(response: httpx2.Response) -> Problem:
    """The problem that an answer tells; one of another kind, of a proxy maybe, is put into words."""
    try:
        return Problem.model_validate_json(response.content)
    except ValidationError:
        status = response.status_code
        title = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else f"Status {status}"
        request_id = response.headers.get("X-Request-ID", "")
        return Problem(
            type="about:blank", title=title, status=status, detail=response.text[:200], request_id=request_id
        )


def _own_problem(slug: Literal["unreachable", "too-late", "unreadable"], title: str, detail: str) -> Problem:
    return Problem(type=f"urn:dermlens:client:{slug}", title=title, status=0, detail=detail, request_id="")


def _seconds(retry_after: str) -> float:
    """Of `Retry-After`, where it is a number; a date says nothing to a clock that may be wrong."""
    return float(retry_after) if retry_after.isdecimal() else 0.0
