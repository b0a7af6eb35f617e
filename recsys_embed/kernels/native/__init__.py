"""The compiled CPU kernels: the library, records of its calls, lookups with gradients."""
