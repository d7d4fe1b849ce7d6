"""Compiles the Triton kernels for GPUs that need not be here and shows what each variant costs.

``python tests/compile_triton.py`` prints a table: variant, architecture, warps, registers, bytes of
spills and of shared memory. ``--json`` prints it as JSON, ``--all`` takes every combination in
place of a selection. The exit code is 1 if a variant spills. The assembler is Triton's own.

Needs a process without TRITON_INTERPRET, hence a script beside ``test_compile.py``.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ARCHITECTURES = (80, 90, 100)
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
KINDS = {"kl": 0, "reverse": 1, "jsd": 2}
CLUSTERS = (30522, 50257)
TILES = (2, 16, 256, 1000, 2048)
# Compiled by default, (kernel, V, dtype, kind, label): each kernel and kind, the widest tiles, what
# is near the limit of registers. Uneven: rows without a shared cut.
SELECTION = [
    ("row_fwd", 30522, "bf16", "kl", False),
    ("row_fwd", 30522, "fp32", "reverse", True),
    ("row_fwd_bwd", 30522, "bf16", "kl", True),
    ("row_fwd_bwd", 30522, "bf16", "jsd", True),
    ("row_bwd", 30522, "bf16", "kl", True),
    ("row_bwd", 30522, "bf16", "jsd", True),
    ("row_bwd", 30522, "fp32", "jsd", True),
    ("uneven_bwd", 30522, "bf16", "reverse", True),
    ("tile_fwd_bwd", 2048, "bf16", "jsd", True),
    ("tile_fwd_bwd", 1024, "fp32", "jsd", True),
    ("tile_fwd", 2, "bf16", "kl", True),
    ("tile_bwd", 1024, "bf16", "kl", True),
    ("cluster_fwd_bwd", 50257, "bf16", "jsd", True),
]


def everything():
    flavours = list(itertools.product(DTYPES, KINDS, (False, True)))
    for operator, flavour in itertools.product(("fwd", "bwd", "fwd_bwd"), flavours):
        for V in TILES:
            yield f"tile_{operator}", V, *flavour
        yield f"row_{operator}", 30522, *flavour
        yield f"uneven_{operator}", 30522, *flavour
    for V, flavour in itertools.product(CLUSTERS, flavours):
        yield "cluster_fwd_bwd", V, *flavour


def name_of(kernel: str, V: int, dtype: str, kind: str, label: bool) -> str:
    return f"{kernel} V={V} {dtype} {kind}{' label' if label else ''}"


def compile_variant(kernel: str, V: int, dtype: str, kind: str, label: bool, arch: int) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from metakd.kernels import soft_kl

    shape, _, operator = kernel.partition("_")
    backward = operator == "bwd"
    constants = {"KIND": KINDS[kind]} | ({} if label else {"label": None, "mask": None})
    if shape == "cluster":
        constants |= soft_kl.cluster_shape(V)
        shape = "tile"
    elif shape == "tile":
        constants |= soft_kl.tile_shape(V)
    else:
        cut = shape == "row"
        constants |= soft_kl.row_shape(operator, KINDS[kind], DTYPES[dtype], arch // 10, cut)
        shape = "row"
    function = getattr(soft_kl, f"_soft_kl_{'bwd_' if backward else ''}{shape}_kernel")
    options = soft_kl.COMPILE | {
        name: constants.pop(name) for name in set(constants) - set(function.arg_names)
    }
    if not backward:
        in_place = operator == "fwd_bwd"
        constants |= {"IN_PLACE": in_place, "stats" if in_place else "drows": None}

    types = dict.fromkeys(("student", "teacher", "dstudent"), f"*{dtype}")
    types |= dict.fromkeys(("rows", "stats", "drows"), "*fp32") | {"mask": "*i1", "label": "*i64"}
    types |= dict.fromkeys(("rate", "cool", "scale", "beta", "hard_weight"), "fp32")
    signature, hints = {}, {}
    for place, name in enumerate(function.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        # As at a launch of rows of 30522: tensors start at a multiple of 16 bytes, rows do not.
        if signature[name].startswith("*"):
            hints[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, hints)
    target = GPUTarget("cuda", arch, 32)
    binary = triton.compile(source, target=target, options=options)
    return {
        "variant": name_of(kernel, V, dtype, kind, label),
        "arch": arch,
        "warps": options["num_warps"],
    } | resources(binary)


def resources(binary) -> dict:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    count = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": count["REG"],
        "spills": count["STACK"] + count["LOCAL"],
        "shared": binary.metadata.shared,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--all", action="store_true", help="every combination (ten minutes)")
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHITECTURES)
    parser.add_argument("--only", default="", help="variants whose name contains this")
    options = parser.parse_args()
    rows = []
    for variant, arch in itertools.product(
        everything() if options.all else SELECTION, options.arch
    ):
        if options.only not in name_of(*variant):
            continue
        if variant[0].startswith("cluster") and arch < 90:
            continue
        rows.append(compile_variant(*variant, arch))
        if not options.json:
            row = rows[-1]
            print(
                f"{row['variant']:44} sm_{row['arch']:<3} {row['warps']:2} warps "
                f"{row['registers']:3} registers {row['spills']:3} spilled {row['shared']} shared",
                flush=True,
            )
    if options.json:
        print(json.dumps(rows, indent=1))
    return int(any(row["spills"] for row in rows))


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
