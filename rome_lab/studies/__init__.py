"""What one notebook needs and no other: a room a notebook, whose front door is all that the notebook imports beside `rl`.

anatomy       edit_anatomy.ipynb: the vectors of one edit, what it does to other keys, edits at every token and layer
evaluation    evaluation.ipynb: methods beside each other and beside the paper, paraphrases one by one
many_edits    many_edits.ipynb: what becomes of a model of many edits
search        search.ipynb: settings, searched for on cases that are not reported
gradients     gradients.ipynb: effects estimated by gradients beside the exact ones
cost          cost.ipynb: what tracing costs, measured here and counted for larger models
"""
