"""The settings that the command which is running was given, apart from those that have their usual values."""

from __future__ import annotations

import os

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from ltx.config import Settings, settings_from


def overrides() -> dict[str, str]:
    """Key -> `KEY=VALUE` as it was given, of this run of a sweep; nothing outside of a command."""
    if not HydraConfig.initialized():
        return {}
    return {given.split("=", 1)[0].lstrip("+"): given for given in HydraConfig.get().overrides.task if "=" in given}


def folders() -> list[str]:
    """`--config-dir` and the folder, where it was given."""
    if not HydraConfig.initialized():
        return []
    sources = HydraConfig.get().runtime.config_sources
    return [word for s in sources if s.provider == "command-line" for word in ("--config-dir", os.path.relpath(s.path))]


def usual(*overrides: str) -> Settings | None:
    """The settings of a command that is given these alone; None outside of a command."""
    if not GlobalHydra.instance().is_initialized():
        return None
    return settings_from(compose("config", overrides=list(overrides)))
