"""What an attacker does to every engine of ours: T4 to T9 of RELIABILITY.md. A test file gives two fixtures.

starred: a server whose probe blocks the token `*` in both phases; app: its ASGI application
"""

from .answers import Blocks, Shapes
from .crowd import Disconnects, Identities
from .routes import Routes, Switches
from .sending import is_block, send

__all__ = ["Siege", "is_block", "send"]


class Siege(Blocks, Routes, Switches, Shapes, Identities, Disconnects):
    """All of it: subclass this as Test… in a file with the two fixtures."""
