"""Training a drafter from nothing: `ttspec train`.

Where to start: `train` in train.py, which does these in this order.

    config.py                       options; they are the command's flags
    answers.py                      the target answers the prompts, with plain batched decoding
    batches.py                      answers to examples, `Batches` of them step by step
    recipe.py                       `Recipe`: how a new drafter begins, a step's loss and memory
    recipes.py, block_recipes.py    one a kind: chains and draft models; DFlash and its kin
    train.py                        the loop: float32 masters, saved states, the drafter's folder

To add a kind: a `Recipe` with `new` and `loss`, an entry in `recipes.RECIPES` and one in
`config.Kind`; tests/test_recipes.py runs every entry.
"""
