"""Time and memory of a construction against the target's parameters: ResNet-18, 0.1 to 30 % of its weights.

python scripts/scaling.py OUTPUT_DIR    writes scaling.csv and a figure; a process of its own for every point.
"""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ltx.report.figures import BLUE, RED, STYLE, save

DENSITIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
CURVES = {("2L", 15): (BLUE, "-"), ("L+1", 15): (RED, "--"), ("L+1", 20): (RED, "-")}  # with 20 hardly a row fails


def main() -> None:
    folder, rows = Path(sys.argv[1]), []
    for construction, m in CURVES:
        for density in DENSITIES:
            script = [sys.executable, str(Path(__file__).with_name("own_network.py")), "resnet18", construction]
            done = subprocess.run([*script, str(density), str(m)], check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout))
            print(rows[-1], file=sys.stderr)
    table = pd.DataFrame(rows)
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "scaling.csv", index=False)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.4), layout="constrained")
        panels = figure.subplots(1, 2)
        for (construction, m), (colour, line) in CURVES.items():
            mine = table[(table.construction == construction) & (table.m == m)]
            x = mine.target_parameters.to_numpy()
            for axes, y, what in (
                (panels[0], mine.seconds.to_numpy(), "seconds"),
                (panels[1], (mine.memory_mb - mine.memory_before_mb).to_numpy(), "MB beyond the imports"),
            ):
                slope = np.polyfit(np.log(x[-3:]), np.log(y[-3:]), 1)[0]
                label = f"{construction}, m = {m}: slope {slope:.2f} at the end"
                axes.loglog(x, y, color=colour, ls=line, marker="o", ms=3, label=label)
                axes.set_ylabel(what)
        for axes in panels:
            axes.set_xlabel("parameters of the target above epsilon")
            axes.grid(alpha=0.25, lw=0.5)
            axes.legend(fontsize=8)
        figure.suptitle("Constructing ResNet-18, epsilon = 0.01", fontsize=10)
    save(figure, folder / "scaling")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main()
