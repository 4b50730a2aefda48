"""docs/serving.md: its commands and lines, run as they stand there."""

import contextlib
import os
import re
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
from by_heart import CHATS, learn, neox
from conftest import BIN, ROOT, free_port
from transformers import AutoTokenizer

from data.dialogue import prepare_tokenizer
from run.model_files import save_model

for package in ("fastapi", "openai"):  # looked for, not imported: by each process that only collects tests, too
    if not find_spec(package):
        pytest.skip(f"could not import {package!r}", allow_module_level=True)

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """`transformers serve exported`, as the page says it, with another port: (folder it was started in, port)."""
    folder = tmp_path_factory.mktemp("serving")
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(ROOT / "recipes" / "demo_data" / "model"))
    save_model(learn(neox(tokenizer), tokenizer), tokenizer, folder / "exported")
    port = free_port()
    command = re.search(r"^    (transformers serve .*)$", PAGE, re.MULTILINE)[1].replace("8000", str(port)).split()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HOME": str(folder)}
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [BIN / command[0], *command[1:]], cwd=folder, env=environment, stdout=output, stderr=output
        )
    try:
        for _ in range(240):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                assert answer.status == 200
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.5)
        yield folder, port
    finally:
        process.terminate()
        process.wait(timeout=30)


def run_client(lines: str, folder: Path) -> str:
    run = subprocess.run([sys.executable, "-c", lines], cwd=folder, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_lines_of_the_page(server):
    folder, port = server
    lines = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1].replace("8000", str(port))
    question, answer = next(iter(CHATS.items()))
    assert question in lines
    assert run_client(lines, folder) == f"{answer}\n{answer}"  # at once, and streamed


def test_a_reply_ends_at_the_stop_token_and_is_the_same_each_time(server):
    from openai import OpenAI

    _, port = server
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    for question, answer in CHATS.items():
        messages = [{"role": "user", "content": question}]
        replies = [
            client.chat.completions.create(model="exported", messages=messages, temperature=0, max_tokens=60)
            for _ in range(2)
        ]
        assert [reply.choices[0].message.content for reply in replies] == [answer, answer]
        assert {reply.choices[0].finish_reason for reply in replies} == {"stop"}
    prompt = f"<|prompter|>{question}<|endoftext|><|assistant|>"
    whole = client.completions.create(model="exported", prompt=prompt, temperature=0, max_tokens=60)
    assert whole.choices[0].text == answer
