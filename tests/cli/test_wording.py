"""What a command says of its arguments names them as they are typed, whatever part of the library says it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from modelstore.cli.terminal import wording
from tests.cli.conftest import Command
from tests.cli.test_mentions import COMMAND
from tests.test_voice import messages

KNOWN = wording.everywhere(COMMAND)
PYTHON = re.compile(r"(?<![\w.'\"-])([a-z][a-z_]*)=")


def left(message: str) -> set[str]:
    """Arguments of a message that are an option of some command, and written as Python takes them."""
    spoken = wording.in_options(message, {}, KNOWN)
    told = {name for name in PYTHON.findall(re.sub(r"'[^']*'", "", spoken)) if name in KNOWN}
    return told - set(re.findall(r"([a-z_]+)=False", spoken))  # no option says these


def test_every_message_is_spoken_in_options() -> None:
    wrong = [f"{place}: {text}" for place, text in messages() if left(text.replace("={}", "='v'"))]
    assert not wrong, "\n".join(wrong)


def test_there_are_messages_that_speak_of_arguments() -> None:
    assert len([text for _, text in messages() if set(PYTHON.findall(text)) & set(KNOWN)]) > 50
    assert left("give plan={'v': 1}, format='hf'") == set()


def test_no_message_says_an_option_beside_the_argument() -> None:
    twice = [f"{place}: {text}" for place, text in messages() if re.search(r"\(--[a-z]", text) and "cli/" not in place]
    assert not twice, "\n".join(twice)


@pytest.mark.parametrize(
    ("message", "spoken"),
    [
        ("recipe= and max_kl= each say it", "RECIPE and --max-kl each say it"),
        ("give one, text='other.txt'", "give one, --text other.txt"),
        ("give one, text='my book.txt', or none", "give one, --text 'my book.txt', or none"),
        ("include=['embedding', 'head']", "--include embedding --include head"),
        ("formats=['int4']", "--format int4"),
        ('variant="it\'s" is none', """--variant 'it'"'"'s' is none"""),
        ("context=512 is more", "--context 512 is more"),
        ("memory=1.5GiB: give more", "--memory 1.5GiB: give more"),
        ("requantize=True makes", "--requantize makes"),
        ("or with files={'tokenizer.json': …}", "or with --files tokenizer.json=…"),
        ("keep=False does without", "--no-keep does without"),
        ("leave requantize=False out", "leave requantize=False out"),
        ("device is the text 'foo'", "--device is the text 'foo'"),
        ("fit: '0' is no size", "--fit: '0' is no size"),
        ("save with codec='raw'", "save with --codec raw"),  # another command's
        ("a tensor 'fit=3' of fit=3", "a tensor 'fit=3' of --fit 3"),  # a name is told as it is
        ("the model's fit= and its layers' fit=", "the model's --fit and its layers' --fit"),
        ("or only read it (read_only=True)", "or only read it"),
        ("write plan={'a': 0}, use_ocdbt=False", "write plan={'a': 0}, use_ocdbt=False"),  # no options
    ],
)
def test_arguments_are_written_as_they_are_typed(message: str, spoken: str) -> None:
    own = wording.options(COMMAND.commands["compress"])
    assert wording.in_options(message, own, KNOWN | own) == spoken


def test_python_says_it_in_python(saved: Command) -> None:
    assert wording.as_typed("give one, text='other.txt'") == "give one, text='other.txt'"  # no command runs


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["compress", "acme/toy", "gptq4"], "--calibration book.txt"),
        (["compress", "acme/toy"], "a size, --fit 120MiB, or a bound, --max-kl 0.05"),
        (["compress", "acme/toy", "int4", "--fit", "1MB"], "RECIPE and --fit each say what is to be made"),
        (["compress", "acme/toy", "int4", "--format", "int8"], "--format has no effect"),
        (["save", "MODEL", "acme/toy", "--codec", "delta"], "say which by --parent name@version"),
        (["save", "MODEL", "acme/toy", "--grid", "whole"], "save with --codec raw"),
        (
            ["compress", "acme/toy", "ladder", "--codes", "nowhere"],
            "--codes nowhere is neither a directory nor a stored",
        ),
        (["export", "acme/toy", "x.gguf"], "add --format gguf, or name another folder"),
        (["export", "acme/toy", "MODEL"], "replace it by --overwrite"),
        (["load", "acme/toy", "-o", "x.safetensors", "--memory", "1kB"], "--memory 1000 is below the 64 MiB"),
    ],
)
def test_commands_speak_of_options(
    saved: Command, answer: Command, model: Path, words: list[str], says: str, tmp_path: Path
) -> None:
    typed = [str(model) if word == "MODEL" else word for word in words]
    code = 1 if says.startswith(("replace", "--codes")) else 2
    assert says in saved(*typed, code=code).stderr
    assert says in saved(*typed, "--json", code=code).stderr  # a program's, too


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["eval", "m", "--text", "FILE", "--limit", "0"], "'--limit': it must be at least 2"),
        (["eval", "m", "--text", "FILE", "--limit", "many"], "'--limit': it must be a whole number"),
        (["compress", "m", "--max-kl", "little"], "'--max-kl': it must be a number"),
        (["gc", "--grace", "5"], "'5' is a time without a unit: write 5s, 5m, 5h or 5d"),
    ],
)
def test_values_that_cannot_be_are_refused_in_our_words(
    run: Command, tmp_path: Path, words: list[str], says: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It is a truth")
    said = run(*[str(text) if word == "FILE" else word for word in words], code=2).stderr
    assert says in " ".join(said.split())
    assert "Input should" not in said
