"""How much the noise levels of flow matching are shifted for an image of some size, where the config asks for it."""

from __future__ import annotations

from fmedge_runtimes.schedulers import FlowMatchEulerSettings, SchedulerConfig, mu_of
from fmedge_runtimes.schedulers.settings import ShiftSettings


def shift_of(config: SchedulerConfig, tokens: int) -> float | None:
    """The shift's logarithm (`mu`) for an image of so many tokens of the transformer; None where it is fixed.

    The line that it lies on is in the config under the flow scheduler's fields, whichever scheduler follows it.
    """
    settings = config.settings
    if not isinstance(settings, FlowMatchEulerSettings | ShiftSettings) or not settings.use_dynamic_shifting:
        return None
    fields = {name: value for name, value in config.values.items() if name in FlowMatchEulerSettings.model_fields}
    return mu_of(FlowMatchEulerSettings.model_validate(fields), tokens)
