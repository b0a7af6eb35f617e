"""Criteo's text format: 13 integers, 26 categories and a label per line; conversion and synthesis."""
