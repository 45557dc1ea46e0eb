"""The names that `import worldmodel` offers."""

import inspect
import subprocess
import sys
from types import ModuleType

import pytest

import worldmodel
from tests.conftest import REPO, script_environment

CLASSES = {"Config", "TrainedRun", "WorldModel"}
FUNCTIONS = {"build_model", "evaluate", "export", "load", "load_config", "open_videos", "push", "train"}

IMPORT = """
import sys
import worldmodel
assert not {"torch", "pydantic", "numpy", "huggingface_hub"} & set(sys.modules)
assert {"load", "push"} <= set(dir(worldmodel))
from worldmodel.runs import travel  # a submodule must not take the place of a function
assert callable(worldmodel.export) and callable(worldmodel.evaluate) and callable(worldmodel.train)
"""


def test_names() -> None:
    assert set(worldmodel.__all__) == CLASSES | FUNCTIONS | {"__version__"}
    assert all(inspect.isclass(getattr(worldmodel, name)) for name in CLASSES)
    assert all(inspect.isfunction(getattr(worldmodel, name)) for name in FUNCTIONS)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        worldmodel.lode  # noqa: B018


@pytest.mark.parametrize("name", sorted(CLASSES | FUNCTIONS))
def test_each_name_has_a_docstring(name: str) -> None:
    text = getattr(worldmodel, name).__doc__ or ""
    assert text and not text.startswith(f"{name}("), "the docstring that dataclasses generate"


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_each_function_has_an_example_that_parses(name: str) -> None:
    text = inspect.getdoc(getattr(worldmodel, name)) or ""
    lines = [line.strip().removeprefix(">>> ") for line in text.splitlines() if line.strip().startswith(">>> ")]
    assert f"{name}(" in text
    for line in lines:
        compile(line, name, "exec")


def test_the_import_is_light() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, cwd=REPO, env=script_environment()
    )
    assert done.returncode == 0, done.stderr


def test_no_submodule_shadows_a_name() -> None:
    assert not any(isinstance(getattr(worldmodel, name), ModuleType) for name in FUNCTIONS | CLASSES)
