"""Command line of the benchmark: python -m capkit.benchmark --size small --out results.json."""

import argparse
import re
from pathlib import Path

from capkit.benchmark.benchmark import PARTS, Benchmark
from capkit.benchmark.models import SIZES
from capkit.benchmark.results import as_markdown


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m capkit.benchmark", description="How fast is capkit here?")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--out", type=Path, help="default: <out folder>/<machine>_<size>.json")
    parser.add_argument("--out-folder", type=Path, default=Path("notebooks/results"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--parts", nargs="*", default=(), choices=PARTS, help="only these")
    arguments = parser.parse_args()
    try:
        benchmark = Benchmark(arguments.size, arguments.device, arguments.dtype)
    except ValueError as error:
        parser.error(str(error))
    machine = benchmark.machine
    name = machine["gpu"] or f"{machine['cpu']} {machine['torch_threads']} threads"
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    out = arguments.out or arguments.out_folder / f"{slug}_{arguments.size}.json"
    print("\n" + as_markdown(benchmark.run(arguments.parts, out)) + f"\n\n{out}")


if __name__ == "__main__":
    main()
