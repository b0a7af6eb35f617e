"""Small helpers that know nothing about embeddings."""
