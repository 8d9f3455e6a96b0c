"""`PrepareOptions`: one declaration for the function, the command line and the card."""

import dataclasses
import re

import pytest

from bert4rec_hf import PrepareOptions, prepare
from bert4rec_hf.cli import main


def test_the_command_line_has_every_option_and_no_other(capsys):
    with pytest.raises(SystemExit):
        main(["prepare", "--help"])
    # The line of an option starts with its names. Help texts name other options too, but not at the start.
    lines = re.findall(r"^  (-.*?)(?:  .*)?$", capsys.readouterr().out, re.MULTILINE)
    found = {option for line in lines for option in re.findall(r"--(\w+)", line)}
    named = {option.name for option in dataclasses.fields(PrepareOptions)}
    own = {"output", "sql", "database", "memory_limit"}  # they do not change what is prepared of a log
    assert found == named | own | {"config", "help", "no_validation"}


def test_an_option_that_does_not_exist_names_the_nearest_one(tmp_path):
    with pytest.raises(TypeError, match="no option 'min_ratings'; did you mean min_rating"):
        prepare("log.csv", tmp_path / "data", min_ratings=4)


def test_options_and_changes_go_together_and_the_options_stay(tmp_path):
    log = tmp_path / "log.csv"
    rows = "".join(f"{user},{item},{user * 10 + item}\n" for user in range(4) for item in range(5))
    log.write_text(f"user_id,item_id,timestamp\n{rows}")
    options = PrepareOptions(max_length=7, split="none")
    found = prepare(log, tmp_path / "data", options, filter_seen_items=True)
    assert (found["max_length"], found["split"]["name"], found["filter_seen_items"]) == (7, "none", True)
    assert options == PrepareOptions(max_length=7, split="none")
