"""The settings that the command which is running was given, apart from those that have their usual values."""

from __future__ import annotations

import os

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from ltx.config import Settings, settings_from
from ltx.errors import LtxError


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


def choices() -> dict[str, str]:
    """Group -> the name of the file that was chosen of it."""
    return dict(HydraConfig.get().runtime.choices) if HydraConfig.initialized() else {}


def usual(*overrides: str) -> Settings | None:
    """The settings of a command that is given these alone; None outside of a command, or where it needs more."""
    if not GlobalHydra.instance().is_initialized():
        return None
    try:
        return settings_from(compose("config", overrides=list(overrides)))
    except (LtxError, HydraException, OmegaConfBaseException):
        return None
