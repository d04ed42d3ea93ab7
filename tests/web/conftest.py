"""A real browser without a screen, for the tests of pages. They skip where there is none."""

from __future__ import annotations

import http.client
import io
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from diff2to3.pipeline import ImageTo3D, Result
from diff2to3.types import Gaussians
from diff2to3.web.guard import Guard
from diff2to3.web.server import Server
from diff2to3.web.service import Limits, Service

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Playwright's browser over the system's Chromium, drawing in software."""
    found = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    arguments = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def new_page(chromium: Any) -> Iterator[Callable[[], Any]]:
    """Opens pages, each of its own user; the test fails if a script failed or a page's policy was violated."""
    contexts, faults = [], []

    def watch(message: Any) -> None:
        if "Content Security Policy" in message.text:
            faults.append(message.text)

    def start() -> Any:
        contexts.append(chromium.new_context(viewport={"width": 480, "height": 360}, accept_downloads=True))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", watch)
        return page

    yield start
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture
def page(new_page: Callable[[], Any]) -> Any:
    return new_page()


@pytest.fixture
def cloud() -> Gaussians:
    """900 Gaussians in the unit box, from needles to discs, faint and solid, with harmonics of degree 3."""
    generator = torch.Generator().manual_seed(5)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    return Gaussians(
        uniform(900, 3) - 0.5,
        torch.randn(900, 4, generator=generator),
        torch.exp(-6.5 + 3.5 * uniform(900, 3)),
        uniform(900).clamp(0.01, 0.99),
        torch.cat([3 * uniform(900, 1, 3) - 1.5, 0.4 * torch.randn(900, 15, 3, generator=generator)], 1),
    )


# ---- a server in this process ----


class Held:
    """A real, tiny generator that waits before every step while ``open`` is not set."""

    def __init__(self, model: ImageTo3D) -> None:
        self.model = model
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, pictures: Any, *, progress: Callable[[str, int, int], None], **options: Any) -> Result:
        self.calls += 1

        def held(stage: str, step: int, steps: int) -> None:
            self.entered.set()
            assert self.open.wait(60)
            progress(stage, step, steps)

        return self.model(pictures, progress=held, **options)


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Client:
    """Requests to a server in this process, on its real socket."""

    server: Server
    model: Held

    @property
    def port(self) -> int:
        return int(self.server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __call__(
        self, method: str, path: str, body: bytes | str | None = None, headers: dict[str, str] | None = None
    ) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        reply = Reply(response.status, dict(response.getheaders()), response.read())
        connection.close()
        return reply

    def post(self, path: str, value: Any) -> Reply:
        return self("POST", path, json.dumps(value), {"Content-Type": "application/json"})

    def photo(self, data: bytes) -> str:
        reply = self("POST", "/api/photos", data)
        assert reply.status == 201, reply.body
        return str(reply.json()["id"])

    def wait(self, job_id: str, *states: str) -> Any:
        for _ in range(600):
            status = self("GET", f"/api/jobs/{job_id}").json()
            if status["state"] in states:
                return status
            threading.Event().wait(0.05)
        raise AssertionError(f"the job stays {status}")


@pytest.fixture(scope="session")
def tiny(load_source: Callable[[Path], ModuleType]) -> ModuleType:
    """tests/tiny_generator.py."""
    return load_source(Path(__file__).resolve().parents[1] / "tiny_generator.py")


@pytest.fixture(scope="session")
def bundle(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny.write_generator(tmp_path_factory.mktemp("bundle") / "tiny"))


@pytest.fixture(scope="session")
def tiny_model(bundle: Path) -> ImageTo3D:
    return ImageTo3D.from_pretrained(str(bundle))


@pytest.fixture(scope="session")
def photo_bytes(tiny: ModuleType) -> bytes:
    """A photo on transparency, as a PNG."""
    buffer = io.BytesIO()
    tiny.photo(0).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def serve(tiny_model: ImageTo3D) -> Iterator[Callable[..., Client]]:
    """Starts servers: serve(token=…, waiting=…, …)."""
    started: list[Client] = []

    def start(token: str | None = None, **limits: int) -> Client:
        model = Held(tiny_model)
        server = Server(("127.0.0.1", 0), Service(model, "tiny", Limits(**limits)), Guard(token))  # type: ignore[arg-type]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        started.append(Client(server, model))
        return started[-1]

    yield start
    for client in started:
        client.model.open.set()
        client.server.shutdown()
        client.server.close()


@pytest.fixture
def client(serve: Callable[..., Client]) -> Client:
    return serve()
