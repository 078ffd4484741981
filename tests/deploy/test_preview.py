"""The preview of the dashboard: drawn from what a Prometheus answers."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.etree import ElementTree

import pytest

PREVIEW = Path(__file__).parents[2] / "deploy" / "grafana" / "preview.py"
SVG = "{http://www.w3.org/2000/svg}"


class Answers(BaseHTTPRequestHandler):
    """A rising line for every query."""

    def do_GET(self) -> None:
        asked = dict(urllib.parse.parse_qsl(urllib.parse.urlparse(self.path).query))
        start, end = float(asked["start"]), float(asked["end"])
        assert "$" not in asked["query"], "a variable was left"
        values = [[start + (end - start) * part / 9, str(1 + part)] for part in range(9)] + [[end, "NaN"]]
        labels = dict.fromkeys(("tier", "cause", "reason", "decision", "outcome", "worker", "level"), "default")
        body = json.dumps({"data": {"result": [{"metric": labels, "values": values}]}}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture
def prometheus() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_rows_that_were_asked_for_are_drawn_with_their_data(prometheus: str, tmp_path: Path) -> None:
    picture = tmp_path / "wall.svg"
    command = [sys.executable, str(PREVIEW), prometheus, str(picture), "--model", "tiny", "--rows", "Now,Wall"]
    subprocess.run(command, check=True, timeout=60)
    root = ElementTree.parse(picture).getroot()
    words = {element.text for element in root.iter(f"{SVG}text")}
    assert {"⌄  Wall · tiny", "Roofline", "Step seconds by cause", "Refused"} <= words
    assert not any("Promise ·" in (word or "") for word in words)
    assert "No data" not in words
    assert "900 %" in words, "the last number of a share, in its unit"
    assert any("stroke-dasharray" in element.attrib for element in root.iter(f"{SVG}path"))
