"""The processing element in Amaranth: 4-bit lanes and dot units, and the floating-point units they are compared with.

Patent notice: an array of units that shift an INT4 multiplicand by the exponent of a mantissa-less 4-bit float is
claimed in United States patent 12,443,841 B2 (IBM, "Four-bit training for machine learning", granted 2025-10-14). What
is here is for study and simulation. This notice is not legal advice; ask your own counsel before you build such a unit.
"""

from ...errors import HalfbyteError

try:
    import amaranth as _amaranth  # noqa: F401
except ModuleNotFoundError as error:
    raise HalfbyteError(
        "The processing element is described in Amaranth, which is not installed. "
        "Install it with: pip install 'halfbyte[hw]'"
    ) from error

from .catalog import UNITS, Role, Unit

__all__ = ["UNITS", "Role", "Unit"]
