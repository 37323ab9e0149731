"""One seed made of several numbers and names, so that every draw has a stream of its own."""

import hashlib


def mixed_seed(*parts: int | str) -> int:
    """One seed of 63 bits from several numbers and names."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
