"""A codec as users name it in recipes: refused where it is made, if no codec is like that."""

from __future__ import annotations

from modelstore.codecs.registry import codec
from modelstore.errors import UnsupportedError
from modelstore.format.objects import manifest


class CheckedSpec(manifest.CodecSpec, frozen=True, omit_defaults=True, eq=False):
    """A codec's name and parameters, which are checked: `ValueError` says what the codec takes.

    Args:
        name: The codec, such as "int".
        params: Its parameters by name; those that are left out have their defaults.

    Raises:
        ValueError: There is no such codec, or it does not have such a parameter, or refuses its value.

    Example:
        >>> ms.CodecSpec("int", {"bits": 4, "group_size": 64})
    """

    def __post_init__(self) -> None:
        try:
            codec(self.name, self.params)
        except UnsupportedError as error:  # of what is stored it is not this version's; here it is the caller's mistake
            raise ValueError(str(error)) from None

    def __eq__(self, other: object) -> bool:
        """Equal to what is read of it again, which is not checked: other versions have other codecs."""
        if not isinstance(other, manifest.CodecSpec):
            return NotImplemented
        return (self.name, self.params) == (other.name, other.params)

    def __repr__(self) -> str:
        return f"CodecSpec({self.name!r}, {self.params!r})"


CodecSpec = CheckedSpec  # as users know it
