"""Triton kernels, one module per operator of ``metakd.ops``, imported when one is first called.
They may import torch, triton and ``metakd.errors``, and not one another."""
