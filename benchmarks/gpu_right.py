"""gpu.py's section `right`: the tests that are marked gpu."""

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu_report import NEEDS_CUDA, Report, Setting

_ROOT = Path(__file__).parents[1]
_MARK = re.compile(r"\bmark\.gpu\b")


def run(setting: Setting, report: Report) -> None:
    """Run them in a process of their own; each test's outcome is kept."""
    files = [path for path in sorted((_ROOT / "tests").rglob("test_*.py")) if _MARK.search(path.read_text())]
    xml = setting.output / "right.xml"
    xml.unlink(missing_ok=True)
    # Only the files with such tests: others import packages that need not be there. Warnings are no errors
    # here, since the versions are the machine's own.
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-W", "default", "-p", "no:cacheprovider"]
    command += [f"--junitxml={xml}", *map(str, files)]
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=max(1, report.left))
        output = done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        report.failed("tests", f"not finished in {late.timeout:.0f} s\n{_text(late.stdout)}")
        return
    if not xml.is_file():
        report.failed("tests", f"pytest wrote no results\n{output}")
        return
    _tell(xml, output, report)


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _tell(xml: Path, output: str, report: Report) -> None:
    failed = 0
    for case in ElementTree.parse(xml).iter("testcase"):
        name = f"{case.get('classname', '').removeprefix('tests.')}: {case.get('name')}"
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        seconds = float(case.get("time", 0))
        if outcome is None:
            report.say(f"  passed   {name} ({seconds:.1f} s)")
            report.note(name, outcome="passed", seconds=seconds)
        elif outcome.tag == "skipped":
            why = outcome.get("message", "")
            report.skip(name, NEEDS_CUDA if "needs a GPU" in why else why)
        else:
            failed += 1
            message = (outcome.get("message") or "").strip().split("\n")[0]
            report.say(f"  FAILED   {name}: {message}")
            report.note(name, outcome=outcome.tag, message=outcome.text or message)
    if failed:
        report.failed("tests", f"{output}\n{failed} failed")
