"""Breaks the losses one line at a time and sees that the tests notice.

``make mutants`` (or ``python tests/mutants.py [NAME...]``) copies the tree, applies each mutant to
the copy, rebuilds the extension where C++ changed, and runs the tests of the loss. A mutant that
no test fails for survives, and the exit code is the number of survivors. ``--list`` shows them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Of each family.
TESTS = {
    "soft": ["soft_kl", "linear_soft_kl", "losses"],
    "mixtures": ["mixture_kl", "losses"],
    "scores": ["attention_score_mse", "losses", "attention_losses"],
    "maps": ["attention_map", "losses", "attention_losses"],
    "hidden": ["hidden_mse", "losses"],
    "weights": ["prototype_ops"],
}


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str  # occurs once in the file
    new: str
    only: str = ""  # pytest -k: the tests of the part that changed, to be quick
    family: str = "soft"  # of TESTS

    @property
    def compiled(self) -> bool:
        return self.file.startswith("csrc/")


REFERENCE, SOFT = "metakd/reference.py", "metakd/functional/soft.py"
CHECKS, LOGITS = "metakd/functional/checks.py", "metakd/functional/logits.py"
TRITON, ROWS, CPP = (
    "metakd/kernels/soft_kl.py",
    "csrc/include/soft_kl_rows.h",
    "csrc/cpu/soft_kl.cpp",
)

MUTANTS = [
    Mutant(
        "reference: T^2 dropped",
        SOFT,
        "    value = value * settings.scale\n",
        "",
    ),
    Mutant(
        "reference: student and teacher swapped",
        REFERENCE,
        "lambda log_s, log_t: _divergence(log_t, log_s),",
        "lambda log_s, log_t: _divergence(log_s, log_t),",
    ),
    Mutant(
        "reference: massless classes not skipped",
        REFERENCE,
        "(log_p - log_q).masked_fill(p == 0, 0.0)",
        "(log_p - log_q)",
    ),
    Mutant(
        "reference: mixture weights swapped",
        REFERENCE,
        "beta * _divergence(log_t, log_m) + (1.0 - beta) * _divergence(log_s, log_m)",
        "(1.0 - beta) * _divergence(log_t, log_m) + beta * _divergence(log_s, log_m)",
    ),
    Mutant(
        "reference: temperature ignored",
        REFERENCE,
        "F.log_softmax(logits / temperature, -1)",
        "F.log_softmax(logits, -1)",
    ),
    Mutant(
        "reference: hard weight dropped",
        SOFT,
        "value = value + settings.hard_weight * reference",
        "value = value + reference",
    ),
    Mutant(
        "reference: masked rows not cut off",
        SOFT,
        "        student = student.masked_fill(~mask[:, None], 0.0)\n",
        "",
    ),
    Mutant(
        "head: masked hidden states reach the weight",
        SOFT,
        "hidden = hidden.masked_fill(~part[0][:, None], 0.0)",
        "hidden = hidden",
        "linear",
    ),
    Mutant(
        "head: last token of a chunk dropped",
        SOFT,
        "slice(start, min(start + size, total))",
        "slice(start, min(start + size, total - 1))",
        "linear or chunk",
    ),
    Mutant(
        "head: upstream gradient ignored",
        SOFT,
        "torch.mul(x, dloss, out=",
        "torch.mul(x, torch.ones_like(dloss), out=",
        "linear",
    ),
    Mutant(
        "head: only the last chunk's bias gradient",
        SOFT,
        "dbias += dlogits.sum(0, dtype=wide)",
        "dbias = dlogits.sum(0, dtype=wide)",
        "linear",
    ),
    Mutant(
        "door: weights dropped from the chunked mean",
        LOGITS,
        'factors = reduce_rows(ones, weight, mask, "none")',
        'factors = reduce_rows(ones, None, mask, "none")',
    ),
    Mutant(
        "door: mean over masked rows too",
        CHECKS,
        "return max(rows.numel(), 1) if mask is None else mask.sum().clamp(min=1)",
        "return max(rows.numel(), 1)",
    ),
    Mutant(
        "door: ignored labels not masked",
        LOGITS,
        "mask = counted if mask is None else mask & counted",
        "mask = counted if mask is None else mask",
    ),
    Mutant(
        "door: T in place of T^2",
        LOGITS,
        "float(temperature) ** 2 if scale_by_temperature",
        "float(temperature) if scale_by_temperature",
    ),
    Mutant(
        "Triton: sign of the gradient",
        TRITON,
        "        return q - p\n",
        "        return p - q\n",
        "triton",
    ),
    Mutant(
        "Triton: reverse KL without its mean",
        TRITON,
        "q * (-r - inner))",
        "q * (-r))",
        "triton",
    ),
    Mutant(
        "Triton: mean of the mixture unweighted",
        TRITON,
        "return value, (1.0 - beta) * inner",
        "return value, inner",
        "triton",
    ),
    Mutant(
        "Triton: last element of a row dropped",
        TRITON,
        "tl.cdiv(lead + V, SIZE) - (last - first)",
        "tl.cdiv(lead + V - 1, SIZE) - (last - first)",
        "triton",
    ),
    Mutant(
        "Triton: long rows unscaled",
        TRITON,
        "    loss = scale * divergence\n    if LABEL:",
        "    loss = divergence\n    if LABEL:",
        "triton",
    ),
    Mutant(
        "Triton: label's logit not relative to the maximum",
        TRITON,
        "hard_weight * (lsum_1 - (s_label - max_s))",
        "hard_weight * (lsum_1 - s_label)",
        "triton",
    ),
    Mutant(
        "Triton: the label's -1 missing in long rows",
        TRITON,
        "hard * (q_1 - 1.0)",
        "hard * q_1",
        "triton",
    ),
    Mutant(
        "Triton: masked long rows cleared up to V only",
        TRITON,
        "            _clear(dstudent + row * C, 0, C, LANES * PER)\n            return",
        "            _clear(dstudent + row * C, 0, V, LANES * PER)\n            return",
        "triton",
    ),
    Mutant(
        "Triton: padding of long rows left as it was",
        TRITON,
        "    _clear(dstudent + lead, V, C, LANES * PER)\n",
        "",
        "triton",
    ),
    Mutant(
        "Triton: an old lane sum not rescaled",
        TRITON,
        "sum_s = keep_s * sum_s + tl.sum(e_s, 1)",
        "sum_s = sum_s + tl.sum(e_s, 1)",
        "triton",
    ),
    Mutant(
        "Triton: upstream gradient's stride",
        TRITON,
        "args += [drows.stride(0), student.stride(0)",
        "args += [1, student.stride(0)",
        "triton",
    ),
    Mutant(
        "C++: sign of the teacher's part",
        ROWS,
        "d = es * at.weight_s - soft(dt) * at.weight_t;",
        "d = es * at.weight_s + soft(dt) * at.weight_t;",
        "cpp",
    ),
    Mutant(
        "C++: reverse KL without its mean",
        ROWS,
        "* at.inv_t - at.inner);",
        "* at.inv_t);",
        "cpp",
    ),
    Mutant(
        "C++: shift of the reverse KL left in",
        ROWS,
        "row.value = row.inner - row.shift * inv_t + between;",
        "row.value = row.inner + between;",
        "cpp",
    ),
    Mutant(
        "C++: shift lost between forward and backward",
        ROWS,
        "row.shift = stats[SHIFT * job.rows];",
        "row.shift = 0;",
        "cpp",
    ),
    Mutant(
        "C++: label's logit not relative to the maximum",
        ROWS,
        "(row.lsum_1 - (picked - row.max_s))",
        "(row.lsum_1 - picked)",
        "cpp",
    ),
    Mutant(
        "C++: mixture weights swapped",
        ROWS,
        "const V larger = teacher ? beta : rest, smaller = teacher ? rest : beta;",
        "const V larger = teacher ? rest : beta, smaller = teacher ? beta : rest;",
        "cpp",
    ),
    Mutant(
        "C++: massless classes not skipped",
        ROWS,
        "sums.cross += et == zero ? zero : et * (dt - ds);",
        "sums.cross += et * (dt - ds);",
        "cpp",
    ),
    Mutant(
        "C++: divergence unscaled",
        ROWS,
        "    row.value = row.value * scalar<X>(job.scale);\n",
        "",
        "cpp",
    ),
    Mutant(
        "C++: mask inverted",
        CPP,
        "mask && !mask[row * mask_stride]",
        "mask && mask[row * mask_stride]",
        "cpp",
    ),
    Mutant(
        "C++: upstream gradient's stride",
        CPP,
        "job.drows_stride = drows.stride(0);",
        "job.drows_stride = 1;",
        "cpp",
    ),
]

SCORES, MAPS, HIDDEN, WEIGHTS, MIXTURES = (
    f"csrc/include/{name}.h"
    for name in (
        "attention_score_mse_heads",
        "attention_map_heads",
        "hidden_mse_rows",
        "prototypes_rows",
        "mixture_kl_rows",
    )
)
TRITON_MIXTURES = "metakd/kernels/mixture_kl.py"
ATTENTION = "metakd/functional/attention.py"
MUTANTS += [
    Mutant(
        "reference: the Gram form adds the teacher",
        REFERENCE,
        "left = torch.cat([query_s, -query_t], -1)",
        "left = torch.cat([query_s, query_t], -1)",
        family="scores",
    ),
    Mutant(
        "reference: causal masks ignored in the count",
        REFERENCE,
        "key_mask.sum(1, keepdim=True) if after is None else _real_below(key_mask, after + 1)",
        "key_mask.sum(1, keepdim=True)",
        family="scores",
    ),
    Mutant(
        "reference: teacher and student swapped in the maps",
        REFERENCE,
        "return _divergence(log_t, log_s).masked_fill(~allowed.any(-1), 0.0).sum((1, 2))",
        "return _divergence(log_s, log_t).masked_fill(~allowed.any(-1), 0.0).sum((1, 2))",
        family="maps",
    ),
    Mutant(
        "reference: hidden states not averaged over features",
        REFERENCE,
        "rows.append(residual.square().sum((1, 2)) / (tokens * residual.shape[2]))",
        "rows.append(residual.square().sum((1, 2)) / tokens)",
        family="hidden",
    ),
    Mutant(
        "reference: empty cells count",
        REFERENCE,
        "own, others = exists & is_own, exists & ~is_own",
        "own, others = is_own, ~is_own",
        family="weights",
    ),
    Mutant(
        "door: sum of heads for their mean",
        ATTENTION,
        "factors = [factor / count for factor, count in zip(factors, heads)]",
        "pass",
        family="scores",
    ),
    Mutant(
        "door: heads not averaged",
        ATTENTION,
        "return found.sum((0, 2)) / (own.shape[1] * count)",
        "return found.sum((0, 2)) / count",
        family="scores",
    ),
    Mutant(
        "door: no guard",
        ATTENTION,
        "return GRAM_GUARD if gram else math.inf",
        "return 0.0 if gram else math.inf",
        family="scores",
    ),
    Mutant(
        "door: masked tokens reach the gradient of a projection",
        "metakd/functional/hidden.py",
        "        layer = layer.masked_fill(~mask[:, :, None], 0.0)\n",
        "        pass\n",
        family="hidden",
    ),
    Mutant(
        "contract: gradients of queries and keys swapped",
        "metakd/ops.py",
        "return found + [None] * (2",
        "return found[len(kept[0]) :] + found[: len(kept[0])] + [None] * (2",
        family="scores",
    ),
    Mutant(
        "C++: cross products counted once",
        SCORES,
        "found = {square_s + 2 * cross + square_t, square_s + square_t};",
        "found = {square_s + cross + square_t, square_s + square_t};",
        "cpp",
        "scores",
    ),
    Mutant(
        "C++: half of the teacher's block counted once",
        SCORES,
        "sum += r < c + size ? part : 2 * part;",
        "sum += part;",
        "cpp",
        "scores",
    ),
    Mutant(
        "C++: the scale missing from the gradient of the queries",
        SCORES,
        "of_keys, 2 * dhead * head.scale_s, right, product, dquery);",
        "of_keys, 2 * dhead, right, product, dquery);",
        "cpp",
        "scores",
    ),
    Mutant(
        "C++: what follows a padded row is not cleared",
        SCORES,
        "packed.clear_unseen(block + r * packed.stride, from, to, keys);",
        ";",
        "cpp",
        "scores",
    ),
    Mutant(
        "C++: the last block of a row lost",
        SCORES,
        "if (count < Float<A>::lanes) x = cut<A>(x, count);",
        "if (count < Float<A>::lanes) return;",
        "cpp",
        "scores",
    ),
    Mutant(
        "C++: teacher's map weighs the wrong way",
        MAPS,
        "part_cross += et == zero ? zero : et * (dt - ds);",
        "part_cross += et == zero ? zero : es * (dt - ds);",
        "cpp",
        "maps",
    ),
    Mutant(
        "C++: inner product lost",
        MAPS,
        "store(s + c, squared ? p_s * (gap - inner) : gap);",
        "store(s + c, squared ? p_s * gap : gap);",
        "cpp",
        "maps",
    ),
    Mutant(
        "C++: factor 2 of squared maps",
        MAPS,
        "const double factor = squared ? 2 * dhead : dhead;",
        "const double factor = dhead;",
        "cpp",
        "maps",
    ),
    Mutant(
        "C++: log-sums from one side",
        MAPS,
        "return cross / sum_t + ::log(sum_s / sum_t);",
        "return cross / sum_t + ::log(sum_s);",
        "cpp",
        "maps",
    ),
    Mutant(
        "C++: masked tokens in the sum of squares",
        HIDDEN,
        "      if (!tokens.is_real(token)) continue;\n",
        "",
        "cpp",
        "hidden",
    ),
    Mutant(
        "C++: odd vectors lost",
        HIDDEN,
        "add_wide<A>(sum, even + odd);",
        "add_wide<A>(sum, even);",
        "cpp",
        "hidden",
    ),
    Mutant(
        "C++: gradients of masked tokens left unwritten",
        HIDDEN,
        "__builtin_memset(static_cast<void*>(to), 0, tokens.width * sizeof(*to));",
        "",
        "cpp",
        "hidden",
    ),
    Mutant(
        "C++: the mean over the wrong number of domains",
        WEIGHTS,
        "if (count > 0) others /= static_cast<double>(count);",
        "if (count > 0) others /= static_cast<double>(domains - 1);",
        "cpp",
        "weights",
    ),
    Mutant(
        "C++: prototypes not centered",
        WEIGHTS,
        "      if (center) x -= load(center + c);\n",
        "",
        "cpp",
        "weights",
    ),
    Mutant(
        "contract: gradients of student and shares swapped",
        "metakd/ops.py",
        "kept: found,",
        "kept: found[::-1],",
        family="mixtures",
    ),
    Mutant(
        "Triton: a mixture's sums not rescaled",
        TRITON_MIXTURES,
        "        sum_t *= tl.exp2((max_t - new_t) * rate)\n",
        "",
        "triton",
        "mixtures",
    ),
    Mutant(
        "Triton: shares taken to sum to 1",
        TRITON_MIXTURES,
        "weight * (heard * q - tl.sum",
        "weight * (q - tl.sum",
        "triton",
        "mixtures",
    ),
    Mutant(
        "Triton: a student's NaN passed over",
        TRITON_MIXTURES,
        '    share = tl.where((sum_s == sum_s)[:, None], share, float("nan"))\n',
        "",
        "triton",
        "mixtures",
    ),
    Mutant(
        "C++: the largest part of a mixture taken for all of it",
        MIXTURES,
        "gap + log_quotient<A>(p, largest);",
        "gap;",
        "cpp",
        "mixtures",
    ),
    Mutant(
        "C++: a piece's maximum taken for its row's",
        MIXTURES,
        "if (max > before) room.powers[k] *= ::exp((before - max) / job.temperature);",
        ";",
        "cpp",
        "mixtures",
    ),
    Mutant(
        "C++: a share's slope without its 1",
        MIXTURES,
        "share == 0 ? 0 : up * (of_side[INNER * job.rows] + 1));",
        "share == 0 ? 0 : up * of_side[INNER * job.rows]);",
        "cpp",
        "mixtures",
    ),
    Mutant(
        "C++: classes without mass not skipped in a mixture",
        MIXTURES,
        "side.inner += side.power == zero ? zero : side.power * ratio;",
        "side.inner += side.power * ratio;",
        "cpp",
        "mixtures",
    ),
]


def copy_tree(target: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run(tree: Path, command: list[str], log: Path) -> int:
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "XDG_CACHE_HOME": str(tree.parent / "cache"),  # of libraries that are wrong on purpose
    }
    with log.open("w") as stream:
        return subprocess.run(
            command, cwd=tree, env=environment, stdout=stream, stderr=subprocess.STDOUT
        ).returncode


def build(tree: Path, log: Path) -> None:
    if run(tree, [sys.executable, "-m", "metakd", "build"], log):
        raise SystemExit(f"the kernels do not compile:\n{log.read_text()[-3000:]}")


def tests(tree: Path, log: Path, family: str, only: str = "") -> int:
    chosen = ["-k", only] if only else []
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "not deep"]  # what `make test` runs has to notice
    files = [f"tests/test_{name}.py" for name in TESTS[family]]
    return run(tree, [*command, *files, *chosen], log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only these")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--family", choices=TESTS, action="append", help="only of these")
    options = parser.parse_args()
    chosen = [
        mutant
        for mutant in MUTANTS
        if mutant.name in (options.names or [mutant.name])
        and mutant.family in (options.family or TESTS)
    ]
    if options.list:
        print(*(f"{mutant.file}: {mutant.name}" for mutant in chosen), sep="\n")
        return
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        tree, log = Path(folder) / "tree", Path(folder) / "log"
        copy_tree(tree)
        build(tree, log)
        for family in {mutant.family for mutant in chosen}:
            if tests(tree, log, family):
                raise SystemExit(f"tests fail without a mutant:\n{log.read_text()[-3000:]}")
        # Compiled ones last: each build mends the mutant before it.
        for mutant in sorted(chosen, key=lambda mutant: mutant.compiled):
            path = tree / mutant.file
            source = path.read_text()
            if source.count(mutant.old) != 1:
                raise SystemExit(f"{mutant.name}: {mutant.file} holds its line not once")
            start = time.perf_counter()
            path.write_text(source.replace(mutant.old, mutant.new))
            if mutant.compiled:
                build(tree, log)
            status = tests(tree, log, mutant.family, mutant.only)
            verdict = {0: "SURVIVED", 1: "killed"}.get(status, f"no verdict (pytest {status})")
            if status != 1:
                survivors.append(mutant)
            path.write_text(source)
            seconds = time.perf_counter() - start
            print(f"{verdict:10} {mutant.file}: {mutant.name} ({seconds:.0f} s)", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants killed")
    sys.exit(len(survivors))


if __name__ == "__main__":
    main()
