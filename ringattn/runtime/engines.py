"""The engine of each kind of call along one axis."""

from __future__ import annotations

from types import ModuleType

from ringattn.runtime import deterministic, engine, passing, wave
from ringattn.runtime.call import Call, PassCall, TileCall, WaveCall


def engine_along(call: Call) -> ModuleType:
    """What has the ``forward`` and ``backward`` of a call whose ranks are those of one axis."""
    if isinstance(call, WaveCall):
        return wave
    if isinstance(call, PassCall):
        return passing
    return deterministic if isinstance(call, TileCall) and call.to_queries is not None else engine
