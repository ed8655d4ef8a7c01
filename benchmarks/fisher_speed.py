"""The Fisher pass against the textbook loop: wall time, peak memory, relative difference, in one run.

    python benchmarks/fisher_speed.py                                  # two cores: the 1.5B shape
    python benchmarks/fisher_speed.py --textbook float32               # where the processor has no fast bfloat16
    python benchmarks/fisher_speed.py --shape qwen2-7b --textbook none # our pass alone
    python benchmarks/fisher_speed.py --device cuda                    # the 7B shape, the card capped at 24 GB

The textbook loop has the whole model in memory, calls `loss.backward()` once per sequence and adds the squares to
float32 accumulators; gradients and accumulators are those of the decoder blocks' matrices alone, which is what our
pass measures. Both run as processes of their own on the same synthetic checkpoint and the same tokens; time and
memory are of the whole process, the import and the loading included. The relative difference is norm-wise per tensor.
A loop that would take longer than `--textbook-minutes` stops after the sequences that fit (one at least); its time is
scaled up and the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from make_checkpoints import SHAPES, make_pair

VRAM = 24 * 10**9
Result = dict[str, Any]


def ours(base: Path, out: Path, device: str) -> Result:
    """Our pass, in this process: what it took and where the time went."""
    from streammerge.checkpoints.checkpoint import Checkpoint
    from streammerge.fisher import place
    from streammerge.fisher.measure import measure
    from streammerge.fisher.phases import Phases
    from streammerge.fisher.placement import FisherRun
    from streammerge.fisher.store import FisherSettings

    settings, phases, result = FisherSettings.model_validate({}), Phases(exact=device != "cpu"), Result()
    run = FisherRun(device, cap_memory(device))
    with Checkpoint.open(base) as checkpoint:
        planned = place(checkpoint, settings, run)
        start = time.perf_counter()
        record = measure(checkpoint, out, settings, run, max_shard_bytes=5 * 10**9, phases=phases)
        result |= {"loop": time.perf_counter() - start, "planned": planned.host_bytes, "loss": record.loss}
    result |= {"phases": phases.seconds, "read": phases.bytes_read, "stay": planned.stay, "vram": vram(device)}
    return result | {"planned_vram": planned.device_bytes, "ratio": record.ratio}


def textbook(base: Path, fisher: Path, device: str, dtype: str, minutes: float) -> Result:
    """The textbook loop, in this process, compared with the Fisher in `fisher`."""
    import torch
    from safetensors import safe_open
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    from streammerge.fisher.probes import random_tokens

    cap_memory(device)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype), attn_implementation="eager")
    model.to(device).eval().requires_grad_(False)
    matrices = {n: p.requires_grad_() for n, p in model.named_parameters() if ".layers." in n and p.dim() > 1}
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in matrices.items()}
    ids = random_tokens(model.config.vocab_size, 8, 64, 42).to(device)
    start, done = time.perf_counter(), 0
    for row in ids:
        if done and (time.perf_counter() - start) * (done + 1) / done > 60 * minutes:
            break
        done += 1
        logits = model(row[None], use_cache=False).logits[0, :-1].float()
        cross_entropy(logits, row[1:], reduction="sum").backward()
        for name, parameter in matrices.items():
            assert parameter.grad is not None
            sums[name] += parameter.grad.float() ** 2
            parameter.grad = None
    if device != "cpu":
        torch.cuda.synchronize()
    result = {"loop": time.perf_counter() - start, "vram": vram(device), "done": done, "of": len(ids)}
    if done == len(ids):
        differences = []
        for file in sorted(fisher.glob("*.safetensors")):
            with safe_open(file, "pt") as stored:
                for name in stored.keys():  # noqa: SIM118 - not a mapping
                    truth = sums[name].cpu() / len(ids)
                    differences.append(float((stored.get_tensor(name).float() - truth).norm() / truth.norm()))
        differences.sort()
        result |= {"difference": differences[-1], "median": differences[len(differences) // 2]}
    return result


def cap_memory(device: str) -> int | None:
    """Let this process use 24 GB of the card, whatever its size."""
    if device == "cpu":
        return None
    import torch

    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, VRAM / total), device)
    return int(0.9 * min(VRAM, total))


def vram(device: str) -> int:
    if device == "cpu":
        return 0
    import torch

    return torch.cuda.max_memory_allocated(device)


def measured(arguments: list[str]) -> Result:
    """Run this script in a mode of its own as a process; its result, with wall seconds and peak resident bytes."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit status {process.returncode}")
    result: Result = json.loads(output.splitlines()[-1])
    return result | {"wall": time.perf_counter() - start, "peak": usage.ru_maxrss * 1024}


def hardware(device: str) -> str:
    import torch

    card = f", {torch.cuda.get_device_name(device)} capped at {VRAM // 10**9} GB" if device != "cpu" else ""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} cores ({platform.machine()}, {capability}){card}, torch {version('torch')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, help="qwen2-1.5b on the CPU, qwen2-7b on a GPU by default")
    add("--device", default="cpu")
    add("--textbook", choices=("bfloat16", "float32", "none"), default="bfloat16", help="dtype of the textbook loop")
    add("--textbook-minutes", type=float, default=10, metavar="M", help="most time for the loop (%(default)s)")
    add("--out", type=Path, default=Path("benchmarks/out"), help="folder for checkpoint and Fisher")
    add("--mode", choices=("ours", "textbook"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = arguments.device
    shape = arguments.shape or ("qwen2-1.5b" if device == "cpu" else "qwen2-7b")
    base, fisher = arguments.out / shape / "base", arguments.out / f"{shape}-fisher"
    if arguments.mode == "ours":
        print(json.dumps(ours(base, fisher, device)))
        return
    if arguments.mode == "textbook":
        print(json.dumps(textbook(base, fisher, device, arguments.textbook, arguments.textbook_minutes)))
        return
    if not base.is_dir():
        make_pair(shape, arguments.out / shape, experts=0)
    shutil.rmtree(fisher, ignore_errors=True)
    same = ["--shape", shape, "--device", device, "--out", str(arguments.out)]
    mine = measured([*same, "--mode", "ours"])
    print(f"{shape}, {hardware(device)}\n")
    print("| | wall time | of the loop | peak memory | planned | GPU memory |\n|---|---|---|---|---|---|", flush=True)
    gpu = f"{mine['vram'] / 2**20:.0f} MiB (planned {mine['planned_vram'] / 2**20:.0f})" if device != "cpu" else "-"
    planned = f"{mine['planned'] / 2**20:.0f} MiB"
    print(
        f"| ours | {mine['wall']:.0f} s | {mine['loop']:.0f} s | {mine['peak'] / 2**20:.0f} MiB | {planned} | {gpu} |"
    )
    if arguments.textbook != "none":
        compare(mine, measured_textbook(same, arguments.textbook, arguments.textbook_minutes), arguments.textbook)
    phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in sorted(mine["phases"].items()))
    rate = mine["read"] / 10**9 / max(mine["phases"]["read"], 1e-9)
    print(f"\nours: {phases}; {mine['read'] / 10**9:.1f} GB read at {rate:.1f} GB/s; {mine['stay']} blocks stayed")


def measured_textbook(same: list[str], dtype: str, minutes: float) -> Result:
    result = measured([*same, "--mode", "textbook", "--textbook", dtype, "--textbook-minutes", str(minutes)])
    missing = result["loop"] / result["done"] * (result["of"] - result["done"])
    return result | {"wall": result["wall"] + missing, "loop": result["loop"] + missing}


def compare(mine: Result, loop: Result, dtype: str) -> None:
    scaled = f", scaled from {loop['done']} of {loop['of']} sequences" if loop["done"] < loop["of"] else ""
    gpu = f"{loop['vram'] / 2**20:.0f} MiB" if loop["vram"] else "-"
    print(
        f"| textbook, {dtype}{scaled} | {loop['wall']:.0f} s | {loop['loop']:.0f} s | "
        f"{loop['peak'] / 2**20:.0f} MiB | - | {gpu} |"
    )
    print(f"| ratio | {loop['wall'] / mine['wall']:.1f}x | {loop['loop'] / mine['loop']:.1f}x | ", end="")
    print(f"1/{loop['peak'] / mine['peak']:.1f} | | |")
    if "difference" in loop:
        print(f"\nrelative difference: at most {loop['difference']:.4f}, median {loop['median']:.4f}")


if __name__ == "__main__":
    main()
