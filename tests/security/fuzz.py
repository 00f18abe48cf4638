"""
Fuzzing for a long time: `python tests/security/fuzz.py [MINUTES]` runs test_fuzzing.py, in processes of its own, with
other random files each time. It stops at the first failure, which names the example.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main(minutes: float = 60) -> int:
    """The exit status: 0 if nothing was found."""
    end, rounds = time.monotonic() + 60 * minutes, 0
    with tempfile.TemporaryDirectory() as folder:
        last = Path(folder, "last")
        environment = {"FUZZ_EXAMPLES": "30", "FUZZ_LAST": str(last), **os.environ}
        while time.monotonic() < end:
            rounds += 1
            seed = int.from_bytes(os.urandom(4), "little")
            tests = str(Path(__file__).with_name("test_fuzzing.py"))
            options = ["-q", "-x", "-p", "no:cacheprovider", f"--hypothesis-seed={seed}", "--tb=short", tests]
            status = subprocess.run([sys.executable, "-m", "pytest", *options], env=environment).returncode
            if status != 0:
                if status < 0 and last.exists():  # the process was killed, perhaps by a decoder
                    print(f"The process was ended by signal {-status} in this example:\n{last.read_text()}")
                print(f"Failed in round {rounds}, with FUZZ_EXAMPLES={environment['FUZZ_EXAMPLES']} and seed {seed}.")
                return 1
    print(f"{rounds} rounds, nothing found.")
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(float, sys.argv[1:])))
