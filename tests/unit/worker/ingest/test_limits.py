"""Process limits hold, in a process of their own."""

import signal
import subprocess
import sys

PRELUDE = """
import resource
from core.settings import DataLimits
from worker.ingest.limits import apply_process_limits
"""


def python(code):
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_limits_are_set_and_never_raised():
    done = python("""
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
apply_process_limits(DataLimits(parser_cpu_s=30, parser_memory_bytes=2**30))
print(*(resource.getrlimit(w) for w in (
    resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_CORE)))
apply_process_limits(DataLimits(parser_cpu_s=10, parser_memory_bytes=2**31))
print(resource.getrlimit(resource.RLIMIT_CPU), resource.getrlimit(resource.RLIMIT_AS))
""")
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "(20, 20) (1073741824, 1073741824) (0, 0)",
        "(10, 15) (1073741824, 1073741824)",
    ]


def test_memory_limit_stops_an_allocation():
    done = python("""
apply_process_limits(DataLimits(parser_memory_bytes=2**29))
try:
    bytes(2**30)
except MemoryError:
    print("refused")
""")
    assert done.stdout.strip() == "refused"


def test_what_is_loaded_already_is_beside_the_limit():
    done = python("""
import mmap
from worker.ingest.limits import mapped_bytes
before = mapped_bytes()
loaded = mmap.mmap(-1, 2**30)
print(mapped_bytes() - before >= 2**30)
apply_process_limits(DataLimits(parser_memory_bytes=2**29), beside_bytes=mapped_bytes())
print(len(bytes(2**28)))
try:
    bytes(2**29 + 2**28)
except MemoryError:
    print("refused")
""")
    assert done.stdout.split() == ["True", str(2**28), "refused"], done.stderr


def test_cpu_limit_stops_a_loop():
    done = python("""
apply_process_limits(DataLimits(parser_cpu_s=1))
while True:
    pass
""")
    assert done.returncode == -signal.SIGXCPU
