"""Least times for a GPU that is not at hand: the registry's bytes and flops over given rates.

``python -m benchmarks.predict --copy 4.3e12 --matmul 7e14``: bytes (read plus written) and bf16
flops per second. These are limits, not results.
"""

import argparse

from benchmarks.registry import ROWS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--copy", type=float, required=True, help="bytes per second")
    parser.add_argument("--matmul", type=float, required=True, help="flops per second")
    options = parser.parse_args()
    print(f"Predicted, not measured: least times at {options.copy / 1e12:.1f} TB/s copied and")
    print(f"{options.matmul / 1e12:.0f} Tflop/s in matrix products.\n")
    print("| op | shape | dtype | least ms |")
    print("|---|---|---|---:|")
    for row in ROWS:
        if "cuda" in row.devices:
            seconds = row.bytes / options.copy if row.bytes else row.flops / options.matmul
            dtype = str(row.dtype).removeprefix("torch.")
            print(f"| {row.op} | {row.shape} | {dtype} | {1e3 * seconds:.3f} |")


if __name__ == "__main__":
    main()
