"""The former name of ``rudolph.models.reference``, kept for existing imports."""

from rudolph.models.reference import FAMILIES, from_reference, to_reference

__all__ = ["FAMILIES", "from_reference", "to_reference"]
