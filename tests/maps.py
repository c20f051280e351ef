"""Maps for property tests, and what sketches of them show."""

import numpy as np
from hypothesis import strategies as st

from ilvr_jax.data.frozen_lake.drawing import SIGNS


@st.composite
def maps(draw, rows, columns):
    """Draw a map of some rows and columns, with a start and a goal and holes anywhere else."""
    height, width = draw(rows), draw(columns)
    cells = draw(st.lists(st.sampled_from([0, 0, -1]), min_size=height * width, max_size=height * width))
    start, goal = draw(st.permutations(range(height * width)))[:2]
    cells[start], cells[goal] = 1, 2
    return tuple(tuple(cells[row * width : (row + 1) * width]) for row in range(height))


def read_sketch(sketch: np.ndarray) -> list[list[int]]:
    """Return the number of the sign in each cell of a sketch."""
    names = {sign.tobytes(): number for number, sign in enumerate(SIGNS)}
    assert len(names) == 16
    small = sketch[::14, ::14]
    np.testing.assert_array_equal(sketch, small.repeat(14, axis=0).repeat(14, axis=1))
    cells = np.split(small, len(small) // 2)
    return [[names[cell.tobytes()] for cell in np.split(row, row.shape[1] // 2, axis=1)] for row in cells]
