"""Kernels in Gluon: Triton's lower level, where layouts, copies and barriers are written out."""
