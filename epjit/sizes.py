"""The unit of memory that ranks share, and rounding up to it or to another one."""

ALIGNMENT = 128  # bytes: of buffers, of slots, of what lies behind them


def align(value: int, alignment: int = ALIGNMENT) -> int:
    """The next multiple."""
    return -(-value // alignment) * alignment
