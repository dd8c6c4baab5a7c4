"""Where the recorded outputs of the official OpenVLA code are; what is in them: fixtures/parity/README.md."""

from pathlib import Path

SHARED = Path(__file__).resolve().parents[2] / "shared"  # its makers keep some beside the repository, maybe others
FIXTURES = sorted(SHARED.glob("parity*")) or [Path(__file__).parent / "fixtures" / "parity"]
PARITY = FIXTURES[0]
