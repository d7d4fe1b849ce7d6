"""Compiles the Triton kernels for GPUs that need not be here and shows what each variant costs.

``python tests/compile_triton.py`` prints a table: variant, architecture, warps, registers, bytes of
spills and of shared memory. ``--json`` prints it as JSON, ``--all`` takes every combination in
place of a selection. The exit code is 1 if a variant spills. The assembler is Triton's own.
``PYTHONPATH`` to another version of Triton compiles with that: each refuses what another takes.

Needs a process without TRITON_INTERPRET, hence a script beside ``test_compile.py``.
"""

import argparse
import functools
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
# Launchers of the feature losses compiled by default, (operator, sizes, dtype, form): every kernel
# with the heads of the method's own models, the widest heads, and what is near the limit. Sizes:
# D_s, D_t of heads, M, C of a mixture, H of hidden states, K, M of weights.
HEADS = ((26, 64), (64, 64), (128, 128))
FEATURES = [
    ("attention_score_mse", (26, 64), "bf16", "gram"),
    ("attention_score_mse", (64, 64), "fp32", "gram"),
    ("attention_score_mse", (128, 128), "fp16", "gram"),
    ("attention_map", (26, 64), "bf16", "kl"),
    ("attention_map", (64, 64), "fp16", "squared causal"),
    ("attention_map", (128, 128), "fp32", "squared"),
    ("attention_score_mse", (26, 64), "bf16", "gram unmasked"),
    ("attention_map", (26, 64), "bf16", "kl unmasked"),
    ("attention_score_mse", (26, 64), "bf16", "tiles window"),
    ("attention_map", (64, 64), "bf16", "kl window"),
    ("attention_map", (64, 64), "fp16", "squared causal window"),
    ("mixture_kl", (3, 30522), "bf16", ""),
    ("mixture_kl", (8, 30522), "fp32", ""),
    ("mixture_kl", (3, 2), "fp32", "unmasked"),
    ("hidden_mse", (768,), "bf16", ""),
    ("hidden_mse", (768,), "bf16", "unmasked"),
    ("masked_mean", (312,), "bf16", ""),
    ("class_prototypes", (768,), "fp32", ""),
    ("prototype_score", (768, 4, 3), "bf16", ""),
    ("domain_expertise", (3,), "fp32", ""),
]

# Bytes by variant and architecture.
KNOWN_SPILLS = {
    ("gram 64/64 fp32 gram", 100): 376,
    ("score_gradient 64/64 fp16 squared causal", 80): 24,
}


def everything():
    flavours = list(itertools.product(DTYPES, KINDS, (False, True)))
    for operator, flavour in itertools.product(("fwd", "bwd", "fwd_bwd"), flavours):
        for V in TILES:
            yield f"tile_{operator}", V, *flavour
        yield f"row_{operator}", 30522, *flavour
        yield f"uneven_{operator}", 30522, *flavour
    for V, flavour in itertools.product(CLUSTERS, flavours):
        yield "cluster_fwd_bwd", V, *flavour


def every_feature():
    for sizes, dtype in itertools.product(HEADS, DTYPES):
        for form in ("gram", "gram norm", "tiles", "tiles causal", "tiles window"):
            yield "attention_score_mse", sizes, dtype, form
        for form in ("kl", "kl causal", "kl window", "squared", "squared causal", "squared window"):
            yield "attention_map", sizes, dtype, form
        yield "attention_map", (sizes[0],) * 2, dtype, "kl same"
    for M, C, dtype in itertools.product((1, 3, 8), (*TILES, 30522), DTYPES):
        yield "mixture_kl", (M, C), dtype, ""
    for dtype in DTYPES:
        for H in (312, 768, 1024):
            yield "hidden_mse", (H,), dtype, ""
            yield "masked_mean", (H,), dtype, ""
            yield "class_prototypes", (H,), dtype, ""
            yield "prototype_score", (H, 4, 3), dtype, ""
        yield "prototype_score", (768, 16, 2), dtype, "center"
        for M in (2, 5, 1000):
            yield "domain_expertise", (M,), dtype, ""


def name_of(kernel: str, V: int, dtype: str, kind: str, label: bool) -> str:
    return f"{kernel} V={V} {dtype} {kind}{' label' if label else ''}"


def is_before_3_8() -> bool:
    """Whether this Triton is one that cannot compile a reduction over the blocks of a cluster, and
    whose assembler spills KNOWN_SPILLS."""
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)


def spilled(rows: list[dict]) -> list[dict]:
    """The rows that spill and should not."""
    known = KNOWN_SPILLS if is_before_3_8() else {}
    return [row for row in rows if row["spills"] > known.get((row["variant"], row["arch"]), 0)]


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
    check_globals(function)
    return {
        "variant": name_of(kernel, V, dtype, kind, label),
        "arch": arch,
        "warps": options["num_warps"],
    } | resources(binary)


# Launchers called with tensors of the sizes that count, their launches noted and not made


def feature_calls(operator: str, sizes: tuple[int, ...], dtype: str, form: str) -> list[tuple]:
    """(launcher, arguments) of a feature loss, as at a call with two layers, and with masks unless
    the form says otherwise."""
    import torch

    from metakd.kernels import (
        attention_map,
        attention_score_mse,
        hidden_mse,
        mixture_kl,
        prototypes,
    )

    of = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    B, A, L, N = 2, 2, 256, 32
    mask = torch.ones(B, L, dtype=torch.bool)
    index = torch.zeros(N, dtype=torch.int64)
    if operator.startswith("attention"):
        # As a model has them, [B, L, A, D] seen as [B, A, L, D].
        query_s, key_s, query_t, key_t = (
            [torch.zeros(B, L, A, D, dtype=of).transpose(1, 2) for _ in range(2)]
            for D in (sizes[0], sizes[0], sizes[1], sizes[1])
        )
        masks = (None, None) if "unmasked" in form else (mask, mask)
        window = 64 if "window" in form else None
        reach = window, 0 if "causal" in form else window
        pairs = query_s, key_s, query_t, key_t, *masks, *reach, 1.0, 1.0
        heads = torch.zeros(2, B, A)
        if operator == "attention_map":
            flags = "squared" in form, "same" in form
            stats = torch.zeros(2, B, A, 3, L)
            return [
                (attention_map.attention_map_fwd, (*pairs, *flags)),
                (attention_map.attention_map_bwd, (heads, *pairs, stats, *flags)),
            ]
        guard = float("inf") if "tiles" in form else 1e-5
        gram = torch.zeros(2, B, A, 2, sum(sizes), sizes[0])
        norm = heads if "norm" in form else None
        return [
            (attention_score_mse.attention_score_mse_fwd, (*pairs, norm, guard)),
            (attention_score_mse.attention_score_mse_bwd, (heads, *pairs, gram, heads, guard)),
        ]
    if operator == "domain_expertise":
        logits = torch.zeros(N, *sizes, dtype=of)
        return [(prototypes.domain_expertise, (logits, index, torch.zeros(N)))]
    if operator == "mixture_kl":
        M, C = sizes
        student, teacher = torch.zeros(N, C, dtype=of), torch.zeros(N, M, C, dtype=of)
        given = student, teacher, torch.zeros(N, M)
        settings = None if form == "unmasked" else mask[0, :N], 1.0, 1.0
        stats = torch.zeros(2 + 3 * M, N)
        return [
            (mixture_kl.mixture_kl_fwd, (*given, *settings)),
            (mixture_kl.mixture_kl_bwd, (torch.zeros(N), *given, stats, *settings)),
        ]
    H, *cells = sizes
    embedding = torch.zeros(N, H, dtype=of)
    if operator == "class_prototypes":
        return [(prototypes.class_prototypes, (embedding, index, index, 4, 3))]
    if operator == "prototype_score":
        counts = torch.zeros(cells, dtype=torch.int64)
        center = torch.zeros(H) if form == "center" else None
        tables = torch.zeros(*cells, H), counts
        args = embedding, *tables, index, index, 0.5, center
        return [(prototypes.prototype_score, args)]
    layers = [torch.zeros(B, L, H, dtype=of) for _ in range(2)]
    if operator == "masked_mean":
        return [
            (prototypes.masked_mean_fwd, (layers[0], mask)),
            (prototypes.masked_mean_bwd, (layers[0][:, 0], mask)),
        ]
    real = None if form == "unmasked" else mask
    return [
        (hidden_mse.hidden_mse_fwd, (layers, layers, real)),
        (hidden_mse.hidden_mse_bwd, (torch.zeros(2, B), layers, layers, real)),
    ]


def launches_of(calls: list[tuple], arch: int) -> list[tuple]:
    """(kernel, arguments by name) of each launch that the calls would make on that architecture."""
    from unittest.mock import patch

    from triton.runtime import JITFunction

    noted = []

    def note(kernel, *args, grid, warmup, **named):
        noted.append((kernel, dict(zip(kernel.arg_names, args)) | named))

    of_device = patch("metakd.kernels.shared.major", lambda _: arch // 10)
    with of_device, patch.object(JITFunction, "run", note):
        for launcher, args in calls:
            launcher(*args)
    return noted


def type_of(value) -> str | tuple:
    """What Triton calls the type of a kernel's argument."""
    import torch

    pointers = {
        torch.float32: "*fp32",
        torch.bfloat16: "*bf16",
        torch.float16: "*fp16",
        torch.int64: "*i64",
        torch.uint8: "*u8",
        torch.bool: "*i1",
    }
    if isinstance(value, tuple):
        return tuple(type_of(x) for x in value)
    if isinstance(value, torch.Tensor):
        return pointers[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def aligned(value, path: tuple[int, ...]):
    """Paths to the tensors of an argument: they start at a multiple of 16 bytes."""
    if isinstance(value, tuple):
        for place, x in enumerate(value):
            yield from aligned(x, (*path, place))
    elif not isinstance(value, (int, float)):
        yield path


def compile_features(operator: str, sizes: tuple, dtype: str, form: str, arch: int) -> list[dict]:
    """A row for each kernel that the operator launches."""
    found = {}
    for kernel, args in launches_of(feature_calls(operator, sizes, dtype, form), arch):
        name = kernel.__name__.strip("_").removesuffix("_kernel")
        row = {"variant": f"{name} {'/'.join(map(str, sizes))} {dtype} {form}".strip()}
        found.setdefault(name, row | {"arch": arch} | compile_launch(kernel, args, arch))
    return list(found.values())


@functools.cache
def assembled(kernel, signature: tuple, constants: tuple, hints: tuple, options: tuple, arch: int):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    hints = {path: [["tt.divisibility", 16]] for path in hints}
    source = ASTSource(kernel, dict(signature), dict(constants), hints)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(options))
    check_globals(kernel)
    return resources(binary)


def compile_launch(kernel, args: dict, arch: int) -> dict:
    signature, constants, hints = {}, {}, []
    for place, parameter in enumerate(kernel.params):
        value = args[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        else:
            signature[parameter.name] = type_of(value)
            hints += aligned(value, (place,))
    options = {name: value for name, value in args.items() if name not in kernel.arg_names}
    pieces = (tuple(x.items()) for x in (signature, constants))
    resources = assembled(kernel, *pieces, tuple(hints), tuple(sorted(options.items())), arch)
    return {"warps": options["num_warps"]} | resources


def check_globals(kernel) -> None:
    """Raises RuntimeError where a launch would: Triton looks whether the module's constants that a
    kernel uses are still what they were, which a NaN never is."""
    for (name, _), (value, module) in kernel.used_global_vals.items():
        if module.get(name) != value:
            raise RuntimeError(
                f"{kernel.__name__} cannot be launched: it reads the constant {name}"
            )


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
    variants = [*everything(), *every_feature()] if options.all else [*SELECTION, *FEATURES]
    for variant, arch in itertools.product(variants, options.arch):
        feature = len(variant) == 4
        name = " ".join(map(str, variant)) if feature else name_of(*variant)
        clusters = arch >= 90 and not is_before_3_8()
        if options.only not in name or (name.startswith("cluster") and not clusters):
            continue
        compiled = compile_features if feature else compile_variant
        found = compiled(*variant, arch)
        rows += found if feature else [found]
        for row in [] if options.json else rows[-len(found) if feature else -1 :]:
            print(
                f"{row['variant']:44} sm_{row['arch']:<3} {row['warps']:2} warps "
                f"{row['registers']:3} registers {row['spills']:3} spilled {row['shared']} shared",
                flush=True,
            )
    if options.json:
        print(json.dumps(rows, indent=1))
    return int(bool(spilled(rows)))


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
