"""The settings that the command which is running was given, apart from those that have their usual values."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig


def overrides() -> dict[str, str]:
    """Key -> `KEY=VALUE` as it was given, of this run of a sweep; nothing outside of a command."""
    if not HydraConfig.initialized():
        return {}
    return {given.split("=", 1)[0].lstrip("+"): given for given in HydraConfig.get().overrides.task if "=" in given}
