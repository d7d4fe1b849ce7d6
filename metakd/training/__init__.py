"""One training run on one process or many: the DeepSpeed loop (``engine``), what it is told
(``settings``), where it is saved (``saves``, ``checkpoint``, ``digests``, ``reshard``), how models
are scored (``scoring``), and what may go wrong (``faults``)."""

import logging

# Said at the import of DeepSpeed; `metakd doctor` tells which devices there are.
logging.getLogger("DeepSpeed").addFilter(
    lambda record: "Setting accelerator to CPU" not in record.getMessage()
)
