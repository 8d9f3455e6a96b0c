"""`make test-fuzz`: hostile inputs for all readers, and a table of what the readers did with them.

python tests/fuzz/run.py NUMBER SEED [PART OF A READER'S NAME …]
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "helpers")]

from readers import Fuzzer  # noqa: E402


def main(number: int, start: int, names: list[str]) -> int:
    """Returns 1 if a reader has a fault."""
    found, sums = False, [0.0, 0.0, 0.0]
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder))
        readers = [
            reader for reader in fuzzer.readers.values() if not names or any(name in reader.name for name in names)
        ]
        shares = sum(reader.share for reader in readers)
        print("| what is read | inputs | read | refused | seconds | slowest | faults |", flush=True)
        print("|---|---|---|---|---|---|---|", flush=True)
        for reader in readers:
            result = fuzzer.run(reader, max(1, round(number * reader.share / shares)), start)
            counts = (result.number, result.num_read, result.seconds)
            sums = [total + value for total, value in zip(sums, counts, strict=True)]
            print(
                f"| {reader.name} | {result.number:,} | {result.num_read:,} | {result.number - result.num_read:,} | "
                f"{result.seconds:.0f} | {result.slowest:.2f} | {len(result.faults)} |",
                flush=True,
            )
            for kind, value in result.faults.items():
                found = True
                print(f"{kind}\n    {value!r:.2000}", file=sys.stderr, flush=True)
        fuzzer.close()
        print(f"| all | {sums[0]:,.0f} | {sums[1]:,.0f} | {sums[0] - sums[1]:,.0f} | {sums[2]:.0f} | | |")
    return int(found)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
