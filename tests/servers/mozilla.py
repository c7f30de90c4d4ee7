"""A loopback Mozilla Data Collective: one data set, an API key, a signed download."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading

SECRET = "mdc-s3cret-key-0123456789"
SIGNATURE = "X-Amz-Signature=f00dcafe"


class Collective:
    """A server with one data set, an archive. `faults` change its responses."""

    def __init__(self, archive: bytes, dataset: str, name: str):
        self.dataset = dataset
        self.archive = archive
        self.details = {"id": dataset, "filename": name, "sizeBytes": len(archive)}
        self.details["checksum"] = hashlib.sha256(archive).hexdigest()
        self.faults: dict = {}
        self.requests: list[tuple[str, str, str]] = []
        collective = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                collective.answer(self)

            do_POST = do_GET

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request) -> None:
        path = request.path.partition("?")[0]
        self.requests.append((request.command, path, request.headers.get("Range", "")))
        status, body = self.faults.get((request.command, path), (None, None))
        if status:
            return self.send(request, status, body if isinstance(body, bytes) else json.dumps(body).encode())
        if path == f"/api/datasets/{self.dataset}":
            return self.send(request, 200, json.dumps(self.details).encode())
        if path == f"/api/datasets/{self.dataset}/download":
            if request.headers.get("Authorization") != f"Bearer {SECRET}":
                return self.send(request, 401, b'{"message": "unknown key"}')
            plan = {"downloadUrl": f"{self.address}/file?{SIGNATURE}", "sizeBytes": self.details["sizeBytes"]}
            return self.send(request, 200, json.dumps({**plan, "checksum": self.details["checksum"]}).encode())
        if path == "/file":
            assert "Authorization" not in request.headers
            return self.send_archive(request)
        return self.send(request, 404, b'{"message": "not here"}')

    def send_archive(self, request) -> None:
        start = int((request.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        body = self.archive[start:]
        upto = self.faults.get("cut after", len(body))
        request.send_response(206 if start else 200)
        if not self.faults.get("no length"):
            request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[:upto])
        request.close_connection = True

    @staticmethod
    def send(request, status: int, body: bytes) -> None:
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)
