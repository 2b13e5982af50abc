"""Train targets of several activations at once on one GPU, each in a thread and a stream of its own.

    LTX_DATA=... python scripts/train_together.py ACTIVATION,... [SETTING=VALUE ...]

The same files as `ltx train-target --multirun activation=ACTIVATION,... SETTING=VALUE ...`, sooner: one network of this
size leaves most of a GPU idle. A run that was cut off goes on when it is called again.
"""

from __future__ import annotations

import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from ltx import cli, config, data
from ltx.config import Settings
from ltx.tasks import train_target


def main(activations: list[str], given: list[str]) -> None:
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    config.register()
    with initialize_config_dir(str(cli.conf_dir()), version_base="1.3"):
        every = [
            config.settings_from(compose("config", [*given, f"activation={activation}", "device=cuda"]))
            for activation in activations
        ]
    for train in (True, False):  # once, before the threads
        data.load(every[0].data.name, train=train, root=every[0].data_root, device="cuda")
    torch.cuda.synchronize()

    def run(settings: Settings) -> Path:
        with torch.cuda.stream(torch.cuda.Stream()):
            return train_target.run(settings)

    with ThreadPoolExecutor(len(every)) as threads:
        for path in threads.map(run, every):
            print(path, flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1].split(","), sys.argv[2:])
