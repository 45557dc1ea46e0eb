"""States that a user gives to an environment: positions alone, or with the velocities."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import UserError

State = NDArray[np.float32]


def whole_state(name: str, value: Any, names: tuple[str, ...], num_positions: int) -> State:
    """Return a state as float32 [len(names)], at rest if it has the first num_positions numbers only.

    Raises:
        UserError: it has another form.
    """
    try:
        state = np.array(value, np.float32)
    except (ValueError, TypeError):
        state = np.empty(0, np.float32)
    if state.ndim != 1 or len(state) not in (num_positions, len(names)) or not np.isfinite(state).all():
        raise UserError(
            f"{name}={value!r} must be {num_positions} numbers ({', '.join(names[:num_positions])}), or {len(names)} "
            f"(also {', '.join(names[num_positions:])})"
        )
    return np.pad(state, (0, len(names) - len(state)))
