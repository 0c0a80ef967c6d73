"""Intel's retired FP8 Emulation Toolkit by its own names, over `octavo.torch`: scripts written for it change one import line.

from octavo.mpemu import mpt_emu  # was: from mpemu import mpt_emu
"""

from octavo.mpemu import mpt_emu

__all__ = ["mpt_emu"]
