"""The former name of ``rudolph.models.reference``, kept for existing imports."""

from rudolph.models.reference import REFERENCE_FAMILIES, from_reference, to_reference

__all__ = ["REFERENCE_FAMILIES", "from_reference", "to_reference"]
