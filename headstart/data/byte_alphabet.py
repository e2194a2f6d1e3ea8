"""The characters that byte-level vocabularies write bytes with."""

from __future__ import annotations


def byte_alphabet() -> list[str]:
    """GPT-2's 256 visible characters, one per byte value: itself where it prints, else 256 and up, in order."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters, spare = [], 256
    for byte in range(256):
        if byte in visible:
            characters.append(chr(byte))
        else:
            characters.append(chr(spare))
            spare += 1
    return characters
