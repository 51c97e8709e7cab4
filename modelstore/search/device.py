"""A device that a variant is to fit: its memory, the formats it runs, and what was measured there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import msgspec

from modelstore.format.objects.decoding import prepared
from modelstore.format.objects.manifest import CodecSpec
from modelstore.format.units import Size, parse_size
from modelstore.paths import explained, read_named

_LARGEST = 1 << 20  # bytes of a file that describes a device


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`bytes`: what it has for a model; `formats`: presets that it runs, any where none are named; `seconds`: measured for 10⁹
    weights of a preset, or of "kept", and one token.
    """

    bytes: Size
    formats: tuple[str, ...] = ()
    seconds: Mapping[str, float] = {}


def read(path: str | os.PathLike[str]) -> Device:
    """A device from a file of JSON. `ValueError` if there is none, or it does not describe one."""
    try:
        found = msgspec.json.decode(read_named(path, _LARGEST), type=prepared(Device))
    except OSError as error:
        raise ValueError(f"device={str(path)!r} cannot be read: {explained(error)}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"device={str(path)!r} describes no device ({error}): write an object with bytes, and formats and seconds if known"
        ) from None
    parse_size(found.bytes)
    if any(not 0 <= one < float("inf") for one in found.seconds.values()):
        raise ValueError(f"device={str(path)!r} has seconds that are not times: write 0 or more for each format")
    return found


def seconds_of(
    device: Device, named: Mapping[str, CodecSpec], chosen: Sequence[tuple[CodecSpec | None, int]]
) -> float | None:
    """Seconds a token of a mix, by format and weights; None if a format was not measured. named: codecs of presets."""
    known = {name: spec for name, spec in named.items() if name in device.seconds}
    total = 0.0
    for spec, weights in chosen:
        name = "kept" if spec is None else next((name for name, one in known.items() if one == spec), "")
        if name not in device.seconds:
            return None
        total += device.seconds[name] * weights / 1e9
    return total
