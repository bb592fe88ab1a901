"""Pretrained weights by hub name, against a small hub of our own on this machine."""

import functools
import hashlib
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from random_weights import random_weights, same_tensors

from nanogpt_fast.weights.formats import read, write
from nanogpt_fast.weights.huggingface import load_pretrained

pytest.importorskip("huggingface_hub")


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves one repository as the hub does: commit and ETag in the headers."""

    def __init__(self, files: dict[str, bytes], asked: list[str], *args):
        self.files, self.asked = files, asked
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        body = self.files.get(self.path)
        self.send_response(200 if body is not None else 404)
        for name, value in (
            ("X-Repo-Commit", "a" * 40),
            ("ETag", f'"{hashlib.sha1(body or b"").hexdigest()}"'),
            ("Content-Length", str(len(body or b""))),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET" and body is not None:
            self.wfile.write(body)

    do_GET = do_HEAD

    def log_message(self, *_) -> None:
        pass


LOAD = """
import sys, time
from nanogpt_fast.weights.huggingface import load_pretrained
from nanogpt_fast.errors import CheckpointError
start = time.monotonic()
try:
    print("loaded", sum(float(t.sum()) for t in load_pretrained("gpt2").model.values()))
except CheckpointError as error:
    print(error)
print("seconds", time.monotonic() - start)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(random_weights(activation="gelu_tanh"), tmp_path / "hf", "hf")


def load_in_new_process(endpoint: str, cache: Path) -> list[str]:
    env = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "HUGGING")) and "proxy" not in key.lower()
    }
    env |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    ran = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True, env=env, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def test_hub_name_is_fetched_once_then_read_from_the_cache(folder, tmp_path):
    root = "/openai-community/gpt2/resolve/main/"
    files = {root + name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    asked: list[str] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, files, asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    expected = f"loaded {sum(float(t.sum()) for t in read(folder).model.values())}"
    try:
        assert load_in_new_process(endpoint, tmp_path / "cache")[0] == expected
    finally:
        server.shutdown()
        server.server_close()
    assert {request.split()[1] for request in asked} == set(files)  # these two files and nothing else
    assert load_in_new_process(endpoint, tmp_path / "cache")[0] == expected  # nobody answers there now


def test_no_network_fails_fast_and_says_what_to_do(tmp_path):
    *message, seconds = load_in_new_process("http://127.0.0.1:9", tmp_path / "cache")
    text = "\n".join(message)
    for word in ("openai-community/gpt2", "config.json", "model.safetensors", "--init_from=FOLDER"):
        assert word in text
    assert float(seconds.split()[1]) < 10  # hf_hub_download alone retries for 23 s


def test_load_pretrained_takes_a_folder(folder):
    assert same_tensors(load_pretrained(str(folder)).model, random_weights().model)
