"""Grand Challenge's `invoke` interface: an HTTP server that is asked for its health once, and then case by case.

ISLES'26 gives a T1 image (and a table of the stroke, which no model of this package looks at) and wants a mask and a
probability map, on the image's grid. A case that fails is answered with 500 and a reason, and the next one is served.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from nnunet_ssl.deployment.resources import measured
from nnunet_ssl.deployment.segmenting import Segmenter
from nnunet_ssl.errors import UserError
from nnunet_ssl.imaging.metaimage import META, NIFTI, read_image, write_image

PORT = 4743
IMAGE = "images/t1-brain-mri"
MASK = "images/stroke-lesion-segmentation"
MAP = "images/lesion-probability-map"

logger = logging.getLogger(__name__)


def make_server(load: Callable[[], Segmenter], source: Path, target: Path, port: int = PORT) -> ThreadingHTTPServer:
    """Return a server that loads its model when it is first asked for anything, and handles one case at a time.

    Once the model is loaded, health is told at once, even amid a case.

    Args:
        load: gives the model; called once, unless it fails.
        source: Grand Challenge's ``/input``.
        target: its ``/output``.
        port: 0 takes any that is free.
    """
    loading, handling = threading.Lock(), threading.Lock()
    loaded: list[Segmenter] = []

    def model() -> Segmenter:
        with loading:
            if not loaded:
                with measured() as used:
                    loaded.append(load())
                logger.info("model loaded: %s", ", ".join(used))
        return loaded[0]

    def invoke() -> None:
        with handling:
            handle_case(model(), source, target)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, model) if self.path == "/health" else self._reply(404, f"there is no {self.path}")

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._answer(201, invoke) if self.path == "/invoke" else self._reply(404, f"there is no {self.path}")

        def _answer(self, status: int, work: Callable[[], object]) -> None:
            try:
                work()
            except (UserError, OSError) as error:
                logger.error("error: %s", error)
                self._reply(500, str(error))
            except Exception as error:
                logger.exception("The case failed.")
                self._reply(500, f"{type(error).__name__}: {error}")
            else:
                self._reply(status, "ok")

        def _reply(self, status: int, text: str) -> None:
            body = json.dumps({"detail": text}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *values: object) -> None:
            logger.info(format, *values)

    return ThreadingHTTPServer(("0.0.0.0", port), Handler)


def handle_case(model: Segmenter, source: Path, target: Path) -> None:
    """Segment the case that lies in `source`; what an earlier case left in `target` goes first.

    Raises:
        UserError: there is not exactly one image, or it can't be read.
    """
    image = _only_image(source / IMAGE)
    with measured() as used:
        for folder in (target / MASK, target / MAP):
            for old in folder.glob("*.mha"):
                old.unlink()
        result = model.segment([read_image(image)])
        name = image.name.removesuffix(next(end for end in (*NIFTI, *META) if image.name.endswith(end))) + ".mha"
        write_image(target / MASK / name, result.labels)
        write_image(target / MAP / name, result.probabilities)
    volume = result.labels
    shape = " x ".join(map(str, volume.array.shape))
    found = result.describe_volume()
    logger.info("%s (%s, %s): %s; %s", image.name, shape, volume.orientation, found, ", ".join(used))


def _only_image(folder: Path) -> Path:
    found = sorted(path for path in folder.glob("*") if path.name.endswith((*NIFTI, *META)))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"{folder} must hold one image, {' or '.join((*NIFTI, *META))}; found: {names}.")
    return found[0]
