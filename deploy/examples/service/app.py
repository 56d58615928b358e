"""The service: a built model behind KServe's v2 inference protocol, with health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import protocol
from batcher import Batcher, Busy
from inputs import Limits, understand
from metrics import Metrics
from protocol import Refused
from vitprune import __version__
from vitprune_deploy.runtime import Model

VERSION = "1"

log = logging.getLogger("service")


class Service:
    """A model, and the answers that it gives to requests.

    Args:
        name: of the model in the service's paths.
    """

    def __init__(self, model: Model, name: str, limits: Limits) -> None:
        self.model, self.name, self.limits = model, name, limits
        self.batcher = Batcher(self._run, most=model.max_batch, places=limits.places)
        self.metrics = Metrics(lambda: self.batcher.taken)
        self._working: asyncio.Task[None] | None = None

    def app(self) -> FastAPI:
        """The application that a server such as uvicorn runs."""
        app = FastAPI(title="vitprune", lifespan=self._lifespan, openapi_url=None)
        app.exception_handler(Refused)(_refused)
        app.exception_handler(HTTPException)(_no_such_path)
        app.add_api_route("/metrics", self.metrics.page)
        app.add_api_route("/v2", self.about)
        app.add_api_route("/v2/health/live", self.live)
        app.add_api_route("/v2/health/ready", self.ready)
        for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            app.add_api_route(path, self.metadata)
            app.add_api_route(f"{path}/ready", self.model_ready)
            app.add_api_route(f"{path}/infer", self.infer, methods=["POST"])
        return app

    async def live(self) -> Response:
        """The process is there."""
        return Response()

    async def ready(self) -> Response:
        """Requests will be answered."""
        working = self._working is not None and not self._working.done()
        return Response(status_code=200 if working else 503)

    async def model_ready(self, model: str, version: str = VERSION) -> Response:
        """As ``ready``, of the one model that is here."""
        self._know(model, version)
        return await self.ready()

    async def about(self) -> dict[str, Any]:
        """The server's metadata."""
        return {"name": "vitprune", "version": __version__, "extensions": ["binary_tensor_data", "classification"]}

    async def metadata(self, model: str, version: str = VERSION) -> dict[str, Any]:
        """The model's metadata."""
        self._know(model, version)
        backend, image = self.model.backend, self.model.preprocess.input_size
        classes = [size if isinstance(size, int) else -1 for size in backend.outputs[0].shape[1:]]
        return {
            "name": self.name,
            "versions": [VERSION],
            "platform": backend.runtime.replace(" ", "_"),
            "inputs": [{"name": backend.inputs[0].name, "datatype": "FP32", "shape": [-1, *image]}],
            "outputs": [{"name": backend.outputs[0].name, "datatype": "FP32", "shape": [-1, *classes]}],
        }

    async def infer(self, request: Request, model: str, version: str = VERSION) -> Response:
        """The model's answer, or a sentence about what is wrong with the request."""
        start = time.perf_counter()
        try:
            self._know(model, version)
            with self.batcher.place():
                response = await self._answer(request)
        except Busy:
            response = _error(503, f"all {self.limits.places} places are taken; try again in a moment")
        except Refused as error:
            response = _error(error.status, str(error))
        except Exception:
            log.exception("a request failed")
            response = _error(500, "the service failed on this request; its log says why")
        self.metrics.answered(response.status_code, time.perf_counter() - start)
        return response

    async def _answer(self, request: Request) -> Response:
        try:
            body = await asyncio.wait_for(self._body(request), self.limits.read_s)
        except asyncio.TimeoutError:
            raise Refused(408, f"the request did not arrive within {self.limits.read_s:g} s") from None
        header = request.headers.get(protocol.HEADER)
        asked, inputs = await asyncio.to_thread(understand, self.model, self.limits, body, header)
        logits = await self.batcher.outputs(inputs)
        if not np.isfinite(logits).all():
            raise Refused(422, "the model has no finite answer to this input; are the images preprocessed?")
        output = self.model.backend.outputs[0].name
        content, headers = protocol.answer(asked, self.name, VERSION, output, logits, self.model.classes)
        return Response(content, headers=headers)

    async def _body(self, request: Request) -> bytes:
        """The body; one that is too large is read to its end, since who is cut off while sending sees no answer."""
        if request.headers.get("content-encoding", "identity") != "identity":
            raise Refused(415, "compressed requests are not taken; send this one as it is")
        chunks: list[bytes] = []
        size, most = 0, self.limits.body_bytes
        try:
            async for chunk in request.stream():
                size += len(chunk)
                if size <= most:
                    chunks.append(chunk)
        except ClientDisconnect:
            raise Refused(400, "the connection was closed before the request was complete") from None
        if size > most:
            raise Refused(413, f"a request may have {most} bytes, this one has {size}; split it")
        return b"".join(chunks)

    def _know(self, model: str, version: str) -> None:
        if (model, version) != (self.name, VERSION):
            raise Refused(404, f"the model here is version {VERSION} of {self.name!r}, not {version} of {model!r}")

    def _run(self, inputs: np.ndarray) -> np.ndarray:
        with self.metrics.batch(len(inputs)):
            return self.model.predict(inputs).logits

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """The batcher works while the server runs; the server ends this when the last request is answered."""
        self._working = asyncio.create_task(self.batcher.work())
        yield
        self._working.cancel()
        self.model.close()


def _error(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"error": sentence}, status)


async def _refused(_: Request, error: Refused) -> Response:
    return _error(error.status, str(error))


async def _no_such_path(request: Request, error: HTTPException) -> Response:
    return _error(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
