"""How a script ends: by Ctrl-C, and when nobody reads its output any more."""

import os
import subprocess
import sys

import pytest

START = "from hotdog_hf.errors import *; import os, signal, sys\nwith exit_on_user_error(): "


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals and pipes")
@pytest.mark.parametrize("lines", [1, 100_000], ids=["in the buffer", "many"])
def test_a_reader_that_stops_ends_a_script_without_a_word(lines):
    command = f"sys.stdin.read(); print('a line\\n' * {lines}); raise SystemExit(0)"
    process = subprocess.Popen(
        [sys.executable, "-c", START + command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == b"" and process.wait() == 141


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals and pipes")
def test_ctrl_c_ends_a_script_without_a_traceback():
    command = "signal.signal(signal.SIGINT, signal.default_int_handler); os.kill(os.getpid(), signal.SIGINT)"
    words = [sys.executable, "-c", START + f"{command}; input()"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_broken_pipe_that_is_not_the_output_is_not_hidden():
    words = [sys.executable, "-c", START + "raise BrokenPipeError('of a worker')"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "BrokenPipeError: of a worker" in done.stderr
