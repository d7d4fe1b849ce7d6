"""Writes far behind an allocation: a memcheck that does not see this sees nothing."""

import torch
import triton
import triton.language as tl


@triton.jit
def kernel(out):
    tl.store(out + tl.arange(0, 1024) * 1048576, 1.0)


kernel[(1,)](torch.empty(16, device="cuda"))
torch.cuda.synchronize()
