"""Load a server of a tier with many clients, and fail unless each gets what it would get alone.

    python scripts/load_serve.py [--tier DIR] [--clients 32] [--seconds 180]

Without --tier, the server has the pair of models that comes with the tests, in the recipe q4. The
clients ask short and long questions, for JSON of schemas, for calls of tools and with seeds, and
some disconnect. After that, it measures the time until the first token of short requests, on the
idle server and while it reads a long prompt. It prints a report as JSON, and how answers are
compared is said in `tests/load.py`.
"""

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from tests.library import Library  # noqa: E402
from tests.load import first_tokens, load, with_tools  # noqa: E402
from tests.serving import running  # noqa: E402

#: Kept caches, in bytes: some prompts are found there, and some are not.
KEPT = 8_000_000
FACTOR = 3.0


def main() -> int:
    """Run, print the report, and say by the exit code whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tier", type=Path, help="a tier that fits in memory, in float32")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--first-tokens", type=int, default=20, help="how often they are measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tier = options.tier or Library(Path(folder)).demo_tier("q4")
        tier = with_tools(tier, Path(folder) / "with_tools")
        with running(tier, max_tokens=100, prompt_cache_bytes=KEPT) as server:
            report = load(server, options.clients, options.seconds)
            idle = server.wait(lambda: not server.server.generator.replies, 60)
            logged = [line for line in server.log if "failed" in line or "Error" in line]
        with running(tier, prompt_cache_bytes=0) as server:
            times = first_tokens(server, options.first_tokens)
    found = asdict(report) | {
        "replies that were left": not idle,
        "logged": logged,
        "first token, idle, median s": round(statistics.median(times.idle), 3),
        "first token while a long prompt is read, median s": round(
            statistics.median(times.reading), 3
        ),
        "largest s": round(max(times.reading), 3),
        "factor": round(times.ratio, 2),
    }
    print(json.dumps(found, indent=1))
    return 0 if idle and not report.failures and not logged and times.ratio < FACTOR else 1


if __name__ == "__main__":
    sys.exit(main())
