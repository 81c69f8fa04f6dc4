"""Portable kernels: one source for Hopper, Blackwell, CDNA3, CDNA4 and the interpreter."""
