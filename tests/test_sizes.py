"""docs/sizes.md is what the code computes."""

import sys

from tests.program import ROOT, run_command


def test_the_page_is_up_to_date() -> None:
    run_command(sys.executable, ROOT / "scripts" / "sizes.py", "--check", cwd=ROOT)
