"""Messages for users: one line of bounded length each, printed by all commands."""

import errno
import os
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ilvr_jax.command import ArgumentParser, command
from ilvr_jax.errors import QUOTE_LENGTH, InputError, listed, quote


@given(st.text(), st.integers(0, 2000))
def test_an_error_is_one_printable_line_under_400_characters(text, repeats):
    message = str(InputError(f"train.jsonl line 3: {text * repeats}; it must be text"))
    assert len(message) < 400 and message.startswith("train.jsonl line 3:") and message.endswith("must be text")
    assert message.isprintable()


@pytest.mark.parametrize(
    "value",
    ["x" * 10**7, ["y" * 10**6] * 10**5, {"a": {"b": ["c"] * 10**6}}, 10**5000, b"z" * 10**7, None, 1.5, "a\n"],
    ids=type,
)
def test_a_quoted_value_is_short_and_costs_little(value):
    began = time.monotonic()
    shown = quote(value)
    assert len(shown) <= QUOTE_LENGTH and shown.isprintable()
    assert time.monotonic() - began < 0.5


def test_names_are_listed_up_to_five():
    assert listed(["a", "b"]) == "a, b"
    assert listed(map(str, range(434))) == "0, 1, 2, 3, 4 and 429 more"
    assert len(listed(["n" * 10**6] * 9)) < 450


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (InputError("`a` must be 1, got 2"), 2, "`a` must be 1, got 2"),
        (KeyboardInterrupt(), 130, "stopped"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 1, "no disk space to write runs/x"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "no disk space to write the output"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x"),
            2,
            "/x cannot be read or written: Permission denied",
        ),
    ],
)
def test_a_command_turns_errors_into_a_sentence_and_a_status(error, status, sentence, capsys):
    @command
    def main(arguments):
        raise error

    assert main([]) == status
    assert capsys.readouterr().err.startswith(sentence)


def test_faults_of_the_package_keep_their_traceback():
    @command
    def main(arguments):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main([])


def test_a_bad_argument_is_a_short_message(capsys):
    parser = ArgumentParser(prog="x")
    parser.add_argument("--seed", type=int)
    with pytest.raises(SystemExit) as exit:
        parser.parse_args([f"--seed={'9' * 10**6}"])
    assert exit.value.code == 2 and len(capsys.readouterr().err) < 500


@pytest.mark.parametrize(
    ("lines", "reader", "error"),
    [
        (10**5, "| head -1 >/dev/null", ""),
        (1, "| true", ""),  # written as the command ends
        (10**5, ">/dev/full", "no disk space to write the output"),
        (1, ">/dev/full", "no disk space to write the output"),
        (1, ">&-", ""),
    ],
)
def test_output_that_cannot_be_written_does_not_make_a_traceback(tmp_path, lines, reader, error):
    program = (
        "import sys, time\nfrom ilvr_jax.command import command\n"
        f"@command\ndef main(arguments):\n    time.sleep(0.1)\n    [print(n) for n in range({lines})]\n    return 0\n"
        "sys.exit(main([]))"
    )
    (tmp_path / "p.py").write_text(program)
    os.system(f"PYTHONPATH=. {sys.executable} {tmp_path}/p.py 2>{tmp_path}/err {reader}")
    written = (tmp_path / "err").read_text()
    assert written.startswith(error) and written.count("\n") == bool(error)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")]
)
def test_a_full_memory_is_one_sentence(error, capsys):
    @command
    def main(arguments):
        raise error

    assert main([]) == 1 and capsys.readouterr().err.startswith("the memory is full; use smaller batches")


def test_arguments_are_text(capsys):
    assert command(lambda arguments: 0)(["caf\udce9"]) == 2
    assert capsys.readouterr().err == "each argument must be text in UTF-8, got b'caf\\xe9'\n"
