"""The names that `import bert4rec_hf` provides."""

import subprocess
import sys

import bert4rec_hf


def test_every_public_name_is_what_it_names_and_no_module_of_that_name():
    # A new interpreter is used, since earlier imports decide what a name is that a module has too.
    code = "from inspect import ismodule\n" + "".join(
        f"from bert4rec_hf import {name}\nassert not ismodule({name}), {name!r}\n" for name in bert4rec_hf.__all__
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_are_listed_where_people_and_editors_look():
    assert set(bert4rec_hf.__all__) <= set(dir(bert4rec_hf))
    later = {name for name in bert4rec_hf.__all__ if name in bert4rec_hf._LATER}
    assert later == set(bert4rec_hf._LATER)
