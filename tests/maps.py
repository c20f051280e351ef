"""Maps for property tests."""

from hypothesis import strategies as st


@st.composite
def maps(draw, rows, columns):
    """Draw a map of some rows and columns, with a start and a goal and holes anywhere else."""
    height, width = draw(rows), draw(columns)
    cells = draw(st.lists(st.sampled_from([0, 0, -1]), min_size=height * width, max_size=height * width))
    start, goal = draw(st.permutations(range(height * width)))[:2]
    cells[start], cells[goal] = 1, 2
    return tuple(tuple(cells[row * width : (row + 1) * width]) for row in range(height))
