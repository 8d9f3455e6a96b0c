"""Runs Transformers' common tests of models and configurations on our model.

    python tests/conformance/run_upstream.py [pytest options]

The tests are in the source distribution of the installed transformers, which is unpacked into the user's cache folder,
never into the repository. It lacks the modules in `ABSENT`, so this script writes replacements for them: empty mixins
for generation, which BERT4Rec does not do, and for exporters, and the arguments that the configuration tests read.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import transformers

ABSENT = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": (
        "config_common_kwargs = {'return_dict': False, 'output_hidden_states': True, 'output_attentions': True,\n"
        "    'chunk_size_feed_forward': 5, 'architectures': ['BertModel'], 'id2label': {0: 'label'},\n"
        "    'label2id': {'label': '0'}, 'problem_type': 'regression', 'dtype': 'float16'}\n"
    ),
}


def unpack() -> Path:
    """The folder of the source distribution, fetched once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bert4rec_hf"
    name = f"transformers-{transformers.__version__}"
    folder = cache / name
    if not (folder / "tests" / "test_modeling_common.py").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
            command += ["--no-binary", "transformers", "--dest", temporary]
            subprocess.run([*command, f"transformers=={transformers.__version__}"], check=True)
            with tarfile.open(next(Path(temporary).glob("*.tar.gz"))) as archive:
                members = [member for member in archive if member.name.startswith(f"{name}/tests/")]
                archive.extractall(temporary, members, filter="data")
            tests = Path(temporary) / name / "tests"
            for path, text in ABSENT.items():
                (tests / path).parent.mkdir(exist_ok=True)
                (tests / path).write_text(text)
                (tests / path).with_name("__init__.py").touch()
            (tests / "__init__.py").touch()
            os.replace(Path(temporary) / name, folder)
    return folder


if __name__ == "__main__":
    # Transformers' package `tests` must be found before the folder `tests` of this repository.
    sys.path.insert(0, str(unpack()))
    here = Path(__file__).parent
    sys.exit(
        pytest.main(
            ["-p", "no:cacheprovider", "-W", "ignore", "--rootdir", str(here), str(here / "upstream.py"), *sys.argv[1:]]
        )
    )
