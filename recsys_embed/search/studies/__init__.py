"""Studies: Optuna searches over methods, sizes and widths."""
