"""CoMT: multiple choice or free text about an image, solved step by step; scored by the final answer."""

from ilvr_jax.tasks import answers

open_source, check = answers.open_source, answers.check
find_answer, canonical, is_right = answers.find_answer, answers.canonical, answers.is_right
