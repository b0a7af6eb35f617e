"""What the rest is built on: lookup programs, method configurations, hashes, bytes."""
