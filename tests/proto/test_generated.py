"""The checked-in generated code is what the schema generates, and the schema keeps buf's rules."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "tools" / "proto.py", tmp_path], check=True)
    fresh = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*_pb2*")}
    assert len(fresh) == 9
    kept = {
        path.relative_to(ROOT / "proto"): path.read_bytes()
        for path in (ROOT / "proto").rglob("*_pb2*")
        if path.suffix != ".pyc"
    }
    assert kept == fresh, "run `make proto` and commit the result"


def test_schema_keeps_the_lint_rules() -> None:
    buf = Path(sys.executable).parent / "buf"
    outcome = subprocess.run([buf, "lint"], cwd=ROOT, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
