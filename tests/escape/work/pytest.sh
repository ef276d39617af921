# Assertion rewriting writes caches, a fixture uses tmp_path, a failing test fails the run.
set -eu
mkdir suite
cd suite
cat > test_sums.py <<'PYTHON'
import subprocess
import sys

import pytest


@pytest.mark.parametrize("number", range(5))
def test_a_number_is_itself(number, tmp_path):
    (tmp_path / "number").write_text(str(number))
    assert int((tmp_path / "number").read_text()) == number


def test_a_child_of_the_same_interpreter_runs():
    assert subprocess.check_output([sys.executable, "-c", "print(1)"]) == b"1\n"
PYTHON
pytest --quiet > report.txt || { cat report.txt; exit 1; }
grep -q '6 passed' report.txt
echo 'def test_no(): assert False' > test_no.py
if pytest --quiet test_no.py > /dev/null; then exit 1; fi
