"""Kill one of two replicas of a training, and see the other train on and the killed one come back with equal experts.

Needs `pip install 'moeify[torchft]'`. Each replica is a process that runs `replica` below. On several machines, start
the lighthouse on one of them (`torchft_lighthouse --min_replicas 1`) and this file on each:

    TORCHFT_LIGHTHOUSE=http://HOST:29510 python examples/replica_groups.py replica
"""

import hashlib
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def replica(steps: int = 300) -> None:
    from moeify import Recipe, sparsify
    from moeify.balance import Sign
    from moeify.integrations.torchft import Batches, Replica
    from moeify.routers import TopK
    from moeify.train import SparseArguments

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
    router = partial(TopK, k=2, selection_bias=True)
    model = sparsify(dense, Recipe(num_experts=4, router=router), verbose=False)
    text = torch.tensor(list(Path(__file__).read_bytes()[:2048])).view(-1, 32)
    batches = Batches([{"input_ids": row, "labels": row} for row in text], size=4, micro_batches=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with Replica(model, optimizer, SparseArguments(balance=1e-2, controller=Sign(1e-2)), timeout=20.0) as this:
        for step in this.train(batches, steps):
            experts = b"".join(v.numpy().tobytes() for n, v in this.state().tensors.items() if ".experts." in n)
            counted = f"loss {step.loss:.3f}" if step.committed else "is repeated"
            print(step.number, f"by {step.replicas}: {counted}, experts {hashlib.sha256(experts).hexdigest()[:8]}")
            time.sleep(0.1)


def show() -> None:
    from torchft.coordination import LighthouseServer

    lighthouse = LighthouseServer("[::]:0", 1, join_timeout_ms=5000, heartbeat_timeout_ms=3000)
    logs = Path("replica0.txt"), Path("replica1.txt")

    def start(log: Path) -> subprocess.Popen:
        environment = os.environ | {"TORCHFT_LIGHTHOUSE": lighthouse.address(), "PYTHONUNBUFFERED": "1"}
        with log.open("a") as to, log.with_suffix(".err").open("a") as errors:
            return subprocess.Popen([sys.executable, __file__, "replica"], stdout=to, stderr=errors, env=environment)

    def wait(log: Path, lines: int, process: subprocess.Popen) -> None:
        while not log.exists() or log.read_text().count("\n") < lines:
            if process.poll() is not None:
                raise RuntimeError(f"a replica ended; {log.with_suffix('.err')} says why")
            time.sleep(0.1)

    processes = [start(log) for log in logs]
    wait(logs[1], 5, processes[1])
    processes[1].kill()
    processes[1].wait()
    processes[1] = start(logs[1])
    for process in processes:
        process.wait()
    lines = [log.read_text().splitlines() for log in logs]
    print("\n".join(line for line in lines[0] if "repeated" in line) or "the kill cost no step")
    print("the first replica:", lines[0][-1])
    print("the second one   :", lines[1][-1])
    lighthouse.shutdown()


if __name__ == "__main__":
    replica() if sys.argv[1:] == ["replica"] else show()
