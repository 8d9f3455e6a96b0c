"""Each text in mutations.py occurs exactly once. `make test-mutations` makes the mistakes, which takes longer."""

import pytest
from mutations import MUTATIONS, REPOSITORY


@pytest.mark.parametrize("file", MUTATIONS)
def test_the_text_of_every_mistake_stands_once_in_its_file(file):
    source = (REPOSITORY / "bert4rec_hf" / f"{file}.py").read_text("utf-8")
    for mistake, old, new, test in MUTATIONS[file]:
        name, function = test.split("[")[0].split("::")
        assert source.count(old) == 1, mistake
        assert old != new, mistake
        assert f"def {function}(" in (REPOSITORY / "tests" / name).read_text("utf-8"), mistake
