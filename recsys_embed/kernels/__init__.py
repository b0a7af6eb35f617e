"""Execution of lookup programs: the reference implementation and the backends that are tested against it."""
