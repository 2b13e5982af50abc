"""Copy measured results into outputs/reference/: packed targets, tables, figures, statistics, benchmarks, certificates.

    python scripts/keep_reference.py OUTPUT_DIR

OUTPUT_DIR is what commands wrote with output_dir=OUTPUT_DIR: `ltx train-target --multirun target=mnist|resnet22
activation=relu,leaky_relu,tanh,sigmoid ...`, `make paper-tables`, `ltx figures`, `ltx subset-sum`, `ltx bench`,
`ltx certify`. What is not there is left as it is kept.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from ltx.paths import reference_dir
from ltx.targets import pack, read_checkpoint


def main(output_dir: Path) -> None:
    if not output_dir.is_dir():
        sys.exit(f"{output_dir}: no such folder")
    for path in sorted((output_dir / "targets").glob("*/target.safetensors")):
        checkpoint = read_checkpoint(path)
        said = checkpoint.metadata
        if said["seed"] != "0":
            print(f"{path}: left out, only targets of target.seed=0 are kept", file=sys.stderr)
            continue
        # the name is that of target=, see ltx/paths.py
        target = said["data"] if said["network"] == "mnist_cnn" else said["network"]
        name = f"{target}-{said['activation']}.safetensors"
        kept = reference_dir() / "targets" / name
        pack(kept, checkpoint)
        print(f"{kept} ({kept.stat().st_size / 1024:.0f} KiB, {float(said['accuracy']):.2f} %)")
    for path in sorted((output_dir / "tickets").glob("*/*/certificate.*")):
        kept = reference_dir() / "certificates" / f"{path.parent.parent.name}-{path.parent.name}{path.suffix}"
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, kept)
        if kept.suffix == ".json":
            kept.write_text(kept.read_text().replace(f"{output_dir}/", ""))
        print(kept)
    for folder in ("tables", "figures", "subset_sum", "bench"):
        for path in sorted(p for p in (output_dir / folder).rglob("*") if p.is_file()):
            kept = reference_dir() / path.relative_to(output_dir)
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, kept)
            print(kept)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
