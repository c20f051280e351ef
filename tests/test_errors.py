"""Messages for users: one line of bounded length, and the shell of the commands that prints them."""

import errno
import os
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


def test_a_reader_that_ends_early_does_not_make_a_traceback(tmp_path):
    program = (
        "import sys\nfrom ilvr_jax.command import command\n"
        "@command\ndef main(arguments):\n    [print(n, flush=True) for n in range(10**5)]\n    return 0\n"
        "sys.exit(main([]))"
    )
    (tmp_path / "p.py").write_text(program)
    assert os.system(f"PYTHONPATH=. python3 {tmp_path}/p.py 2>{tmp_path}/err | head -1 >/dev/null") == 0
    assert (tmp_path / "err").read_text() == ""
