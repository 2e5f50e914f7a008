"""Peak resident memory per rank while a model is loaded and trained, by number of ranks.

    python tests/benchmarks/bench_zero3_memory.py            # about 300 M parameters, float32

Makes a random Llama on disk in safetensors shards, then loads it under ZeRO stage 3 on 1, 2 and 4
ranks, trains one step, and prints for each the largest resident memory of a rank (VmRSS of Linux,
which counts pages of mapped files too). The first line is one plain process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SUPPORT = Path(__file__).parents[1] / "support"
STATUS = Path("/proc/self/status")


def make_model(folder: Path, hidden: int, layers: int) -> int:
    """Writes model and tokenizer; returns the number of parameters."""
    from tiny_models import build_tokenizer

    tokenizer = build_tokenizer("llama")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size="200MB")
    tokenizer.save_pretrained(folder)
    return count


def resident_mb() -> float:
    """Resident memory now."""
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1e3


@contextmanager
def peak_mb() -> Iterator[list[float]]:
    """The largest resident memory inside the block, by looking every 5 ms."""
    found, done = [resident_mb()], threading.Event()

    def watch() -> None:
        while not done.is_set():
            found[0] = max(found[0], resident_mb())
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def work(folder: Path, port: int, plain: bool) -> None:
    """One rank: prints one JSON line."""
    from mpi4py import MPI
    from tiny_models import text_samples

    from fedml_plugin_fedmosaic.config.sections import (
        AdapterConfig,
        EngineConfig,
        EvalConfig,
        ModelSpec,
        OptimConfig,
    )
    from fedml_plugin_fedmosaic.core.types import Branch, ProcessWorld, View
    from fedml_plugin_fedmosaic.core.work import Pass
    from fedml_plugin_fedmosaic.engine.deepspeed import import_deepspeed
    from fedml_plugin_fedmosaic.engine.factory import make_engine
    from fedml_plugin_fedmosaic.engine.models import load_model
    from fedml_plugin_fedmosaic.engine.sharded import load_sharded_model

    comm, device = MPI.COMM_WORLD, torch.device("cpu")
    torch.set_num_threads(1)
    import_deepspeed(device)
    comm.barrier()
    before = resident_mb()
    optim = OptimConfig(batch_size=comm.size, learning_rate=1e-3)
    spec = ModelSpec(path=str(folder), ranks=comm.size)
    config = EngineConfig(deepspeed=str(folder / "zero3.json"))
    world = ProcessWorld(
        rank=comm.rank, size=comm.size, local_rank=comm.rank, address="127.0.0.1", port=port
    )
    started = time.perf_counter()
    with peak_mb() as loading:
        bundle = (
            load_model("model", spec, device)
            if plain
            else load_sharded_model("model", spec, device, world=world, engine=config, optim=optim)
        )
    load_s = time.perf_counter() - started
    engine = make_engine(
        bundle, AdapterConfig(rank=8), "pq_lora", optim, EvalConfig(), config, seed=0
    )
    pass_ = Pass(name="one", view=View.GATED, train=frozenset({Branch.LOCAL}), num_steps=1)
    with peak_mb() as training:
        engine.fit(pass_, engine.initial_adapter(), [text_samples(comm.size)], seed=0)
    mine = [before, loading[0], training[0], load_s]
    everyone = comm.allgather(mine)
    if comm.rank == 0:
        print(json.dumps(everyone), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(Path(options.work[0]), int(options.work[1]), options.work[2] == "plain")
        return
    from fedml_plugin_fedmosaic.comm.rendezvous import free_port

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = make_model(folder, options.hidden, options.layers)
        # DeepSpeed's defaults keep up to 1e9 gathered parameters, which is all of this model.
        zero = {
            "stage": 3,
            "stage3_max_live_parameters": 2e7,
            "stage3_max_reuse_distance": 2e7,
            "stage3_prefetch_bucket_size": 1e7,
            "stage3_param_persistence_threshold": 1e4,
        }
        (folder / "zero3.json").write_text(json.dumps({"zero_optimization": zero}))
        print(f"{count / 1e6:.0f} M parameters, {count * 4 / 1e6:.0f} MB in float32")
        print("megabytes (largest rank)   before  loading  training   added by loading   seconds")
        for ranks, kind in [(1, "plain"), *((ranks, "zero3") for ranks in options.ranks)]:
            rows = run(folder, ranks, kind, free_port())
            before, loading, training, seconds = (max(column) for column in zip(*rows, strict=True))
            added = max(row[1] - row[0] for row in rows)
            label = f"{kind}, {ranks} rank(s)"
            print(
                f"{label:<26}{before:>7.0f}{loading:>9.0f}{training:>10.0f}"
                f"{added:>19.0f}{seconds:>10.1f}",
                flush=True,
            )


def run(folder: Path, ranks: int, kind: str, port: int) -> Any:
    done = subprocess.run(
        [
            str(Path(sysconfig.get_path("scripts")) / "mpiexec"),
            "--oversubscribe",
            "-n",
            str(ranks),
            sys.executable,
            __file__,
            "--work",
            str(folder),
            str(port),
            kind,
        ],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": str(SUPPORT),
            "OMP_NUM_THREADS": "1",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        },
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))


if __name__ == "__main__":
    sys.path.insert(0, str(SUPPORT))
    main()
