"""Whether HRKD's network can tell domains apart: ``python -m benchmarks.relations``.

Prototypes of the domains under the pre-trained encoder, at each of its layers, and several draws of
``metakd.method.relations.Relations`` on them: how far its weights are from 1 with and without
dropout, and how large the gradient is by which it would be trained, that of the mean loss where
every example of a domain has the same loss and domains differ. The same with prototypes less their
mean over domains. Prints ``docs/results/relations.txt``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from benchmarks.run import environment, heading
from metakd.method.relations import Relations
from metakd.models.taps import Taps

ROOT = Path(__file__).resolve().parents[1]
TEXTS, DRAWS, MASKS, LENGTH, BATCH = 64, 10, 200, 96, 16


def prototypes(encoder: Path, files: Path) -> tuple[list[str], Relations]:
    """A network that has noted the first texts of each domain."""
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = AutoModel.from_pretrained(encoder, add_pooling_layer=False).eval()
    texts: dict[str, list[str]] = {}
    for row in map(json.loads, (files / "train.jsonl").read_text(encoding="utf-8").splitlines()):
        texts.setdefault(row["domain"], []).append(row["text"])
    shape = model.config
    network = Relations(shape.hidden_size, shape.num_hidden_layers, len(texts))
    with torch.no_grad():
        taps = Taps(model, {"embedding", "hidden"})
        for number, own in enumerate(texts.values()):
            for start in range(0, TEXTS, BATCH):
                some = own[start : start + BATCH]
                batch = tokenizer(
                    some, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
                )
                network.note(taps(batch), torch.full((len(some),), number))
    network.settle()
    return list(texts), network


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", type=Path, default=ROOT / "models" / "minilm")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "reviews")
    options = parser.parse_args()
    domains, noted = prototypes(options.encoder, options.data)
    layers, number, hidden = noted.prototypes.shape
    losses = torch.arange(1.0, number + 1)  # of the domains, each as often
    print(*heading(environment("cpu", torch.get_num_threads())), sep="\n")
    print(f"prototypes of {', '.join(domains)}: {TEXTS} texts each, {layers} layers of {hidden}")
    print(f"{DRAWS} draws of the network; r: its weights, which have the mean 1\n")
    print(
        f"{'prototypes':<12}{'dropout':>8}{'max |r - 1|':>13}{'std of r':>10}"
        f"{'max |mean r - 1|':>18}{'max |gradient|':>16}"
    )
    for name, seen in {
        "as they are": noted.prototypes,
        "centred": noted.prototypes - noted.prototypes.mean(1, keepdim=True),
    }.items():
        for dropout in (0.0, 0.1):
            furthest, spread, bias, slope = 0.0, [], 0.0, 0.0
            for draw in range(DRAWS):
                torch.manual_seed(draw)
                network = Relations(hidden, layers - 1, number, dropout)
                network.prototypes.copy_(seen)
                network.known.fill_(True)
                with torch.no_grad():
                    weights = [network() for _ in range(MASKS if dropout else 1)]
                drawn = torch.stack(weights)
                furthest = max(furthest, (drawn - 1).abs().max().item())
                bias = max(bias, (drawn.mean(0) - 1).abs().max().item())
                spread.append(drawn.std(correction=0).item())
                (network() * losses).mean(1).sum().backward()
                slopes = (p.grad.abs().max().item() for p in network.parameters())
                slope = max(slope, *slopes)
            print(
                f"{name:<12}{dropout:>8g}{furthest:>13.1e}{sum(spread) / DRAWS:>10.1e}"
                f"{bias:>18.1e}{slope:>16.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
