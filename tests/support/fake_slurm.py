"""Fakes of Slurm's commands: shell scripts in a folder that goes in front of PATH.

Each call is a line of ``calls.txt``. ``sbatch`` answers ids 100, 101, ...; ``squeue`` and ``sacct``
print the files ``squeue.txt`` and ``sacct.txt``, or fail as Slurm does for an unknown job or where
accounting is off.
"""

from __future__ import annotations

import os
from pathlib import Path

_SBATCH = """\
echo "sbatch $*" >> "$FAKE/calls.txt"
if [ -e "$FAKE/refuse.txt" ]; then cat "$FAKE/refuse.txt" >&2; exit 1; fi
for last in "$@"; do :; done
number=$(cat "$FAKE/next" 2>/dev/null || echo 100)
echo $((number + 1)) > "$FAKE/next"
cp "$last" "$FAKE/script-$number.sh"
echo "Submitted batch job $number"
"""
_SQUEUE = """\
echo "squeue $*" >> "$FAKE/calls.txt"
if [ -e "$FAKE/down.txt" ]; then cat "$FAKE/down.txt" >&2; exit 1; fi
if [ -s "$FAKE/squeue.txt" ]; then cat "$FAKE/squeue.txt"; exit 0; fi
echo "slurm_load_jobs error: Invalid job id specified" >&2
exit 1
"""
_SACCT = """\
echo "sacct $*" >> "$FAKE/calls.txt"
if [ -s "$FAKE/sacct.txt" ]; then cat "$FAKE/sacct.txt"; exit 0; fi
echo "Slurm accounting storage is disabled" >&2
exit 1
"""
_SCANCEL = 'echo "scancel $*" >> "$FAKE/calls.txt"\n'
_SCONTROL = 'echo "scontrol $*" >> "$FAKE/calls.txt"\n'
_SRUN = """\
echo "srun $*" >> "$FAKE/calls.txt"
while [ "${1#-}" != "$1" ]; do shift; done
exec "$@"
"""


class FakeSlurm:
    """The folder of the fakes.

    Args:
        folder: where to put them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("sbatch", _SBATCH),
            ("squeue", _SQUEUE),
            ("sacct", _SACCT),
            ("scancel", _SCANCEL),
            ("scontrol", _SCONTROL),
            ("srun", _SRUN),
            ("sleep", "exit 0\n"),
        ):
            path = folder / name
            path.write_text(f'#!/bin/sh\nFAKE="{folder}"\n{text}', encoding="utf-8")
            path.chmod(0o755)

    @property
    def path(self) -> str:
        """PATH with the fakes in front."""
        return f"{self.folder}{os.pathsep}{os.environ['PATH']}"

    def calls(self, name: str = "") -> list[str]:
        """Calls so far, of one command or of all."""
        file = self.folder / "calls.txt"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return [line for line in lines if line.startswith(name)]

    def say(self, command: str, text: str) -> None:
        """What ``squeue``, ``sacct``, ``refuse`` or ``down`` say from now on."""
        (self.folder / f"{command}.txt").write_text(text, encoding="utf-8")

    def script(self, number: int = 100) -> str:
        """A submitted script."""
        return (self.folder / f"script-{number}.sh").read_text(encoding="utf-8")
