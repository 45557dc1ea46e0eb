"""Features of the processor, as Linux names them."""

from functools import lru_cache
from pathlib import Path


def has_amx() -> bool:
    """Return True if the processor multiplies tiles of matrices (Intel AMX)."""
    return "amx_tile" in cpu_flags()


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """Return the features of the processor as Linux names them. Empty on other systems."""
    return frozenset(next((value.split() for key, value in cpuinfo() if key == "flags"), []))


def cpuinfo() -> list[tuple[str, str]]:
    """Return the keys and values of /proc/cpuinfo (Linux)."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines)]
