"""How long commands take that need no torch: medians of whole processes, beside what importing lightning costs.

python benchmarks/startup.py [RUNS]
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

WRONG = """
data: mnist5k
module: {name: supervised, network: {name: convnet, widht: 8}, optimizer: adamm}
"""
PEER = "import lightning"


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, capture_output=True, check=False)
    return time.perf_counter() - began


def main(runs: int) -> None:
    lab = str(Path(sys.executable).with_name("lab"))
    with tempfile.TemporaryDirectory() as folder:
        wrong = Path(folder) / "wrong.yaml"
        wrong.write_text(WRONG)
        commands = {
            "lab --help": [lab, "--help"],
            "lab list": [lab, "list"],
            "lab describe distill": [lab, "describe", "distill"],
            "lab show distill": [lab, "show", "distill"],
            "lab check, a wrong recipe": [lab, "check", str(wrong)],
            "python -c pass": [sys.executable, "-c", "pass"],
            "python -c 'import torch'": [sys.executable, "-c", "import torch"],
            f"python -c '{PEER}'": [sys.executable, "-c", PEER],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for round_ in range(runs + 1):  # in turn, so that a busy moment hits all; the first round warms the files
            for name, command in commands.items():
                taken = seconds(command)
                if round_:
                    times[name].append(taken)
    medians = {name: statistics.median(values) for name, values in times.items()}
    peer = medians[f"python -c '{PEER}'"]
    table = Table("command", "median s", "min", "max", f"of {PEER}", title=f"{runs} runs", title_justify="left")
    for name, values in times.items():
        ratio = f"{medians[name] / peer:.1%}"
        table.add_row(name, f"{medians[name]:.3f}", f"{min(values):.3f}", f"{max(values):.3f}", ratio)
    Console(width=100).print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 11)
