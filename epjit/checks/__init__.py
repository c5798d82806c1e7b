"""Checks of calls: refuse with value and remedy; launch nothing, allocate nothing."""
