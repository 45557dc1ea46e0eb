"""The configs that are installed with the package, by name."""

import re
from pathlib import Path

from data_pipelines.errors import UserError, did_you_mean
from data_pipelines.text_files import shown


def find_config(name: str | Path) -> Path:
    """Return the path of a config: of the file with this path, otherwise of the shipped config with this name.

    Raises:
        UserError: the name is neither a path nor a shipped config.
    """
    path, name = Path(name), str(name)
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except (OSError, ValueError):  # a name that is too long, or has a NUL
        exists = is_folder = False
    if exists and not is_folder:
        return path
    shipped = shipped_configs()
    if name in shipped:
        return shipped[name]
    if is_folder or path.is_absolute() or path.suffix in (".yaml", ".yml"):
        return path  # reading it reports what is wrong
    hint = did_you_mean(name, shipped)
    raise UserError(f"config {shown(name)} is neither a file nor a shipped config{hint}: {', '.join(shipped)}")


def command_for_data(config: Path) -> str | None:
    """Return the command that writes the videos or images of a config, from its comment "# Videos: COMMAND", or None.

    A line of the comment that ends with a backslash continues in the next one.
    """
    comment = re.search(r"^# (?:Videos|Images): (worldmodel (?:.*\\\n)*.*)", config.read_text("utf-8"), re.MULTILINE)
    return re.sub(r" *\\\n# *", " ", comment[1]) if comment else None


def shipped_configs() -> dict[str, Path]:
    """Return the configs that are installed with the package by name, such as demo or causal/isotropic."""
    folder = Path(__file__).resolve().parents[1] / "configs"
    found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.yaml")}
    return {name: found[name] for name in sorted(found) if not name.startswith("accelerate/")}
