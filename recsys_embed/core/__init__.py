"""The base layer: lookup programs, method configurations, hashes and footprints."""
