"""Run lookup programs: a readable definition and the backends compared with it."""
