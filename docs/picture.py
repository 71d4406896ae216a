"""Draw a run's scoreboard as the README shows it.

python docs/picture.py RUN docs/scoreboard.svg
"""

import io
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lab import Run
from lab.report import scoreboard

if __name__ == "__main__":
    run = Run(Path(sys.argv[1]))
    console = Console(record=True, width=86, file=io.StringIO(), force_terminal=True)
    console.print(Text(f"$ lab fit recipes/{run.manifest['recipe']}.yaml", style="bold"))
    console.print(scoreboard(run.results))
    console.print(Text(str(Path("runs") / run.manifest["recipe"] / run.id)))
    console.save_svg(sys.argv[2], title="lab")
