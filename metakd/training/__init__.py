"""One training run on one process or many: the DeepSpeed loop (``engine``), what it is told
(``settings``), where it is saved (``saves``, ``checkpoint``, ``reshard``), how models are scored
(``scoring``), and what may go wrong (``faults``).

Whoever imports any of it without DeepSpeed is told so here; nothing else of metakd needs it.
"""

import logging

from metakd.errors import UnsupportedError, install

# Said at the import of DeepSpeed; `metakd doctor` tells which devices there are.
logging.getLogger("DeepSpeed").addFilter(
    lambda record: "Setting accelerator to CPU" not in record.getMessage()
)

try:
    import deepspeed  # noqa: F401
except Exception as error:  # a broken one raises anything: a lost library, a missing CUDA_HOME
    raise UnsupportedError(
        f"training needs DeepSpeed, which cannot be imported ({error})",
        f"{install('train')}, or see what `python -c 'import deepspeed'` says; "
        "losses, predict, export and report work without",
    ) from error
