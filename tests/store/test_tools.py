"""The tools that people use open a saved folder by its path, from the command line and without moeify.

pip install moeify[tools]
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from moeify import Recipe, load, save, sparsify
from moeify.data.claim_files import data_file
from tiny_models import causal_lm, widened

TOOLS = "it comes with the extra moeify[tools]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sparse Llama and its tokenizer: of stories if the data folder is there, else with random weights."""
    folder = tmp_path_factory.mktemp("tools") / "sparse"
    try:
        files = [data_file(f"stories260k/hf/{name}") for name in ("config.json", "model.safetensors", "tokenizer.json")]
        model, tokenizer = (auto.from_pretrained(files[0].parent) for auto in (AutoModelForCausalLM, AutoTokenizer))
    except FileNotFoundError:
        model, tokenizer = widened(causal_lm("llama")), words()
    save(sparsify(model, Recipe(num_experts=4), verbose=False), folder)
    tokenizer.save_pretrained(folder)
    return folder


def words() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = ["<pad>", "<s>", "</s>", "<unk>", "once", "upon", "a", "time", "there", "was", "dog", "girl", "the", "."]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def environment(folder: Path) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return own | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder.parent / "hf"), "OMP_NUM_THREADS": "1"}


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], env=environment(folder), cwd=folder.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def greedy(folder: Path, prompt: str, new_tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    generated = load(folder).generate(ids, max_new_tokens=new_tokens, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(generated, skip_special_tokens=True)


def test_lm_eval_scores_a_folder(folder):
    pytest.importorskip("lm_eval", reason=TOOLS)
    tasks = folder.parent / "tasks"
    tasks.mkdir()
    rows = [{"text": "once upon a time there", "choices": ["was a dog", "girl the and"], "label": 0}]
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "stories",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tasks / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    (tasks / "stories.yaml").write_text(json.dumps(task))  # JSON is YAML
    model = f"pretrained={folder},trust_remote_code=True"
    out = run(
        folder, "-m", "lm_eval", "--model", "hf", "--model_args", model, "--tasks", "stories",
        "--include_path", str(tasks), "--device", "cpu", "--log_samples",
        "--output_path", str(folder.parent / "scores"),
    )  # fmt: skip
    assert re.search(r"\|stories.*\|acc +\|", out)
    (samples,) = (folder.parent / "scores").rglob("samples_stories_*.jsonl")
    measured = [float(answer[0][0]) for answer in json.loads(samples.read_text())["resps"]]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load(folder)
    for choice, score in zip(rows[0]["choices"], measured, strict=True):
        start = tokenizer(rows[0]["text"], return_tensors="pt").input_ids.shape[1]
        ids = tokenizer(f"{rows[0]['text']} {choice}", return_tensors="pt").input_ids
        with torch.no_grad():
            logs = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[start - 1 :]
        assert abs(float(logs.sum()) - score) < 1e-4


def test_transformers_serve_answers_the_client_of_openai(folder):
    openai = pytest.importorskip("openai", reason=TOOLS)
    for library in ("fastapi", "uvicorn"):
        pytest.importorskip(library, reason=TOOLS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "transformers.cli.transformers", "serve", str(folder), "--trust-remote-code"]
    options = ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with (folder.parent / "serve.log").open("w") as log:
        server = subprocess.Popen([sys.executable, *command, *options], env=environment(folder), stdout=log, stderr=log)
    try:
        while not _is_up(port):
            assert server.poll() is None, (folder.parent / "serve.log").read_text()
            time.sleep(0.5)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-")
        answer = client.completions.create(model=str(folder), prompt="once upon", max_tokens=8, temperature=0)
    finally:
        server.terminate()
        server.wait()
    assert answer.choices[0].text.split() == greedy(folder, "once upon", 8).split()


def _is_up(port: int) -> bool:
    try:
        return urlopen(f"http://127.0.0.1:{port}/health").status == 200
    except OSError:
        return False


def test_trl_trains_a_folder_and_what_it_saves_opens(folder):
    pytest.importorskip("trl", reason=TOOLS)
    data, out = folder.parent / "data", folder.parent / "trained"
    data.mkdir()
    (data / "train.jsonl").write_text('{"text": "once upon a time there was a dog ."}\n' * 4)
    run(
        folder, "-c", "from trl.cli.main import main; main()", "sft",
        "--model_name_or_path", str(folder), "--trust_remote_code", "true",
        "--dataset_name", str(data), "--output_dir", str(out), "--max_steps", "2", "--learning_rate", "0.01",
        "--per_device_train_batch_size", "2", "--max_length", "16", "--use_cpu", "true", "--bf16", "false",
        "--report_to", "none", "--save_strategy", "no",
    )  # fmt: skip
    ids = torch.tensor([[5, 6, 7, 8]])
    trained = load(out)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(ids).logits, trained(ids).logits)
    moved = {name for name, value in trained.named_parameters() if not value.equal(load(folder).get_parameter(name))}
    assert {"model.layers.0.mlp.router.weight", "model.layers.0.mlp.experts.down_proj"} <= moved
