"""Arguments as tyro reads them: options of several values add up, and help is of one style."""

import dataclasses
import re
from typing import Annotated, Literal

import pytest
import tyro

from jaxlm.cli import COMMANDS, main
from jaxlm.cli import train as train_command
from jaxlm.cli.arguments import of_dataclass, of_function
from jaxlm.train import Data, Osft
from jaxlm.train.stopping import Stopped


@dataclasses.dataclass(frozen=True)
class Flat:
    """Options of a dataclass.

    Args:
      names: some.
    """

    names: tuple[str, ...] = ("x", "y")


def command(
    model: str, files: tuple[str, ...] = (), /, text: tuple[str, ...] = (),
    counts: tuple[int, ...] = (32,), shares: tuple[float, ...] = (),
    kinds: list[Literal["a", "b"]] = ["a"],  # noqa: B006
    pairs: tuple[tuple[str, float], ...] = (), ends: tuple[str, ...] | None = None, seed: int = 0,
    flat: Annotated[Flat, tyro.conf.OmitArgPrefixes] = Flat(),  # noqa: B008
):
    """A command with options of every kind."""
    return {**locals(), "flat": flat.names}


def read(*argv):
    return tyro.cli(of_function(command), args=["m", *argv])


@pytest.mark.parametrize(("argv", "name", "value"), [
    ((), "text", ()),
    (("--text", "a", "b"), "text", ("a", "b")),
    (("--text", "a", "--text", "b"), "text", ("a", "b")),
    (("--text", "a", "--text", "b", "c", "--seed", "1", "--text", "d"), "text", tuple("abcd")),
    (("--text=a", "--text", "b", "--text=c"), "text", ("a", "b", "c")),
    (("--text=-x", "--text=--text", "--text", "b"), "text", ("-x", "--text", "b")),
    (("--text", "22=-inf", "--text", "60=-inf"), "text", ("22=-inf", "60=-inf")),
    (("--text", "a", "--text", "a"), "text", ("a", "a")),
    (("f", "--text", "a", "--text", "b"), "files", ("f",)),
    ((), "counts", (32,)),
    (("--counts", "1", "--counts", "2", "-3"), "counts", (1, 2, -3)),
    (("--shares", "-0.5", "--shares", "1e-3"), "shares", (-0.5, 1e-3)),
    ((), "kinds", ["a"]),
    (("--kinds", "b", "--kinds", "b", "a"), "kinds", ["b", "b", "a"]),
    (("--pairs", "a", "1", "b", "2", "--pairs", "c", "3"), "pairs",
     (("a", 1.0), ("b", 2.0), ("c", 3.0))),
    ((), "ends", None),
    (("--ends",), "ends", ()),
    (("--ends", "a", "--ends", "b"), "ends", ("a", "b")),
    ((), "flat", ("x", "y")),
    (("--names", "a", "--names", "b"), "flat", ("a", "b")),
    (("--seed", "1", "--seed", "2"), "seed", 2),
])
def test_mentions_add_up(argv, name, value):
    assert read(*argv)[name] == value


@pytest.mark.parametrize("argv", [
    ("--counts", "1", "--counts", "x"), ("--kinds", "a", "--kinds", "c"), ("--nope", "a")])
def test_a_wrong_value_of_any_mention_is_refused(argv, capsys):
    with pytest.raises(SystemExit) as left:
        read(*argv)
    assert left.value.code == 2 and argv[-2] in capsys.readouterr().err


def test_a_dataclass_keeps_its_class_and_what_is_not_said():
    start = dataclasses.replace(Osft(), patterns=(("q", 0.5),))
    made, back = of_dataclass(start)
    asked = lambda *argv: back(tyro.cli(type(made), args=argv))
    assert asked() == start and type(asked()) is Osft
    found = asked("--patterns", "a", "0.5", "--patterns", "b", "1", "--targets", "q")
    assert found == Osft(patterns=(("a", 0.5), ("b", 1.0)), targets=("q",))


def test_the_files_of_a_training_add_up(tmp_path, monkeypatch, capsys):
    seen = []

    def stop(config):
        seen.append(config)
        raise Stopped("seen")

    monkeypatch.setattr(train_command, "train", stop)
    (tmp_path / "c.yaml").write_text("steps: 3\ndata: {train: [old], eval: [kept]}\n")
    argv = ("train", f"{tmp_path}/c.yaml", "--data.train", "a", "--steps", "5", "--data.train=b")
    assert main(argv) == 75
    assert seen[0].data == Data(train=("a", "b"), eval=("kept",)) and seen[0].steps == 5
    assert main([*argv, "--data.window", "0"]) == 2
    assert capsys.readouterr().err.endswith(
        "\njaxlm: data.window is 0; expected a whole number of at least 1\n")


@pytest.mark.parametrize("argv", [
    *((name,) for name in COMMANDS), ("train", "--tuning.kind", "osft")], ids=" ".join)
def test_metavars_are_of_one_style(argv, capsys):
    with pytest.raises(SystemExit):
        main([*argv, "--help"])
    told = capsys.readouterr().out
    assert not re.search(r"\bSTR\b|\{None|\[[A-Z]+ \[|\(default: \)|repeatable", told)
